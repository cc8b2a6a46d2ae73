"""Error correction in the pipeline: what writes to a residual stream, and that the packed model is nearer for it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ultralowbit
from ultralowbit.data.calibration import calibrate
from ultralowbit.errors import InputError
from ultralowbit.hub import open_tokenizer
from ultralowbit.nn.decoder import Decoder
from ultralowbit.pipeline.collect import residual_writers
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
WRITERS = {
    "llama": (SMALL | {"num_key_value_heads": 2}, ["self_attn.o_proj", "mlp.down_proj"]),
    "gpt2": ({"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}, ["attn.c_proj", "mlp.c_proj"]),
    # attention and MLP side by side
    "gpt_neox": (SMALL | {"rotary_pct": 1.0}, ["attention.dense", "mlp.dense_4h_to_h"]),
    # a norm stands between each of them and the stream
    "gemma2": (SMALL | {"num_key_value_heads": 2, "head_dim": 8}, []),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_writes_to_the_residual_stream(kind, autocast, save_model, tmp_path):
    values, expected = WRITERS[kind]
    folder = save_model(AutoConfig.for_model(kind, **values), tmp_path / kind)
    decoder = Decoder(folder, torch.float32, torch.device("cpu"))
    decoder.autocast = autocast
    tokens, entered = torch.randint(4, 96, (1, 2, 16), generator=torch.Generator().manual_seed(0)), []
    calls = decoder.block_inputs(iter(tokens), lambda k, hidden: entered.append(hidden))
    with decoder.filled_block(0) as (block, _), torch.no_grad():
        names = [name.removeprefix(f"{decoder.block_name(0)}.") for name in decoder.linears(0)]
        writers = residual_writers(block, names, calls[0], entered[0])
    # attention's outputs are added to what enters the block, those of an MLP after it to more
    assert writers == dict(zip(expected, [True, False], strict=False))
    assert list(writers) == expected


@pytest.fixture(scope="module")
def source(tmp_path_factory, save_model):
    return save_model(AutoConfig.for_model("llama", **WRITERS["llama"][0]), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return str(path)


def recipe(text: str, **values) -> Recipe:
    calibration = {"source": text, "samples": 32, "length": 32}
    quantize = {"method": "sign", "planes": 2}
    return Recipe.model_validate({"name": "test", "quantize": quantize, "calibration": calibration} | values)


@torch.no_grad()
def test_the_last_hidden_states_are_nearer_to_the_originals(source, text, tmp_path):
    spec = recipe(text).calibration
    tokens = calibrate(
        spec.source, open_tokenizer(source), samples=spec.samples, length=spec.length, seed=spec.seed,
        model_path=source, device=torch.device("cpu"), progress=None,
    ).tokens  # fmt: skip

    def states(model) -> torch.Tensor:
        return model.model(tokens).last_hidden_state

    original = states(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    errors = []
    for correction in (None, {"residual": False}, {"residual": True}):
        folder = tmp_path / str(len(errors))
        compress(str(source), recipe(text, error_correction=correction), folder)
        errors.append((states(ultralowbit.load(folder, dtype=torch.float32)) - original).square().mean().item())
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("method", ["rtn", "gptq", "sign", "ptq161", "pb_llm", "db_llm"])
def test_rotated_and_corrected_weights_load_as_they_were_packed(source, text, tmp_path, method):
    """Methods without a Hessian have nothing to correct with, and are rotated all the same beside one that has."""
    values = {"quantize": {"method": method}, "rotate": {"inputs": "online"}, "error_correction": {}}
    values["overrides"] = [{"match": "*down_proj", "quantize": {"method": "gptq", "bits": 3}}]
    made = compress(str(source), recipe(text, **values), tmp_path / "out")
    assert not made.fallbacks
    layers = made.manifest["layers"].values()
    assert {layer["layout"]["transform"]["hadamard"] for layer in layers} == {32}
    model = ultralowbit.load(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(4, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    assert model(tokens).logits.isfinite().all()


def test_a_stopped_run_goes_on_to_the_same_bytes(source, text, tmp_path, monkeypatch):
    values = {"error_correction": {}, "rotate": {}}
    whole = compress(str(source), recipe(text, **values), tmp_path / "whole").manifest
    from ultralowbit.pipeline import stream

    pack = stream.quantize_weight
    packed = []

    def stop(*args):
        packed.append(args)
        if len(packed) == 10:  # in the second block
            raise KeyboardInterrupt
        return pack(*args)

    monkeypatch.setattr(stream, "quantize_weight", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(str(source), recipe(text, **values), tmp_path / "parts")
    monkeypatch.setattr(stream, "quantize_weight", pack)
    parts = compress(str(source), recipe(text, **values), tmp_path / "parts").manifest
    assert parts["files"] == whole["files"]


def test_clipped_tokens_are_refused(text):
    with pytest.raises(InputError, match="error_correction counts all tokens alike"):
        Recipe.load("sign-2", [f"calibration.source={text}", "calibration.clip_tokens=0.99", "error_correction={}"])
