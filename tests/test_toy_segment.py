"""What CONTRIBUTING promises of new segments and outliers: one class, one line in a table, and all else works."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from click.testing import Result
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from ultralowbit.cli.app import app
from ultralowbit.format.segment import BudgetKind, Outliers, Segment, check_fields
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import OUTLIERS, SEGMENTS, Format, PackedWeight
from ultralowbit.format.words import TensorSpec, pack_fields, unpack_fields, word_count
from ultralowbit.kernels.packed_matmul import packed_matmul
from ultralowbit.methods.rtn import RTN
from ultralowbit.nn.hf import load

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
RECIPE = """
name: ternary
quantize: {method: rtn, bits: 2, group: null}
"""


@dataclass(frozen=True)
class Ternary(Segment):
    """w = (code - 1) * scale with codes of 2 bits, one scale for a row."""

    kind: ClassVar[str] = "ternary"
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
    budget: ClassVar[Mapping[str, BudgetKind]] = {"": "integer codes", "_scale": "scales and offsets"}
    columns: int

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def code_bits(self) -> float:
        return 2

    @property
    def summary(self) -> str:
        return f"{self.columns}xternary"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        words = TensorSpec(torch.int16, (out_features, word_count(self.columns, 2)))
        return {"": words, "_scale": TensorSpec(torch.float16, (1, out_features))}

    def encode(self, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"": pack_fields(codes.to(torch.uint8), 2), "_scale": scale[None].half()}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        codes = unpack_fields(parts[""], 2, self.columns).float()
        out.copy_((codes - 1) * parts["_scale"].float().T)


@dataclass(frozen=True)
class FirstColumn(Outliers):
    """The weights of the first column in fp16."""

    kind: ClassVar[str] = "first_column"
    budget: ClassVar[Mapping[str, BudgetKind]] = {"_value": "salient values"}
    columns: int

    @property
    def share(self) -> float:
        return 1 / self.columns

    @property
    def summary(self) -> str:
        return "first"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        return {"_value": TensorSpec(torch.float16, (1, out_features))}

    def encode(self, value: Tensor) -> dict[str, Tensor]:
        return {"_value": value[None].half()}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        out[:, 0] = parts["_value"][0].float()


def ternary(in_features: int) -> Format:
    return Format((Ternary(in_features),), FirstColumn(in_features))


def quantize(self: RTN, weight: Tensor, stats: object) -> PackedWeight:
    scale = weight.abs().mean(1).half().float()
    codes = (weight / scale[:, None]).round().clamp(-1, 1) + 1
    return PackedWeight.encode(ternary(weight.shape[1]), {"codes": codes, "scale": scale}, {"value": weight[:, 0]})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SEGMENTS, Ternary.kind, Ternary)
    monkeypatch.setitem(OUTLIERS, FirstColumn.kind, FirstColumn)
    monkeypatch.setattr(RTN, "format", lambda self, in_features: ternary(in_features))
    monkeypatch.setattr(RTN, "quantize", quantize)


def test_it_is_multiplied_on_every_device(device):
    packed = random_packed(ternary(45), 7, device=device)
    x = torch.randn(5, 45, device=device)
    y = packed_matmul(x, [*packed.tensors.values()], json.dumps(packed.format.to_dict()))
    assert y.device.type == device.type
    # rounding of 45 products and their sum, which is near 1
    torch.testing.assert_close(y.double(), x.double() @ packed.dequantize().double().T, rtol=1e-5, atol=1e-5)


def test_it_is_compressed_loaded_counted_and_verified(save_model, text, tmp_path):
    source = save_model(CONFIG, tmp_path / "source")
    out, recipe = tmp_path / "out", tmp_path / "ternary.yaml"
    recipe.write_text(RECIPE)

    def run(*args: object) -> Result:
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])

    done = run(
        "compress", source, "--recipe", recipe, "--out", out, "--calib", text, "--samples", 8, "--length", 32,
        "--eval", text, "--max-tokens", 640, "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "xternary" in (out / "report.md").read_text()

    name = "model.layers.1.mlp.up_proj"
    weight = load(out).get_submodule(name).packed
    assert weight.format == ternary(40)
    dense = weight.dequantize()
    assert torch.equal(
        dense[:, 0], AutoModelForCausalLM.from_pretrained(source).get_submodule(name).weight[:, 0].half()
    )
    levels = dense[:, 1:] / weight.tensors["weight_scale"].float().T
    assert levels.unique().tolist() == [-1, 0, 1]

    size = json.loads(run("inspect", out, "--json").stdout)
    (layer,) = (layer for layer in size["layers"] if layer["name"] == name)
    # 56 rows: 40 codes of 2 bits in 5 words, a scale and an outlier
    assert layer["bytes"] == 56 * (5 * 2 + 2 + 2)
    assert layer["parts"] == {"codes": 560, "scale": 112, "outliers_value": 112}
    spent = {kind: size["budget"][kind] for kind in ("integer codes", "scales and offsets", "salient values")}
    assert sum(spent.values()) == size["linear_bytes"] and all(spent.values())

    assert run("verify", out).exit_code == 0
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert run("verify", out).exit_code == 1
