"""Mixtures of experts through the whole pipeline: packed expert by expert, loaded, gone on with, refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import ultralowbit
from ultralowbit.checkpoint.activations import Activations
from ultralowbit.checkpoint.config import TENSORS_DIGEST
from ultralowbit.checkpoint.files import Source, read_metadata
from ultralowbit.checkpoint.names import expert_linear, expert_of
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.checkpoint.storage import raise_disk_full, sha256_file
from ultralowbit.cli.app import app
from ultralowbit.data.calibration import calibrate
from ultralowbit.errors import CheckpointError, DiskFull, InputError
from ultralowbit.export.base import export
from ultralowbit.hub import open_tokenizer
from ultralowbit.nn.experts import Experts
from ultralowbit.nn.hf_names import experts_layout
from ultralowbit.pipeline import experts, stream
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.source import open_decoder, planned_formats
from ultralowbit.pipeline.verify import verify
from ultralowbit.pipeline.workload import Workload
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe

TOKENS = torch.arange(2, 26)[None]
METHOD = {"method": "gptq", "bits": 4, "group": 32}


@pytest.fixture
def recipe(text):
    """recipe(**keys): GPTQ on a little text."""
    calibration = {"source": text, "samples": 6, "length": 32}
    return lambda **keys: Recipe.model_validate(
        {"name": "experts", "quantize": METHOD, "calibration": calibration} | keys
    )


@pytest.fixture
def source(save_model, mixture_config, mixture_kind, tmp_path) -> Path:
    return save_model(mixture_config(mixture_kind), tmp_path / "source")


@pytest.fixture
def mixtral(save_model, mixture_config, tmp_path) -> Path:
    return save_model(mixture_config("mixtral"), tmp_path / "source")


def mixtures(model) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if experts_layout(m) is not None or isinstance(m, Experts)}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def test_every_kind_is_packed_loaded_and_unpacked(source, recipe, tmp_path):
    out = ultralowbit.compress(str(source), recipe(), tmp_path / "out").folder
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model = ultralowbit.load(out)
    packed = {n for n, m in model.named_modules() if hasattr(m, "format")}
    for name, mixture in mixtures(original).items():
        projections = experts_layout(mixture).projections
        assert {f"{name}.{expert_linear(e, p)}" for e in range(4) for p in projections} <= packed
    # what routes, and every norm and bias, is as it was
    state = original.state_dict()
    kept = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in packed and t.numel()}
    assert any("gate" in n or "router" in n for n in kept) and all(torch.equal(t, state[n]) for n, t in kept.items())
    assert not {n for n in packed if n.endswith(("shared_expert_gate", ".gate", ".router"))}
    # all weights are counted, those of all experts too
    size = measure_size(out)
    assert size.total_weights == sum(t.numel() for t in state.values())
    assert size.linear_weights / size.total_weights > 0.7 and 4 < size.linear_bits_per_weight < 5.5
    assert verify(out) == []
    dense = ultralowbit.load(out).dequantize()
    assert type(dense) is type(original) and mixtures(dense).keys() == mixtures(original).keys()
    expected = logits(dense)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert torch.equal(model.generate(TOKENS, max_new_tokens=4), dense.generate(TOKENS, max_new_tokens=4))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


def test_what_save_pretrained_and_the_exporter_write_means_the_same(source, recipe, tmp_path):
    out = ultralowbit.compress(str(source), recipe(), tmp_path / "out").folder
    model = ultralowbit.load(out)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ultralowbit.load(tmp_path / "again")), logits(model))
    export(out, "dense", tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(plain), logits(ultralowbit.load(out).dequantize()))
    with pytest.raises(InputError, match="gguf does not know the architecture"):
        export(out, "gguf", tmp_path / "out.gguf")


def test_fusing_leaves_experts_as_they_are(source, recipe, tmp_path):
    out = ultralowbit.compress(str(source), recipe(), tmp_path / "out").folder
    model, together = ultralowbit.load(out), ultralowbit.load(out, fuse=True)
    expected = logits(model)
    assert torch.allclose(logits(together), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert mixtures(together).keys() == mixtures(model).keys()


def test_every_method_packs_experts_and_stages_that_train_say_that_they_do_not(
    recipe_kind, short, save_model, mixture_config, tmp_path
):
    folder, spec = save_model(mixture_config("gpt_oss"), tmp_path / "source"), short(recipe_kind)
    trained = [s for s in ("preprocess", "blockwise", "finetune") if getattr(spec, s) is not None]
    if trained:
        with pytest.raises(InputError, match=f"the stage {trained[0]} of recipe {spec.name} cannot run on a mixture"):
            ultralowbit.compress(str(folder), spec, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()
        return
    done = ultralowbit.compress(str(folder), spec, tmp_path / "out")
    assert not done.fallbacks
    expected = logits(ultralowbit.load(done.folder).dequantize())
    assert torch.allclose(logits(ultralowbit.load(done.folder)), expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_products_of_experts_may_be_made_in_bfloat16(source, text, tmp_path):
    """With every part of our own recipe."""
    few = [f"calibration.source={text}", "calibration.samples=4", "calibration.length=32", "allocate.bits=2.5"]
    compress(str(source), Recipe.load("ulb-fast", [*few, "calibration.autocast=on"]), tmp_path / "out")
    assert logits(ultralowbit.load(tmp_path / "out")).isfinite().all()


def measured(monkeypatch) -> dict[str, tuple[int, torch.Tensor]]:
    """Linear -> how many tokens its Hessian is of, and the Hessian; filled by `compress`."""
    seen = {}
    pack = stream.BlockStream._pack_linear

    def note(self, name, linear, stats, outputs):
        seen[name] = stats.count, stats.hessian.clone()
        return pack(self, name, linear, stats, outputs)

    monkeypatch.setattr(stream.BlockStream, "_pack_linear", note)
    return seen


@torch.no_grad()
def test_an_expert_is_measured_on_the_tokens_that_the_router_gives_it(source, recipe, tmp_path, monkeypatch):
    seen = measured(monkeypatch)
    done = ultralowbit.compress(str(source), recipe(ignore=["*self_attn*", "model.layers.0.*"]), tmp_path / "out")
    monkeypatch.undo()
    tokens = calibration_tokens(recipe(), source)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager").eval()
    name, module = [*mixtures(original).items()][-1]
    given = []
    module.register_forward_pre_hook(lambda _, args: given.append(args[:2]))
    original(tokens)
    ((hidden, routed),) = given
    for e in range(4):
        count, hessian = seen[f"{name}.{expert_linear(e, experts_layout(module).projections[0])}"]
        x = hidden[(routed == e).any(-1)]
        assert 16 < count == len(x) < tokens.numel()
        assert torch.allclose(hessian, x.T @ x, rtol=0, atol=1e-5 * hessian.abs().max())
        assert seen[f"{name}.{expert_linear(e, 'down_proj')}"][0] == count
    assert not any(layer["notes"] for layer in done.manifest["layers"].values())


def calibration_tokens(spec: Recipe, folder: Path) -> torch.Tensor:
    wanted = spec.calibration
    tokenizer = open_tokenizer(folder)
    return calibrate(wanted.source, tokenizer, samples=wanted.samples, length=wanted.length, seed=wanted.seed).tokens


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_an_expert_without_tokens_is_measured_on_all_and_named(
    save_model, mixture_config, recipe, tmp_path, monkeypatch
):
    folder = save_model(mixture_config("gpt_oss"), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.router.bias"][2] = -100.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seen, progress = measured(monkeypatch), Said()
    done = ultralowbit.compress(str(folder), recipe(), tmp_path / "out", progress=progress)
    assert not done.fallbacks
    for projection in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{expert_linear(2, projection)}"
        layer = done.manifest["layers"][name]
        assert "the router gave it 0 of 192 calibration tokens: measured on all of them" in layer["notes"]
        assert seen[name][0] == 192 and layer["error"] < 0.2
    assert [n for n, layer in done.manifest["layers"].items() if layer["notes"]] == [
        f"model.layers.1.mlp.experts.{expert_linear(2, p)}" for p in ("gate_up_proj", "down_proj")
    ]
    assert "model.layers.1.mlp.experts: too few tokens for expert 2, measured on all tokens" in progress.lines


def test_a_killed_job_goes_on_to_the_same_bytes(source, recipe, tmp_path, monkeypatch):
    whole = ultralowbit.compress(str(source), recipe(), tmp_path / "whole").folder
    write = stream.BlockStream._commit

    def killed(self, i, seconds):
        write(self, i, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(stream.BlockStream, "_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        ultralowbit.compress(str(source), recipe(), tmp_path / "killed")
    monkeypatch.undo()
    progress = Said()
    again = ultralowbit.compress(str(source), recipe(), tmp_path / "killed", progress=progress).folder
    assert "going on after block 0, where the last run stopped" in progress.lines
    assert sha256_file(again / "model.safetensors") == sha256_file(whole / "model.safetensors")


STAGES = {
    "plain": {},
    "corrected": {"error_correction": {}},
    "allocated": {"quantize": {"method": "sign", "planes": 2}, "allocate": {"bits": 2.5, "windows": 4}},
}
"""What else reads what experts are given."""


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_a_few_at_a_time_become_the_bytes_of_all_at_once(
    save_model, mixture_config, recipe, tmp_path, monkeypatch, kind, stages
):
    folder, spec = save_model(mixture_config(kind), tmp_path / "source"), recipe(**STAGES[stages])
    monkeypatch.setattr("ultralowbit.pipeline.source.BATCH_TOKENS", 64)  # three batches, a lane each
    whole = ultralowbit.compress(str(folder), spec, tmp_path / "whole").folder
    groups, runs = [], []
    sums, run = experts.Mixture.statistics, experts.run_block

    def counted(self, members, *rest):
        for stats in sums(self, members, *rest):
            groups.append([*stats])
            yield stats

    monkeypatch.setattr(experts, "AT_ONCE", 1)
    monkeypatch.setattr(experts.Mixture, "statistics", counted)
    monkeypatch.setattr(experts, "run_block", lambda *args: runs.append(args) or run(*args))
    few = ultralowbit.compress(str(folder), spec, tmp_path / "few").folder
    assert groups == [[e] for e in range(4)] * (len(groups) // 4)
    mixtures = len(groups) // 8  # each with two projections
    # a run of the block for each batch of each mixture, in the original too; sensitivities have windows for batches
    assert len(runs) == {"plain": 3, "corrected": 6, "allocated": (3 + 4) / 2}[stages] * mixtures
    assert mixtures == {"plain": 2, "corrected": 2, "allocated": 4}[stages]
    assert sha256_file(few / "model.safetensors") == sha256_file(whole / "model.safetensors")


def test_a_job_that_is_killed_between_experts_goes_on_to_the_same_bytes(mixtral, recipe, tmp_path, monkeypatch):
    whole = ultralowbit.compress(str(mixtral), recipe(), tmp_path / "whole").folder
    monkeypatch.setattr(experts, "AT_ONCE", 1)
    done = []
    remove = experts.Given.remove

    def killed_in_the_second_block(self):
        done.append(self)
        if len(done) == 2:
            raise KeyboardInterrupt
        remove(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(experts.Given, "remove", killed_in_the_second_block)
        ultralowbit.compress(str(mixtral), recipe(), tmp_path / "killed")
    left = [path.name for path in (tmp_path / "killed.work").glob("experts.*")]
    assert left == ["experts.0.bin"]
    again = ultralowbit.compress(str(mixtral), recipe(), tmp_path / "killed").folder
    assert sha256_file(again / "model.safetensors") == sha256_file(whole / "model.safetensors")
    assert not (tmp_path / "killed.work").exists()


def test_no_room_for_what_experts_are_given_is_one_sentence(mixtral, recipe, tmp_path, monkeypatch):
    reserve = Activations._reserve

    def full(self, lane):
        if self.path.name != "experts":
            return reserve(self, lane)
        raise_disk_full(OSError(errno.ENOSPC, "full"), self.file(lane))

    with monkeypatch.context() as patched:
        patched.setattr(Activations, "_reserve", full)
        with pytest.raises(DiskFull, match=r"no space left to write .*experts.0.bin: make room, then run the same"):
            ultralowbit.compress(str(mixtral), recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert ultralowbit.compress(str(mixtral), recipe(), tmp_path / "out").folder.exists()


def test_the_plan_counts_what_experts_are_given(save_model, mixture_config, tiny_config, mixtral, recipe, tmp_path):
    dense = save_model(tiny_config(num_hidden_layers=2), tmp_path / "dense")
    activations = 6 * 32 * 64 * 4
    files = {"plain": (2, 3), "corrected": (4, 6)}
    for stages, counts in files.items():
        planned = [estimate(str(folder), recipe(**STAGES[stages]), device="cpu") for folder in (dense, mixtral)]
        assert [p.disk["activation files"] for p in planned] == [n * activations for n in counts]
    # of each of the two blocks q, k, v and o once more, however few experts are measured at a time
    decoder = open_decoder(mixtral, torch.device("cpu"))
    work = Workload(decoder, recipe(), planned_formats(decoder, recipe()))
    assert work.again == 2 * (2 * 64 * 64 + 2 * 32 * 64)


FEW = """
import sys
from ultralowbit.cli.app import main
from ultralowbit.pipeline import experts

