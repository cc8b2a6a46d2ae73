"""Linears that share an input, multiplied at once: the same numbers, tensors and files, and one product for several."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

import ultralowbit
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.nn import fused
from ultralowbit.nn.linear import PackedLinear, swap
from ultralowbit.recipe import Recipe

LLAMA = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
TOKENS = torch.randint(4, 96, (2, 12), generator=torch.Generator().manual_seed(0))
SUMS = 2.0**-16
"""What the order of fp32 sums of a hundred terms can change in logits near 1, a few layers later: where a weight is
written out, torch's depends on how many rows it multiplies at a time."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_model, text):
    made: dict[str, Path] = {}

    def make(**quantize: Any) -> Path:
        key = str(quantize)
        if key not in made:
            root = tmp_path_factory.mktemp("fused")
            source = save_model(AutoConfig.for_model("llama", **LLAMA, attention_bias=True), root / "source")
            calibration = {"source": text, "samples": 4, "length": 24}
            recipe = Recipe.model_validate({"name": "r", "quantize": quantize, "calibration": calibration})
            made[key] = ultralowbit.compress(str(source), recipe, root / "packed").folder
        return made[key]

    return make


@pytest.fixture(scope="module")
def folder(checkpoint) -> Path:
    return checkpoint(method="gptq", bits=2, group=32)


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def state(model: Any) -> dict[str, Tensor]:
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    return {f"{name}.{part}": tensor for name, m in modules for part, tensor in m.packed.tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "quantize",
    [
        {"method": "gptq", "bits": 2, "group": 32},
        {"method": "gptq", "bits": 3, "group": None},
        {"method": "sign", "planes": 2},
        {"method": "pb_llm"},
        {"method": "ptq161"},
    ],
    ids=lambda quantize: quantize["method"],
)
def test_the_numbers_are_those_of_the_parts(checkpoint, quantize):
    """Of salient channels too: where an input decides which they are, all that see it have the same."""
    plain, model = (ultralowbit.load(checkpoint(**quantize), fuse=fuse) for fuse in (False, True))
    assert equal(state(model), state(plain))
    one = TOKENS[:1, :1]
    assert torch.equal(logits(model, one), logits(plain, one))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=SUMS)


def test_what_shares_an_input_is_one_product(folder, monkeypatch):
    model = ultralowbit.load(folder)
    groups = fused.fuse(model)
    assert groups == [[f"model.layers.{i}.{name}" for name in names] for i in range(2) for names in (QKV, GATE_UP)]
    assert fused.fuse(model) == []
    products = []
    multiply = fused.packed_matmul
    monkeypatch.setattr(fused, "packed_matmul", lambda x, *rest: products.append(x) or multiply(x, *rest))
    logits(model)
    assert len(products) == 4
    assert all(m._waiting is None for m in model.modules() if isinstance(m, fused.Stack))  # no activation is kept


def test_linears_of_other_formats_or_shared_parts_stay_apart():
    def linear(columns: int, scale: float, format: Format) -> PackedLinear:
        module = PackedLinear(8, columns, format, None)
        parts = {
            "codes": torch.zeros(8, columns, dtype=torch.uint8),
            "scale": torch.ones(8, 1),
            "zero": torch.ones(8, 1),
        }
        transform = {"channel_order": None, "scale": torch.full((columns,), scale)}
        module.fill(PackedWeight.encode(format, parts, transform))
        return module

    scaled = InputTransform(16, column_scale=True)
    two, four = (Format((Ints(16, bits),), transform=scaled) for bits in (2, 4))
    a, b, other, finer = linear(16, 1, two), linear(16, 1, two), linear(16, 2, two), linear(16, 1, four)
    assert fused._stack(a, b) and not fused._stack(a, other) and not fused._stack(a, finer)


@pytest.mark.parametrize(
    "format",
    [
        Format((Ints(40, 3, 16),)),
        Format((Planes(40, 2, 16, "01", True),), IndexedOutliers(40, 3, 16)),
    ],
    ids=lambda format: format.summary,
)  # fmt: skip
def test_stacked_is_the_inverse_of_rows(format):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-100, 100, spec.shape, generator=generator).to(spec.dtype)
        for name, spec in format.tensors(24, 40).items()
    }
    parts = [format.rows(tensors, rows) for rows in (slice(0, 8), slice(8, 9), slice(9, 24))]
    assert equal(format.stacked(parts), tensors)


