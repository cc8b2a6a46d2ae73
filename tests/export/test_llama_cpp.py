"""llama.cpp itself reads the files: the same tokens, the same logits but for its 8-bit inputs, the same text."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ultralowbit.export.base import export
from ultralowbit.export.gguf.blocks import BLOCK_TYPES, Multiples
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.nn.hf import load
from ultralowbit.nn.linear import PackedLinear

from .conftest import ARCHITECTURES, PROSE

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

METHODS = {
    "Q1_0": Sign(group=128),
    "Q2_0": RTN(bits=2, group=64, symmetric=True, clip="mse"),
    "Q4_0": RTN(bits=4, group=32, symmetric=True),
    "Q8_0": RTN(bits=8, group=32, symmetric=True),
}
TOKENS = (torch.arange(48) * 7 % 380).tolist()


def opened(path: Path):
    """A model whose keys and values are kept in 32 bits."""
    return llama_cpp.Llama(
        str(path), logits_all=True, n_ctx=256, n_batch=256, n_threads=1, type_k=0, type_v=0, verbose=False
    )


def logits(path: Path) -> Tensor:
    model = opened(path)
    model.eval(TOKENS)
    return torch.from_numpy(model.scores[: len(TOKENS)].copy())


def eight_bits(x: Tensor) -> Tensor:
    """Inputs as llama.cpp rounds them where weights are in blocks: whole multiples of an fp16 step for 32 of them."""
    blocks = x.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step.clamp_min(1e-30)).round() * step.half().float()).flatten(-2)


def sixteen_bits(x: Tensor) -> Tensor:
    """And where they are F16."""
    return x.half().float()


@torch.no_grad()
def ours(folder: Path, packed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Our logits; with `packed`, those of a model that rounds the inputs of packed Linears by it, of others to fp16."""
    model = load(folder)
    for module in model.modules():
        if packed is not None and isinstance(module, PackedLinear | nn.Linear):
            rounding = packed if isinstance(module, PackedLinear) else sixteen_bits
            module.register_forward_pre_hook(lambda _, inputs, rounding=rounding: (rounding(inputs[0]),))
    return model(torch.tensor([TOKENS])).logits[0]


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_ours_but_for_the_noise_of_rounded_inputs(name, save_packed, small_config, tmp_path):
    """Both noises are measured on our own side, by rounding inputs in the same way: 3 % of the logits' spread for
    8 bits, 0.2 % for 16. A wrong key, row or scale is off by 10 to 100 %."""
    folder = save_packed(small_config(name), METHODS["Q4_0"], tmp_path)
    exact = ours(folder)
    sixteen = logits(export(folder, "gguf", tmp_path / "16.gguf", dequantize=True))
    assert distance(sixteen, exact) < 2.5 * distance(ours(folder, sixteen_bits), exact)  # its attention rounds too
    eight = logits(export(folder, "gguf", tmp_path / "8.gguf"))
    assert distance(eight, exact) < 1.5 * distance(ours(folder, eight_bits), exact)


@pytest.mark.parametrize("name", METHODS)
def test_every_block_type_multiplies_what_was_packed(name, save_packed, small_config, tmp_path):
    folder = save_packed(small_config("llama"), METHODS[name], tmp_path)
    exact = ours(folder)
    assert distance(logits(export(folder, "gguf", tmp_path / "m.gguf")), exact) < 1.5 * distance(
        ours(folder, eight_bits), exact
    )


@pytest.mark.parametrize("embeddings", ["f16", "q8_0"])
def test_the_greedy_text_is_the_same(embeddings, save_packed, small_config, tmp_path):
    """Where the likeliest token leads by more than the noise, which random models do in most places."""
    folder = save_packed(small_config("llama"), METHODS["Q4_0"], tmp_path)
    path = export(folder, "gguf", tmp_path / "m.gguf", embeddings=embeddings)
    exact, theirs = ours(folder), logits(path)
    best = exact.topk(2).values
    clear = best[:, 0] - best[:, 1] > 8 * distance(ours(folder, eight_bits), exact)
    assert clear.sum() >= 10
    assert torch.equal(theirs.argmax(1)[clear], exact.argmax(1)[clear])


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_texts_become_the_same_tokens(kind, request, save_packed, small_config, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    folder = save_packed(small_config("llama"), METHODS["Q4_0"], tmp_path, tokenizer)
    model = opened(export(folder, "gguf", tmp_path / "m.gguf"))
    for text in (*PROSE.splitlines(), PROSE, " a", "a  b", "", "it's 12 o'clock", "</s>"):
        expected = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected, text
        assert model.detokenize(expected, special=True).decode().lstrip(" ") == tokenizer.decode(expected).lstrip(" ")


@pytest.mark.parametrize(
    "segment",
    [Planes(256, 1, 128), Planes(192, 1, 128), Ints(128, 2, 64, True), Ints(64, 4, 32, True), Ints(64, 8, 32, True)],
    ids=lambda segment: segment.summary,
)
def test_ggml_decodes_the_very_weight(segment):
    packed: PackedWeight = random_packed(Format((segment,)), 6)
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    for kind in BLOCK_TYPES:
        weight = Multiples.of(packed)
        if kind.holds(weight):
            encoded, decoded = kind.encode(weight).contiguous(), np.empty(packed.shape, np.float32)
            decode = getattr(library, f"dequantize_row_{kind.name.lower()}")
            decode(*map(ctypes.c_void_p, (encoded.data_ptr(), decoded.ctypes.data)), ctypes.c_int64(decoded.size))
            assert torch.equal(torch.from_numpy(decoded), packed.dequantize()), kind.name
