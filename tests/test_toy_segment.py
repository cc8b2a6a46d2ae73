"""A new segment, or a new kind of outliers, is one file and one line in a table: here the test is the file.

Nothing of the package knows "ternary" weights or "zeroed" outliers, and no kernel does. Registered, they are
compressed, packed, loaded, counted, verified, checked and multiplied like any other part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

import ultralowbit
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.errors import FormatError, InputError
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.segment import BudgetKind, Outliers, Segment
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import OUTLIERS, SEGMENTS, Format, PackedWeight
from ultralowbit.format.words import TensorSpec, pack_fields, to_scale, unpack_fields, word_count
from ultralowbit.kernels.packed_matmul import kernel_for, packed_matmul, packed_matmul_ref
from ultralowbit.methods.base import fields
from ultralowbit.methods.statistics import InputStats, Need
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.verify import verify
from ultralowbit.recipe import Recipe
from ultralowbit.training.fake_quant.linear import FakeQuantLinear

LLAMA = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Ternary(Segment):
    """w = (code - 1) * scale, code 0, 1 or 2 in 2-bit fields; one scale a row."""

    kind: ClassVar[str] = "ternary"
    row_axis: ClassVar[Mapping[str, int | None]] = {"": -2}
    budget: ClassVar[Mapping[str, BudgetKind]] = {"": "integer codes", "_size": "scales and offsets"}
    columns: int

    @property
    def code_bits(self) -> float:
        return 1.58

    @property
    def summary(self) -> str:
        return f"{self.columns}xternary"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        words = TensorSpec(torch.int16, (out_features, word_count(self.columns, 2)))
        return {"": words, "_size": TensorSpec(torch.float16, (out_features,))}

    def encode(self, codes: Tensor, size: Tensor) -> dict[str, Tensor]:
        return {"": pack_fields(codes, 2), "_size": size.half()}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(unpack_fields(parts[""], 2, self.columns)).sub_(1).mul_(parts["_size"].float()[:, None])


@dataclass(frozen=True)
class Zeroed(Outliers):
    """One weight of each row is 0: its column is stored."""

    kind: ClassVar[str] = "zeroed"
    budget: ClassVar[Mapping[str, BudgetKind]] = {"_at": "masks and indices"}
    columns: int

    @property
    def share(self) -> float:
        return 1 / self.columns

    @property
    def summary(self) -> str:
        return "1zeroed"

    def tensors(self, out_features: int) -> dict[str, TensorSpec]:
        return {"_at": TensorSpec(torch.uint8, (out_features,))}

    def encode(self, at: Tensor) -> dict[str, Tensor]:
        return {"_at": at.to(torch.uint8)}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        out.scatter_(1, parts["_at"].long()[:, None], 0.0)

    def random(self, out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"_at": torch.randint(self.columns, (out_features,), generator=generator).to(torch.uint8)}


@fields
class TernaryMethod:
    """round(w / mean |w|), clamped to -1, 0, 1."""

    needs: ClassVar[Need] = Need.NOTHING
    method: Literal["ternary"] = "ternary"

    def format(self, in_features: int) -> Format:
        return Format((Ternary(in_features),), Zeroed(in_features))

    def quantize(self, weight: Tensor, stats: InputStats | None) -> PackedWeight:
        size = to_scale(weight.abs().mean(1))
        codes = (weight / size[:, None]).round().clamp(-1, 1).add(1).to(torch.uint8)
        at = weight.abs().argmin(1)
        return PackedWeight.encode(self.format(weight.shape[1]), {"codes": codes, "size": size}, {"at": at})


class TernaryRecipe(Recipe):
    quantize: TernaryMethod


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SEGMENTS, Ternary.kind, Ternary)
    monkeypatch.setitem(OUTLIERS, Zeroed.kind, Zeroed)


FORMATS = [
    Format((Ternary(300),)),
    Format((Planes(100, 1), Ternary(200))),
    Format((Ternary(300),), Zeroed(300)),
    Format((Ints(300, 4, 32),), Zeroed(300)),
]


def test_a_model_is_compressed_loaded_counted_and_verified(tmp_path, save_model):
    source = save_model(AutoConfig.for_model("llama", **LLAMA), tmp_path / "model")
    recipe = TernaryRecipe(name="ternary", quantize=TernaryMethod())
    out = tmp_path / "out"
    compress(str(source), recipe, out)
    original = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    model = ultralowbit.load(out)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 14
    for name, linear in packed.items():
        weight = original[f"{name}.weight"].float()
        size = weight.abs().mean(1, keepdim=True).half().float()
        expected = size * (weight / size).round().clamp(-1, 1)
        expected[torch.arange(len(weight)), weight.abs().argmin(1)] = 0
        assert torch.equal(linear.packed.dequantize(), expected)
    tokens = torch.arange(20)[None]
    dense = model(tokens).logits
    for name, linear in packed.items():
        model.set_submodule(name, linear.dense(torch.float32))
    torch.testing.assert_close(model(tokens).logits, dense)

    assert verify(out) == []
    size = measure_size(out)
    assert sum(size.budget.values()) == size.file_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    rows, linears = sum(m.out_features for m in packed.values()), packed.values()
    assert size.budget["integer codes"] == sum(2 * m.out_features * word_count(m.in_features, 2) for m in linears)
    assert size.budget["scales and offsets"] == 2 * rows
    assert size.budget["masks and indices"] == rows
    assert size.budget["other parts"] == size.budget["sign planes"] == 0


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kinds)
@pytest.mark.parametrize("int8", [False, True])
def test_the_reference_multiplies_where_no_kernel_knows_it(format, int8, device):
    packed = random_packed(format, 33)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).to(device)
    tensors = [t.to(device) for t in packed.tensors.values()]
    assert kernel_for(format, device, int8=int8) is packed_matmul_ref
    y = packed_matmul(x, tensors, json.dumps(format.to_dict()), int8)
    expected = x.double() @ packed.dequantize(torch.float32).double().to(device).T
    bound = 300 * 2.0**-23 * (x.double().abs() @ packed.dequantize().double().abs().to(device).T)
    assert ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kinds)
def test_a_gpu_has_no_kernel_for_it(format, monkeypatch):
    dispatch = pytest.importorskip("ultralowbit.kernels.gpu.dispatch")
    monkeypatch.setattr(dispatch, "has_tensor_cores", lambda device: True)
    assert dispatch.choose(format, torch.device("cuda"), torch.float16, 1) is None


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kinds)
def test_it_is_described_checked_and_cut_like_any_other(format):
    packed = random_packed(format, 33)
    assert Format.from_dict(json.loads(json.dumps(format.to_dict()))) == format
    format.check_values(packed.tensors)
    rows = PackedWeight(format, (7, 300), format.rows(packed.tensors, slice(3, 10)))
    assert torch.equal(rows.dequantize(), packed.dequantize()[3:10])
    damaged = dict(packed.tensors)
    scale = next(name for name, t in damaged.items() if t.is_floating_point())
    damaged[scale] = damaged[scale].clone().fill_(torch.nan)
    with pytest.raises(FormatError, match=f"^{scale} holds values that are not finite"):
        format.check_values(damaged)


def test_it_is_frozen_where_other_segments_are_trained():
    packed = random_packed(Format((Planes(40, 1), Ternary(24))), 5)
    trained = FakeQuantLinear(packed, {"scale"})
    assert torch.equal(trained.dense(), packed.dequantize())
    with torch.no_grad():
        trained.parts[0].scale.mul_(2)
    expected = packed.dequantize()
    expected[:, :40] *= 2
    assert torch.equal(trained.pack().dequantize(), expected)
    with pytest.raises(InputError, match="has none of what is to be trained"):
        FakeQuantLinear(random_packed(Format((Ternary(24),)), 5), {"scale"})


def test_without_its_line_it_is_refused_in_one_sentence(monkeypatch):
    description = Format((Ternary(8),), Zeroed(8)).to_dict()
    monkeypatch.delitem(OUTLIERS, Zeroed.kind)
    with pytest.raises(FormatError, match=r"^unknown outliers in the packed format: .*zeroed.*upgrade$"):
        Format.from_dict(description)
    monkeypatch.delitem(SEGMENTS, Ternary.kind)
    with pytest.raises(FormatError, match=r"^unknown segment in the packed format: .*ternary.*upgrade$"):
        Format.from_dict(description)


def test_a_linear_of_it_moves_and_casts_like_any_other():
    packed = random_packed(FORMATS[2], 33)
    linear = PackedLinear.replacing(nn.Linear(300, 33), packed.format)
    linear.fill(packed)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, packed.dequantize()) + linear.bias
    assert torch.equal(linear(x), expected)
    assert torch.equal(linear.to(torch.bfloat16).packed.dequantize(), packed.dequantize())