def test_another_x_of_the_same_values_is_multiplied_anew(folder):
    """Whoever calls the members with tensors of their own gets what each is due."""
    plain, model = ultralowbit.load(folder), ultralowbit.load(folder, fuse=True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for name in (*QKV, QKV[0], *reversed(QKV)):
        name = f"model.layers.0.{name}"
        ours, theirs = model.get_submodule(name), plain.get_submodule(name)
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x))
            x = x + 1
            assert torch.equal(ours(x), theirs(x))


def test_saving_writes_what_was_loaded(folder, tmp_path):
    model = ultralowbit.load(folder, fuse=True)
    model.save_pretrained(tmp_path)
    before, after = (
        {name: t for path in f.glob("*.safetensors") for name, t in load_file(path).items()} for f in (folder, tmp_path)
    )
    assert equal(before, after)
    assert torch.equal(logits(ultralowbit.load(tmp_path)), logits(ultralowbit.load(folder)))


def test_a_state_is_loaded_into_the_rows_of_the_stack(folder):
    first, other = (ultralowbit.load(folder, fuse=True) for _ in range(2))
    kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()  # what is no view stays
        for module in other.modules():
            if isinstance(module, fused.Stack):
                for tensor in module._tensors().values():
                    tensor.zero_()
    assert not torch.equal(logits(first), logits(other))
    for strict in (True, False):
        missing, unexpected = other.load_state_dict(kept, strict=strict)
        assert not missing and not unexpected
        assert torch.equal(logits(first), logits(other))
    del kept["model.layers.0.self_attn.k_proj.weight_scale"]
    assert other.load_state_dict(kept, strict=False).missing_keys == ["model.layers.0.self_attn.k_proj.weight_scale"]
    kept["model.layers.0.self_attn.k_proj.weight_scale"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"k_proj.weight_scale is torch.float32 \[3\]"):
        other.load_state_dict(kept)


def test_a_nan_that_linears_share_does_not_keep_the_fusing_busy(folder):
    format = Format((Ints(32, 4, 16), Planes(32, 1)), transform=InputTransform(64, column_scale=True))
    model = ultralowbit.load(folder)
    for name in QKV:
        linear = model.get_submodule(f"model.layers.0.{name}")
        packed = random_packed(format, linear.out_features)
        packed.tensors["weight_input_scale"].fill_(torch.nan)
        module = PackedLinear.replacing(linear, format)
        module.fill(packed)
        swap(model, f"model.layers.0.{name}", module)
    stacks = fused.fuse(model)
    assert not any(name == f"model.layers.0.{QKV[0]}" for stack in stacks for name in stack)


def test_dequantizing_gives_the_plain_model(folder):
    plain, model = (ultralowbit.load(folder, fuse=fuse).dequantize() for fuse in (False, True))
    assert equal(dict(plain.state_dict()), dict(model.state_dict()))


def test_casting_copying_and_8_bits(folder):
    model = ultralowbit.load(folder, "int8", fuse=True)
    before = {name: t.clone() for name, t in state(model).items()}
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert equal(state(copied), before) and copied.model.norm.weight.dtype == torch.bfloat16
    expected = logits(ultralowbit.load(folder, "int8"))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=SUMS)
    assert logits(copied).isfinite().all()


def test_the_compiler_sees_one_graph(folder):
    model = ultralowbit.load(folder, fuse=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS.flip(1)):
            expected = logits(ultralowbit.load(folder), tokens)
            torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, rtol=0, atol=SUMS)


def test_generation_is_the_same(folder):
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    plain, model = (ultralowbit.load(folder, fuse=fuse) for fuse in (False, True))
    assert torch.equal(model.generate(TOKENS, **kwargs), plain.generate(TOKENS, **kwargs))


@pytest.mark.parametrize("look", range(8))
def test_threads_do_not_take_the_rows_of_one_another(folder, look):
    """After a look at what waits, another thread leaves the rows of its own input there."""
    left, looks = [None], iter(range(100))

    class Contended(fused.Stack):
        @property
        def _waiting(self) -> Any:
            mine = left[0]
            if next(looks) == look:
                left[0] = torch.zeros(1, 64), [torch.zeros(1, size) for size in self.sizes]
            return mine

        @_waiting.setter
        def _waiting(self, value: Any) -> None:
            left[0] = value

    linears = [ultralowbit.load(folder).get_submodule(f"model.layers.0.{name}") for name in QKV]
    stack, x = Contended(linears), torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for member, linear in enumerate(linears):
        linear.bias = None
        assert torch.equal(stack.product(member, x, int8=False), linear(x))
