"""The stages that train: what is packed is what was trained, killed runs go on, and bad settings are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import ultralowbit
from ultralowbit.data.calibration import calibrate
from ultralowbit.errors import InputError, OutOfMemory
from ultralowbit.hub import open_tokenizer
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.source import TextReader, open_decoder
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe
from ultralowbit.training.loop import fit
from ultralowbit.training.specs import CalibrationSpec

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

SCALES = {"lr": {"scale": 1e-2}, "epochs": 3, "batch": 2, "evaluations": 3}
TUNE = {"objective": {"kind": "mse"}, "held_out": 0.2, "training": SCALES}
LATENT = {"training": {"lr": {"latent": 1e-3}, "epochs": 3, "batch": 2, "evaluations": 3}}
DISTILL = {"objective": {"kind": "kl"}, "held_out": 0.2, "training": SCALES}
PB_LLM = {"method": "pb_llm", "salience": "magnitude", "compensation": "none"}
PREPARE = {"rank": 4, "held_out": 0.2, "training": {"lr": {"adapter": 1e-2}, "epochs": 3, "batch": 2}}


@pytest.fixture(scope="module")
def source(tmp_path_factory, save_model) -> Path:
    return save_model(AutoConfig.for_model("llama", **LLAMA), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A local file with something to be learnt."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return str(path)


@pytest.fixture
def recipe(text) -> Callable[..., Recipe]:
    """recipe(stage=..., ...): one sign plane, rounded to nearest, on ten windows of a local text."""

    def make(**values: Any) -> Recipe:
        quantize = {"method": "sign", "damp": 1.0}
        calibration = {"source": text, "samples": 10, "length": 24}
        return Recipe.model_validate({"name": "test", "quantize": quantize, "calibration": calibration} | values)

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def windows(source: Path, recipe: Recipe) -> torch.Tensor:
    spec = recipe.calibration
    return calibrate(
        spec.source, open_tokenizer(source), samples=spec.samples, length=spec.length, seed=spec.seed,
        model_path=source, device=torch.device("cpu"), progress=None,
    ).tokens  # fmt: skip


@torch.no_grad()
def divergence(source: Path, packed: Path, tokens: torch.Tensor) -> float:
    """KL(original || packed), mean nats a position."""
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    models = (original, ultralowbit.load(packed, dtype=torch.float32))
    log_p, log_q = (model(tokens).logits.log_softmax(-1) for model in models)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@torch.no_grad()
def hidden_states(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    return list(model(tokens, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_tuned_blocks_are_nearer_to_the_original(config, source, save_model, recipe, tmp_path):
    """Both objectives of the report are those of the packed blocks, on windows that were held out."""
    if config is GPT2:
        source = save_model(AutoConfig.for_model("gpt2", **GPT2), tmp_path / "gpt2")
    tuned = recipe(blockwise=TUNE)
    plain = compress(str(source), recipe(), tmp_path / "plain")
    result = compress(str(source), tuned, tmp_path / "tuned")
    reports = list(result.manifest["blockwise"].values())
    assert len(reports) == 2
    assert all(r["after"] < r["before"] for r in reports)
    assert plain.manifest["layers"].keys() == result.manifest["layers"].keys()
    for name, layer in result.manifest["layers"].items():  # the error is that of what was packed
        before = plain.manifest["layers"][name]
        assert layer["trained"] and layer["error"] > 0 and "trained" not in before
        # sums over other batches
        assert ".0." not in name or layer["error"] == pytest.approx(before["error"], rel=1e-5)

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    packed = ultralowbit.load(tmp_path / "tuned", dtype=torch.float32)
    held_out = windows(source, tuned)[8:]
    # block 0: both streams feed it the same, so that its objective is twice the error of its outputs
    ours, theirs = (hidden_states(model, held_out)[1] for model in (packed, original))
    assert 2 * (ours - theirs).square().mean().item() == pytest.approx(reports[0]["after"], rel=1e-4)


@pytest.mark.parametrize(("batch", "real"), [(3, 2), (7, 5), (2, 2), (99, 10)])
def test_a_batch_that_does_not_divide_the_windows_is_told(source, recipe, tmp_path, monkeypatch, batch, real):
    lines = []
    monkeypatch.setattr(Silent, "say", lambda self, line: lines.append(line))
    uneven = recipe(blockwise=TUNE | {"training": SCALES | {"batch": batch, "steps": 1}})
    planned = estimate(str(source), uneven, "cpu").notes
    compress(str(source), uneven, tmp_path / "out")
    asked = f"blocks are trained on {real} of the 10 windows at a time, not on blockwise.training.batch = {batch}"
    said = [[line for line in told if line.startswith(asked)] for told in (planned, lines)]
    assert [len(told) for told in said] == [batch in (3, 7)] * 2


def test_codes_stay_where_only_scales_are_trained(source, recipe, tmp_path):
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    compress(str(source), recipe(), plain)
    compress(str(source), recipe(blockwise=TUNE), tuned)
    before, after = tensors(plain), tensors(tuned)
    first = [name for name in before if "layers.0" in name and name.endswith("proj.weight")]
    assert len(first) == 7 and all(torch.equal(before[name], after[name]) for name in first)
    assert not any(torch.equal(before[f"{name}_scale"], after[f"{name}_scale"]) for name in first)
    others = [name for name in before if "proj" not in name]
    assert all(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("objective", [{"kind": "kl"}, {"kind": "dad"}, {"kind": "ce"}, {"kind": "lowrank"}])
def test_distilling_lowers_the_objective_of_the_packed_model(source, recipe, tmp_path, objective):
    distilled = recipe(finetune=DISTILL | {"objective": objective})
    result = compress(str(source), distilled, tmp_path / "out")
    report = result.manifest["finetune"]
    assert report["after"] < report["before"]
    assert all(layer["trained"] and layer["error"] > 0 for layer in result.manifest["layers"].values())
    if objective["kind"] == "kl":
        kl = divergence(source, result.folder, windows(source, distilled)[8:])
        assert kl == pytest.approx(report["after"], rel=1e-4)


@pytest.mark.parametrize(
    "quantize, training, scales",
    [
        (
            {"method": "pb_llm", "ratio": 0.1, "salience": "magnitude", "compensation": "none"},
            {"latent": 1e-3},
            "analytic",
        ),
        ({"method": "db_llm", "group": 32}, {"scale": 1e-3}, "free"),
        ({"method": "sign", "planes": 2}, {"latent": 1e-3, "scale": 1e-3}, "free"),
        ({"method": "gptq", "bits": 2, "group": 32}, {"scale": 1e-3}, "free"),
    ],
    ids=["pb-llm", "db-llm", "sign-2", "gptq-2"],
)
def test_every_format_that_can_be_trained_is(source, recipe, tmp_path, quantize, training, scales):
    stage = {"objective": {"kind": "kl"}, "scales": scales, "training": SCALES | {"lr": training}}
    result = compress(str(source), recipe(quantize=quantize, finetune=stage), tmp_path / "out")
    report = result.manifest["finetune"]
    assert report["after"] < report["before"]
    packed = [m for m in ultralowbit.load(tmp_path / "out").modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 14


def test_preprocessing_restores_before_it_quantizes(source, recipe, tmp_path):
    """The adapters lower the loss of the quantized model; what is quantized in the end is the model with them merged,
    of which only the Linears differ from the original."""
    result = compress(str(source), recipe(preprocess=PREPARE), tmp_path / "out")
    plain = compress(str(source), recipe(), tmp_path / "plain")
    report = result.manifest["preprocess"]
    assert report["after"] < report["before"]
    ours, theirs = tensors(result.folder), tensors(plain.folder)
    assert ours.keys() == theirs.keys()
    differ = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differ and all("proj" in name for name in differ)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]


def test_a_model_that_writes_its_own_text_may_run_its_code_where_that_is_trusted(source, monkeypatch):
    load, trusted = AutoModelForCausalLM.from_pretrained, []

    def watched(*args: Any, trust_remote_code: bool, **kwargs: Any) -> Any:
        trusted.append(trust_remote_code)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    for trust in (False, True):
        reader = TextReader(source, open_decoder(source, torch.device("cpu")), trust, Silent())
        reader.read(CalibrationSpec(source="self", samples=1, length=4))
    assert trusted == [False, True]


def test_targets_that_match_nothing_cost_nothing(source, recipe, tmp_path):
    """A corrected recipe needs no --restart: nothing was begun."""
    with pytest.raises(InputError, match=r"preprocess.targets \['\*dense'\] match no Linear"):
        compress(str(source), recipe(preprocess=PREPARE | {"targets": ["*dense"]}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Stop(Silent):
    """Ends the run at the n-th step of a stage."""

    def __init__(self, stage: str, n: int) -> None:
        self.stage, self.left, self.current = stage, n, ""

    def start(self, what: str, total: int) -> None:
        self.current = what

    def step(self, n: int = 1) -> None:
        if self.current.startswith(self.stage):
            self.left -= n
            if self.left <= 0:
                raise KeyboardInterrupt

    def say(self, line: str) -> None: ...


@pytest.mark.parametrize(
    "stage, stop, steps",
    [
        ({"blockwise": TUNE}, "blocks", (1, 5, 9)),
        ({"finetune": DISTILL}, "fine-tuning", (1, 7)),
        ({"finetune": DISTILL | {"training": SCALES | {"lr": {"scale": 1e-2, "norm": 1e-2}}}}, "fine-tuning", (7,)),
        ({"preprocess": PREPARE}, "training adapters", (1, 7)),
        ({"preprocess": PREPARE}, "blocks", (2, 3)),
    ],
    ids=["blockwise", "finetune", "norms", "adapters", "after-adapters"],
)
def test_an_interrupted_stage_ends_with_the_same_bytes(source, recipe, tmp_path, monkeypatch, stage, stop, steps):
    whole = compress(str(source), recipe(**stage), tmp_path / "whole")
    monkeypatch.setitem(fit.__kwdefaults__, "save_seconds", 0.0)
    for n in steps:
        with pytest.raises(KeyboardInterrupt):
            compress(str(source), recipe(**stage), tmp_path / "out", progress=Stop(stop, n))
    result = compress(str(source), recipe(**stage), tmp_path / "out")
    expected, resumed = tensors(whole.folder), tensors(result.folder)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    "stage, stop, key",
    [
        ({"blockwise": TUNE}, "blocks", "model.layers.0"),
        ({"finetune": DISTILL}, "fine-tuning", "finetune"),
        ({"preprocess": PREPARE}, "training adapters", "preprocess"),
        ({"preprocess": PREPARE}, "blocks", "preprocess"),  # once the adapters are merged
    ],
    ids=["blockwise", "finetune", "adapters", "after-adapters"],
)
def test_the_seconds_of_killed_runs_count(source, recipe, tmp_path, monkeypatch, stage, stop, key):
    """By a clock of which every reading takes a second."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), perf_counter=lambda: float(next(ticks)))
    for module in ("training.loop", "training.preprocess", "pipeline.compress", "pipeline.stream"):
        monkeypatch.setattr(f"ultralowbit.{module}.time", clock)
    monkeypatch.setitem(fit.__kwdefaults__, "save_seconds", 0.0)
    once = compress(str(source), recipe(**stage), tmp_path / "once").manifest["block_seconds"][key]
    with pytest.raises(KeyboardInterrupt):
        compress(str(source), recipe(**stage), tmp_path / "out", progress=Stop(stop, 7 if stop != "blocks" else 3))
    again = compress(str(source), recipe(**stage), tmp_path / "out").manifest["block_seconds"][key]
    assert again >= once - 4  # all but what was done after the last saved state


