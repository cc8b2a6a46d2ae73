"""The stage `allocate`: sensitivities are those of the whole model, and bits go where they matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import ultralowbit
from ultralowbit.errors import InputError
from ultralowbit.methods.bound import least_error
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.methods.statistics import InputStats
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.quantize import quantize_weight
from ultralowbit.pipeline.ranks import Ranks
from ultralowbit.pipeline.sensitivity import sensitivities
from ultralowbit.pipeline.source import open_decoder
from ultralowbit.pipeline.verify import rerun
from ultralowbit.progress import OnProgress, Silent
from ultralowbit.recipe import Recipe

GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = {
    "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory, save_model, tiny_config) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def recipe(text) -> Callable[..., Recipe]:
    """recipe(bits, key=value, ...): sign planes allocated on four windows of a local text."""

    def make(bits: float, **values: Any) -> Recipe:
        data = {"name": "test", "allocate": {"bits": bits, "windows": 2}, "quantize": {"method": "sign"}}
        data["calibration"] = {"source": text, "samples": 4, "length": 24}
        return Recipe.model_validate(data | values)

    return make


def inputs_of(model: torch.nn.Module, tokens: torch.Tensor, names: Iterable[str]) -> dict[str, InputStats]:
    stats = {name: InputStats(dense(model.get_submodule(name)).shape[1]) for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: stats[name].add(args[0]))
        for name in stats
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return stats


def dense(module: torch.nn.Module) -> torch.Tensor:
    return module.weight.T if isinstance(module, Conv1D) else module.weight


class Counted(Silent):
    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, int]]] = {}

    def counter(self, what: str) -> OnProgress:
        return lambda *at: self.steps.setdefault(what, []).append(at)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_block_by_block_is_the_whole_model(save_model, tiny_config, recipe, whole_gradients, tmp_path, kind):
    gpt2 = AutoConfig.for_model("gpt2", **GPT2)
    config = gpt2 if kind == "gpt2" else tiny_config(kind, **(GEMMA if kind == "gemma3_text" else {}))
    folder = save_model(config, tmp_path / "model", seed=3)
    decoder = open_decoder(folder, torch.device("cpu"))
    tokens = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
    linears = {n: m for i in range(len(decoder.blocks)) for n, m in decoder.linears(i).items()}
    method, progress = RTN(bits=2, group=32), Counted()  # the same codes whatever the statistics
    got = sensitivities(
        decoder, recipe(2.0), dict.fromkeys(linears, method), tokens, tmp_path / "scratch",
        progress, Ranks(),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: dense(model.get_submodule(name)).detach().contiguous() for name in linears}
    lost = {name: w - method.quantize(w, None).dequantize() for name, w in weights.items()}
    expected = dict.fromkeys(lost, 0.0)
    for window in whole_gradients(folder, tokens, [*lost]):
        for name, (x, g) in window.items():
            cost = torch.einsum("bto,oi,bti->bt", g, lost[name], x).square().sum().item()
            expected[name] += cost / 2 / tokens.numel()
    assert got.keys() == expected.keys() and min(expected.values()) > 0
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-3), name
    each = [(i + 1, len(decoder.blocks)) for i in range(len(decoder.blocks))]
    assert progress.steps == {
        "what enters the blocks": each,
        "what the model predicts": [(1, 3), (2, 3), (3, 3)],
        "how much each Linear matters": each,
    }
    assert not list(tmp_path.glob("scratch*"))
    assert all(p.is_meta for p in decoder.model.parameters())


def test_it_is_the_divergence_of_the_compensated_weight_to_second_order(source, recipe, tmp_path):
    """Of a small loss, over enough tokens for the draws to average out."""
    decoder, method = open_decoder(source, torch.device("cpu")), Sign(planes=4)
    tokens = torch.randint(96, (40, 32), generator=torch.Generator().manual_seed(1))
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"]
    got = sensitivities(
        decoder, recipe(2.0), dict.fromkeys(names, method), tokens, tmp_path / "scratch", Silent(), Ranks()
    )
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    stats = inputs_of(model, tokens, names)
    with torch.no_grad():
        before = model(tokens).logits.log_softmax(-1)
        for name in names:
            weight = model.get_submodule(name).weight
            kept = weight.clone()
            kl = {}
            for how, known in (("compensated", stats[name]), ("rounded", None)):
                weight.copy_(method.quantize(kept, known).dequantize())
                after = model(tokens).logits.log_softmax(-1)
                weight.copy_(kept)
                kl[how] = (before.exp() * (before - after)).sum(-1).mean().item()
            assert got[name] == pytest.approx(kl["compensated"], rel=0.2), name
            assert abs(got[name] - kl["compensated"]) < abs(got[name] - kl["rounded"]), name


@pytest.mark.parametrize("bits", [1.6, 2.3, 3.7])
def test_bits_go_where_they_matter_and_are_never_more_than_asked_for(source, recipe, tmp_path, bits):
    wanted = recipe(bits)
    compressed = compress(str(source), wanted, tmp_path / "out", device="cpu")
    model = ultralowbit.load(tmp_path / "out")
    packed = {n: m.packed for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    weights = sum(p.shape[0] * p.shape[1] for p in packed.values())
    true_bits = 8 * sum(p.nbytes for p in packed.values()) / weights
    planes = {name: p.format.segments[0].planes for name, p in packed.items()}
    largest_step = 3 * 8 * max(p.shape[0] * (p.shape[1] / 8 + 2) for p in packed.values()) / weights
    assert bits - largest_step < true_bits <= bits and len({*planes.values()}) > 1
    kl = compressed.manifest["allocation"]["kl"]
    per_weight = {name: kl[name] / (p.shape[0] * p.shape[1]) for name, p in packed.items()}
    most, least = max(per_weight, key=per_weight.get), min(per_weight, key=per_weight.get)
    assert planes[most] > planes[least]
    predicted = estimate(str(source), wanted, "cpu", out=tmp_path / "other")
    assert bits - largest_step < predicted.size.linear_bits_per_weight <= bits and predicted.seconds["what matters"] > 0
    assert rerun(tmp_path / "out").different == {}


def test_a_killed_run_measures_once(source, recipe, tmp_path, monkeypatch, dies):
    whole = compress(str(source), recipe(2.2), tmp_path / "whole", device="cpu")

    with dies("ultralowbit.pipeline.stream.BlockStream._commit"):
        compress(str(source), recipe(2.2), tmp_path / "out", device="cpu")
    monkeypatch.setattr("ultralowbit.pipeline.sensitivity.sensitivities", None)  # nobody calls it
    resumed = compress(str(source), recipe(2.2), tmp_path / "out", device="cpu")
    assert resumed.manifest["files"] == whole.manifest["files"]


def test_overrides_keep_their_method_and_count(source, recipe, tmp_path):
    wanted = recipe(2.5, overrides=[{"match": "*.down_proj", "quantize": {"method": "rtn", "bits": 4, "group": 32}}])
    manifest = compress(str(source), wanted, tmp_path / "out", device="cpu").manifest
    layers = manifest["layers"].values()
    weights = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    bits = sum(layer["bits_per_weight"] * n for layer, n in zip(layers, weights, strict=True)) / sum(weights)
    assert 2.0 < bits <= 2.5
    assert "model.layers.0.mlp.down_proj" not in manifest["allocation"]["kl"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["allocation"]["planes"] == 2


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (1.0, {}, r"allocate\.bits, which --bits sets, is 1, and one plane for every Linear takes 1\.\d+ true bits"),
        (8.0, {}, r"is 8, and 4 planes for every Linear take 4\.\d+ true bits .* ask for that at most"),
        (2.0, {"overrides": [{"match": "*", "quantize": {"method": "rtn"}}]}, "no Linear to choose planes for"),
    ],
)
def test_what_cannot_be_allocated_is_refused_before_the_work(source, recipe, tmp_path, bits, values, words):
    with pytest.raises(InputError, match=words):
        compress(str(source), recipe(bits, **values), tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize", [{"method": "gptq", "bits": 2}, {"method": "sign", "planes": 2, "tied": True}])
def test_only_planes_can_be_allocated(recipe, quantize):
    with pytest.raises(ValueError, match="allocate chooses planes"):
        recipe(2.0, quantize=quantize)


def test_the_bound_counts_how_large_outputs_are():
    """Rows that look away from the largest inputs have less energy to lose: the bound is then a larger share of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 64, generator=generator) * torch.linspace(3, 0.1, 64)
    stats = InputStats(64)
    stats.add(x)
    shares = {}
    for name, slope in (("toward", torch.linspace(2, 0.1, 64)), ("away", torch.linspace(0.1, 2, 64))):
        weight = torch.randn(400, 64, generator=generator) * slope
        energy = (x @ weight.T).square().sum()
        isotropic = weight.square().sum() * x.square().sum() / 64
        _, result = quantize_weight(weight, Sign(planes=2), stats)
        shares[name] = result["least_error"]
        expected = least_error(stats.spectrum, result["bits_per_weight"]) * isotropic / energy
        assert result["least_error"] == pytest.approx(expected.item(), rel=1e-3)
    assert shares["away"] > 3 * shares["toward"]
