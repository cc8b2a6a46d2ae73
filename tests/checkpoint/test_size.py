"""Bits are counted from stored bytes: against the files' sizes and against hand-counted layers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from ultralowbit.bench.models import Shape, write_model, write_text
from ultralowbit.checkpoint.size import KINDS, PART_KINDS, Size, measure_size
from ultralowbit.errors import CheckpointError
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

SHAPE = Shape(hidden=64, inter=172, heads=4, kv_heads=2, vocab=96)
SOLVES = {
    "gptq2": {"method": "gptq", "bits": 2, "group": 128},
    "rtn3": {"method": "rtn", "bits": 3, "group": 32, "symmetric": True},
    "sign2": {"method": "sign", "planes": 2},
    "pb-count": {"method": "pb_llm"},
    "pb-threshold": {"method": "pb_llm", "selection": "threshold"},
    "billm": {"method": "billm"},
    "arb-rc": {"method": "arb_rc"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_text(folder / "text.txt", 500, SHAPE.vocab)
    return write_model(folder, layers=2, shape=SHAPE)


@pytest.fixture(scope="module", params=SOLVES)
def packed(request, model, tmp_path_factory):
    calibration = {"source": str(model / "text.txt"), "samples": 4, "length": 16}
    recipe = Recipe.model_validate(
        {
            "name": request.param,
            "quantize": SOLVES[request.param],
            "calibration": calibration,
            "ignore": ["*.0.*.o_proj"],
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralowbit.checkpoint.merge.SHARD_BYTES", 20_000)  # several files and an index
        return compress(str(model), recipe, tmp_path_factory.mktemp("packed") / "out").folder


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_every_byte_of_the_files_is_counted(packed):
    size = measure_size(packed)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in shards(packed))
    assert size.file_bytes == sum(file.stat().st_size for file in shards(packed))
    assert size.total_bytes + size.header_bytes == size.file_bytes
    assert size.header_bytes == headers
    assert size.total_bytes == size.linear_bytes + sum(size.other.values())


def test_layers_agree_with_the_manifest(packed):
    layers = json.loads((packed / "manifest.json").read_text())["layers"]
    size = measure_size(packed)
    assert {layer.name for layer in size.layers} == layers.keys()
    assert [layer.name.split(".")[2] for layer in size.layers] == ["0"] * 6 + ["1"] * 7
    for layer in size.layers:
        promised = layers[layer.name]
        assert (list(layer.shape), layer.format) == (promised["shape"], promised["format"])
        assert layer.bits_per_weight == promised["bits_per_weight"]
    weights = sum(layer.weights for layer in size.layers)
    assert size.linear_bits_per_weight == pytest.approx(
        sum(layer.bits_per_weight * layer.weights for layer in size.layers) / weights, rel=1e-12
    )


def test_the_budget_is_the_file(packed, model):
    size = measure_size(packed)
    assert size.budget.keys() == {*PART_KINDS, *KINDS, "file headers"}
    assert sum(size.budget.values()) == size.file_bytes
    assert size.budget["other parts"] == 0 and size.budget["scales and offsets"] > 0
    assert (size.budget["sign planes"] > 0) != (size.budget["integer codes"] > 0)
    plain = measure_size(model).budget
    assert not any(plain[kind] for kind in PART_KINDS)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (
            Format((Ints(40, 4), Planes(60, 1, offset=True)), MaskedOutliers(100, 7, 0.05)),
            {
                "integer codes": 10 * 20,
                "sign planes": 10 * 8,
                "salient values": 10 * 7,
                "masks and indices": 10 * 14,
                "scales and offsets": 10 * (2 + 1 + 2 + 2 + 2 + 1),
            },
        ),
        (
            Format((SalientSplit(100, 9, 32, third=True, column_scale=True),), IndexedOutliers(100, 2, 50)),
            {
                "sign planes": 10 * (2 * 14 + 2),
                "salient values": 10 * 4,
                "masks and indices": 14 + 10 * 4,
                "scales and offsets": 10 * (6 * 4 * 2 + 2 + 1) + 2 * 2 * (100 + 9),
            },
        ),
        (
            Format((Planes(100, 1),), transform=InputTransform(100, channel_order=True, column_scale=True)),
            {"sign planes": 10 * 14, "scales and offsets": 10 * 2, "input transform": 14 + 200},
        ),
    ],
    ids=["ints, planes, masked", "salient split, outliers", "transform"],
)  # fmt: skip
def test_every_part_has_its_kind(format, expected):
    tensors = {f"blocks.0.x.{name}": spec for name, spec in format.tensors(10, 100).items()}
    budget = Size.of(tensors, {"blocks.0.x": format}).budget
    assert {kind: count for kind, count in budget.items() if count} == expected


def test_a_layer_counted_by_hand(model, tmp_path):
    recipe = Recipe.model_validate({"name": "x", "quantize": {"method": "rtn", "bits": 2, "group": 128}})
    size = measure_size(compress(str(model), recipe, tmp_path / "out").folder)
    down = next(layer for layer in size.layers if layer.name == "model.layers.1.mlp.down_proj")
    # 172 columns of 2 bits: 22 int16 words a row; 2 groups, whose zero points share a byte
    assert (down.shape, down.parts) == ((64, 172), {"codes": 64 * 44, "scale": 64 * 4, "zero": 64})
    assert (down.bytes, down.claimed_bits) == (64 * 49, 2)
    assert down.bits_per_weight == 8 * 49 / 172
    assert size.claimed_bits == 2 < size.linear_bits_per_weight < size.model_bits_per_weight


def test_kinds(packed, model):
    table = 2 * SHAPE.vocab * SHAPE.hidden
    size = measure_size(packed)
    assert size.other == {
        "embeddings": table,
        "head": table,
        "norms and other": 2 * SHAPE.hidden * 5,
        "unquantized linears": 2 * SHAPE.hidden**2,
    }
    plain = measure_size(model)
    assert plain.total_weights == size.total_weights
    assert plain.total_bytes == plain.fp16_bytes == size.fp16_bytes
    assert size.compression == plain.total_bytes / size.file_bytes > 1  # the two sizes that are printed


def test_an_unpacked_checkpoint_has_no_layers(model):
    size = measure_size(model)
    assert size.layers == () and size.linear_bits_per_weight is None and size.claimed_bits is None
    assert (size.model_bits_per_weight, size.compression) == (16, size.total_bytes / size.file_bytes)
    assert size.file_bytes == sum(file.stat().st_size for file in shards(model))


def test_tied_transposed_and_biased(tmp_path):
    """GPT-2: positions are embeddings, biases are other, the tied head is stored once."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=4))
    model.save_pretrained(tmp_path / "model")
    recipe = Recipe.model_validate({"name": "x", "quantize": {"method": "rtn", "bits": 4, "group": None}})
    size = measure_size(compress(str(tmp_path / "model"), recipe, tmp_path / "out").folder)
    fused = next(layer for layer in size.layers if layer.name.endswith("c_attn"))
    assert fused.shape == (192, 64)
    biases, norms = 192 + 64 + 256 + 64, 2 * 64 * 3
    assert size.other == dict(zip(KINDS, (4 * 64 * (96 + 32), 0, 4 * (biases + norms), 0), strict=True))
    assert size.total_weights == sum(p.numel() for p in model.parameters())


def test_to_dict_is_json(packed):
    size = measure_size(packed)
    stored = json.loads(json.dumps(size.to_dict()))
    assert stored["file_bytes"] == size.file_bytes
    assert stored["layers"][0]["bits_per_weight"] == size.layers[0].bits_per_weight
    assert set(stored["other"]) == set(KINDS)


def copy(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_errors_name_what_is_wrong(packed, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        measure_size(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model.safetensors"):
        measure_size(tmp_path)

    broken = copy(packed, tmp_path / "cut")
    file = shards(broken)[0]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        measure_size(broken)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-\d+.safetensors is missing, though"):
        measure_size(broken)

    broken = copy(packed, tmp_path / "edited")
    config = json.loads((broken / "config.json").read_text())
    name = next(iter(config["quantization_config"]["modules"]))
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    save_file({f"{name}.weight": torch.zeros(3, 3)}, broken / "more.safetensors")
    index["weight_map"]["more"] = "more.safetensors"
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is stored twice"):
        measure_size(broken)
    (broken / "more.safetensors").rename(broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight is float32 \[3, 3\], expected int16"):
        measure_size(broken)