class Disk(Silent):
    """Notes how much lies in a work folder at every step."""

    def __init__(self, work: Path) -> None:
        self.work, self.most = work, 0

    def step(self, n: int = 1) -> None:
        sizes = [path.stat().st_size for path in self.work.rglob("*") if path.is_file()]
        self.most = max(self.most, sum(sizes))


@pytest.mark.parametrize(
    "stage",
    [{}, {"blockwise": TUNE}, {"finetune": DISTILL}, {"finetune": DISTILL | LATENT}, {"preprocess": PREPARE}],
    ids=["packing", "blockwise", "scales", "latents", "adapters"],
)
def test_the_disk_that_is_expected_is_enough_and_not_far_too_much(source, recipe, tmp_path, monkeypatch, stage):
    monkeypatch.setitem(fit.__kwdefaults__, "save_seconds", 0.0)
    planned = estimate(str(source), recipe(**stage), "cpu", out=tmp_path)
    disk = Disk(tmp_path / "out.work")
    compress(str(source), recipe(**stage), tmp_path / "out", device="cpu", progress=disk)
    assert disk.most <= sum(planned.disk.values()) <= 2 * disk.most


@pytest.mark.parametrize(
    "stage, where, keys",
    [
        ({"blockwise": TUNE}, "blockwise.train_block", "--set blockwise.training.batch=1"),
        ({"finetune": DISTILL}, "finetune.fit", "--set finetune.checkpointing=true --set finetune.training.batch=1"),
        ({"preprocess": PREPARE}, "preprocess.fit", "--set preprocess.checkpointing=true"),
        ({}, "blocks", "--restart and a smaller --length"),
    ],
    ids=["blockwise", "finetune", "preprocess", "packing"],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_memory_that_runs_out_names_the_keys_of_the_stage(
    source, recipe, tmp_path, monkeypatch, stage, where, keys, error
):
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    places = {"blocks": "pipeline.stream.quantize_weight", "blockwise.train_block": "pipeline.stream.train_block"}
    monkeypatch.setattr(f"ultralowbit.{places.get(where, f'training.{where}')}", full)
    with pytest.raises(OutOfMemory) as raised:
        compress(str(source), recipe(**stage), tmp_path / "out", device="cpu")
    said = str(raised.value)
    assert said.startswith("out of memory while ") and str(source) in said and keys in said and "\n" not in said
    assert "--device cpu" not in said and not (tmp_path / "out").exists()
    monkeypatch.undo()
    compress(str(source), recipe(**stage), tmp_path / "out", device="cpu")  # nothing is lost


def test_another_text_to_train_on_is_another_run(source, recipe, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[::-1])
    compress(str(source), recipe(finetune=DISTILL), tmp_path / "out")
    data = {"source": str(other), "samples": 10, "length": 24}
    with pytest.raises(InputError, match="different"):
        compress(str(source), recipe(finetune=DISTILL | {"data": data}), tmp_path / "out")
    fingerprint = json.loads((tmp_path / "out/manifest.json").read_text())["fingerprint"]
    assert set(fingerprint["calibration"]) == {"sha256", "finetune sha256"}


def test_windows_that_judge_the_training_are_not_packed_from(source, recipe, tmp_path, text):
    """Unless that is another text's windows, or blocks are trained, which read all."""
    spoils = {"training": SCALES | {"lr": {"scale": 1e3}}}
    calibration, judged, packed = recipe().calibration.model_dump(), DISTILL | spoils, {}

    def run(name: str, samples: int = 10, **values: Any) -> dict[str, Any]:
        asked = recipe(calibration=calibration | {"samples": samples}, output_feedback={}, **values)
        planned = estimate(str(source), asked, device="cpu").disk["activation files"]
        result = compress(str(source), asked, tmp_path / name, device="cpu")
        packed[name] = tensors(result.folder)
        assert result.manifest.get("finetune", {"best_step": 0})["best_step"] == 0
        return result.manifest["calibration"] | {"files": planned // (5 if "blockwise" in values else 2)}

    def same(one: str, other: str) -> bool:
        return all(torch.equal(t, packed[other][name]) for name, t in packed[one].items())

    ten, eight = run("ten"), run("eight", 8)
    own = judged | {"data": {"source": text, "samples": 10, "length": 24}}
    assert run("judged", finetune=judged) == eight and same("judged", "eight")
    assert run("other text", finetune=own) == ten and same("other text", "ten")
    assert run("blocks", finetune=judged, blockwise=TUNE | spoils) == ten and same("blocks", "ten")
    assert not same("ten", "eight") and (eight["samples"], eight["tokens"]) == (8, 8 * 24)


def test_windows_of_several_texts_are_those_of_each_in_turn(source, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[::-1])
    reader = TextReader(source, open_decoder(source, torch.device("cpu")), False, Silent())
    read = lambda texts, samples: reader.read(CalibrationSpec(source=texts, samples=samples, length=24))  # noqa: E731
    mixed, first, second = read({text: 3, str(other): 1}, 8), read(text, 6), read(str(other), 2)
    assert torch.equal(mixed.tokens[[0, 1, 3, 4, 5, 7]], first.tokens)
    assert torch.equal(mixed.tokens[[2, 6]], second.tokens)
    assert mixed.source == f"{text} (75 %) and {other} (25 %)"


@pytest.mark.parametrize(
    "stage, words",
    [
        ({"blockwise": TUNE | {"training": {"lr": {"offset": 1e-3}}}}, "x1sign/row has none of what is to be trained"),
        (
            {"finetune": DISTILL | {"training": {"lr": {"column": 1e-3}}}},
            "x1sign/row has none of what is to be trained",
        ),
        (
            {"blockwise": TUNE | {"training": {"lr": {"scale": 1, "column": 1}}}},
            "blockwise.training.lr has a rate for c",
        ),
        (
            {"finetune": DISTILL | {"training": {"lr": {"row": 1, "offset": 1}}}},
            "finetune.training.lr has a rate for o",
        ),
        (
            {"finetune": DISTILL | {"scales": "analytic", "training": {"lr": {"latent": 1, "scale": 1}}}},
            "finetune.training.lr has a rate for scale",
        ),
        ({"blockwise": TUNE | {"scales": "analytic"}}, "blockwise has nothing to train: analytic scales need"),
    ],
    ids=["no offset", "no column", "one too many", "another too many", "analytic scales", "analytic without latent"],
)
def test_rates_for_what_no_linear_has_are_refused_before_the_work(source, recipe, tmp_path, stage, words):
    with pytest.raises(InputError, match=words):
        compress(str(source), recipe(**stage), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["preprocess", "blockwise", "finetune"])
def test_rates_of_kinds_that_do_not_exist_are_refused(recipe, stage):
    values = {"preprocess": PREPARE, "blockwise": TUNE, "finetune": DISTILL}[stage]
    with pytest.raises(ValueError, match="lr names 'foo', expected some of"):
        recipe(**{stage: values | {"training": {"lr": {"foo": 1e-3}}}})


@pytest.mark.parametrize(
    "rest",
    [{"ignore": ["*.1.*"]}, {"overrides": [{"match": "*.1.*", "quantize": {"method": "billm", "block": 32}}]}],
    ids=["skipped", "of a format that is not trained"],
)
def test_a_block_without_anything_to_train_is_passed_over(source, recipe, tmp_path, rest):
    result = compress(str(source), recipe(blockwise=TUNE, finetune=DISTILL, **rest), tmp_path / "out")
    assert result.manifest["blockwise"].keys() == {"model.layers.0"}
    ultralowbit.load(result.folder)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_light_form_trains_scales_norms_and_biases(config, dtype, save_model, recipe, tmp_path, text):
    """What is stored is what was judged: values of the files' dtype; codes and all else stay as they are."""
    kind = "llama" if config is LLAMA else "gpt2"
    source = save_model(AutoConfig.for_model(kind, **config), tmp_path / "model", dtype=dtype)
    rates = {"scale": 1e-2, "norm": 1e-2} | ({"bias": 1e-2} if config is GPT2 else {})
    data = {"source": text, "samples": 10, "length": 24}
    light = recipe(finetune=DISTILL | {"training": SCALES | {"lr": rates}, "data": data})
    plain = compress(str(source), recipe(), tmp_path / "plain")
    result = compress(str(source), light, tmp_path / "out")
    report = result.manifest["finetune"]
    assert report["after"] < report["before"]
    before, after = tensors(plain.folder), tensors(result.folder)
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    vectors = {name for name in before if "norm" in name or ".ln_" in name or (name.endswith(".bias"))}
    assert len(vectors) == (5 if config is LLAMA else 18) and vectors <= changed
    assert all(name in vectors or name.endswith("_scale") for name in changed)
    kl = divergence(source, result.folder, windows(source, light)[8:])
    assert kl == pytest.approx(report["after"], rel=1e-4)


def test_norms_alone_can_be_trained(source, recipe, tmp_path):
    """Also under formats that have nothing to train, and with nothing of their own that a rate could be for."""
    stage = DISTILL | {"training": SCALES | {"lr": {"norm": 1e-2}}}
    packed_only = {"method": "billm", "block": 32}
    result = compress(str(source), recipe(quantize=packed_only, finetune=stage), tmp_path / "out")
    assert result.manifest["finetune"]["after"] < result.manifest["finetune"]["before"]
    with pytest.raises(InputError, match=r"training\.lr has a rate for bias, of which the model has nothing to train"):
        compress(str(source), recipe(finetune=DISTILL | {"training": {"lr": {"scale": 1, "bias": 1}}}), tmp_path / "no")
    with pytest.raises(ValueError, match="lr names 'norm', expected some of scale"):
        recipe(blockwise=TUNE | {"training": {"lr": {"norm": 1e-3}}})


def test_training_that_makes_nothing_better_changes_nothing(source, recipe, tmp_path):
    """A rate so large that the first step spoils all."""
    stage = {"training": SCALES | {"lr": {"scale": 1e3}}}
    plain = compress(str(source), recipe(), tmp_path / "plain")
    result = compress(str(source), recipe(blockwise=TUNE | stage, finetune=DISTILL | stage), tmp_path / "out")
    assert result.manifest["finetune"]["best_step"] == 0
    assert result.manifest["finetune"]["after"] == result.manifest["finetune"]["before"]
    expected, resumed = tensors(plain.folder), tensors(result.folder)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    errors = [[layer["error"] for layer in r.manifest["layers"].values()] for r in (plain, result)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)  # in sums over other batches


def test_the_teacher_is_the_model_that_was_hashed(source, recipe, tmp_path):
    """Pickled weights beside the safetensors, of another model, are nobody's."""
    other = Path(shutil.copytree(source, tmp_path / "model"))
    weights = {name: torch.zeros_like(tensor) for name, tensor in tensors(source).items()}
    torch.save(weights, other / "pytorch_model.bin")
    taught = compress(str(source), recipe(finetune=DISTILL), tmp_path / "out")
    beside = compress(str(other), recipe(finetune=DISTILL), tmp_path / "beside")
    report = taught.manifest["finetune"]
    assert report["after"] < report["before"]
    assert beside.manifest["fingerprint"] == taught.manifest["fingerprint"]
    assert beside.manifest["files"] == taught.manifest["files"]