experts.AT_ONCE = int(sys.argv.pop(1))
main()
"""


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(forked, save_model, mixture_config, text, tmp_path):
    """However many experts are measured at a time."""
    folder = save_model(mixture_config("qwen3_moe", num_experts=6), tmp_path / "source")
    script = tmp_path / "few.py"
    script.write_text(FEW)
    digests = set()
    for n, at_once in ((1, experts.AT_ONCE), (2, 3 * 8 * 64**2)):
        texts = ["--calib", text, "--samples", "12", "--length", "24", "--eval", "none", "--quiet", "--device", "cpu"]
        out = tmp_path / str(n)
        command = [str(script), str(at_once), "compress", str(folder), "--recipe", "sign-2", "--out", str(out), *texts]
        code, printed = forked(n, command)
        assert code in (0, 3), printed[-2000:]
        digests.add(sha256_file(out / "model.safetensors"))
    assert len(digests) == 1


def test_transformers_alone_does_not_make_up_experts(source, recipe, tmp_path):
    """Where nothing but experts is packed, no Linear of another shape stops it."""
    decoder = open_decoder(source, torch.device("cpu"))
    others = [n for i in range(len(decoder.blocks)) for n in decoder.shapes(i) if expert_of(n) is None]
    out = ultralowbit.compress(str(source), recipe(ignore=others), tmp_path / "out").folder
    assert all(
        expert_of(name) for name in json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    )
    expected = logits(ultralowbit.load(out))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
    ultralowbit.load(out).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ultralowbit.load(tmp_path / "again")), expected)
    for folder in (out, tmp_path / "again"):
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_inspect_has_a_line_for_the_experts_of_a_projection(mixtral, recipe, tmp_path):
    out = ultralowbit.compress(str(mixtral), recipe(), tmp_path / "out").folder
    shown = CliRunner().invoke(app, ["inspect", str(out)], env={"COLUMNS": "160"}).output
    assert shown.count("model.layers.0.mlp.experts.*.packed_down_proj") == 1 and "4x64x96" in shown
    assert "experts.1." not in shown


def test_compiled_steps_are_refused(mixtral, recipe, tmp_path):
    out = ultralowbit.compress(str(mixtral), recipe(), tmp_path / "out").folder
    with pytest.raises(InputError, match="is a mixture of experts, whose steps are not compiled yet: load it without"):
        ultralowbit.load(out, compile=True)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_experts_that_are_left_out_in_part_are_refused(mixtral, recipe, tmp_path):
    with pytest.raises(InputError, match=r"ignore leaves out .*experts.2.packed_gate_up_proj but not all experts"):
        ultralowbit.compress(str(mixtral), recipe(ignore=["*experts.2.*"]), tmp_path / "out")


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_source_whose_experts_do_not_fit_together_is_named(mixtral, recipe, tmp_path, fault):
    key = next(key for key in Source(mixtral).specs if "experts.2.w1" in key)
    tensors = load_file(mixtral / "model.safetensors")
    tensors[key] = tensors[key][:-1].contiguous()
    if fault == "missing":
        del tensors[key]
    save_file(tensors, mixtral / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensors of .* that make .*experts.gate_up_proj do not fit together"):
        ultralowbit.compress(str(mixtral), recipe(), tmp_path / "out")


def test_a_checkpoint_without_one_expert_does_not_load(mixtral, recipe, tmp_path):
    out = ultralowbit.compress(str(mixtral), recipe(), tmp_path / "out").folder
    config = json.loads((out / "config.json").read_text())
    name = next(n for n in config["quantization_config"]["modules"] if "experts.3" in n)
    tensors = load_file(out / "model.safetensors")
    del tensors[f"{name}.weight"]
    metadata = read_metadata(out / "model.safetensors")
    del metadata[TENSORS_DIGEST]
    save_file(tensors, out / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=f"{name}.weight is missing"):
        ultralowbit.load(out)
