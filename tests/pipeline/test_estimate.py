"""The plan's sizes are what compress then writes, to the byte; its estimates are sane."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PhiConfig

from ultralowbit.bench.models import Shape, write_headers, write_model, write_text
from ultralowbit.bench.scale import Card
from ultralowbit.checkpoint.config import DIGEST, config_digest
from ultralowbit.checkpoint.merge import most_beside
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.errors import InputError
from ultralowbit.nn.experts import ExpertLinear
from ultralowbit.nn.inputs import shared_inputs
from ultralowbit.pipeline.compress import compress
from ultralowbit.pipeline.embed import planned_embeddings
from ultralowbit.pipeline.estimate import estimate, planned_size, planned_tensors
from ultralowbit.pipeline.rates import Rates, measured_rates, seconds
from ultralowbit.pipeline.source import open_decoder, planned_formats
from ultralowbit.pipeline.workload import Workload
from ultralowbit.recipe import Recipe, shipped
from ultralowbit.training.specs import Finetune

SHAPE = Shape(hidden=64, inter=172, heads=4, kv_heads=2, vocab=96)
RECIPES = {
    "pb_llm": {"quantize": {"method": "pb_llm"}},
    "gptq": {"quantize": {"method": "gptq", "bits": 2}},
    "ptq161": {"quantize": {"method": "ptq161"}},
    "ptq161-mixed": {
        "quantize": {"method": "ptq161", "compensation": "gptq"},
        "overrides": [{"match": "*.o_proj", "quantize": {"method": "ptq161"}}],
    },
    "rtn": {"quantize": {"method": "rtn", "bits": 3, "group": None, "symmetric": True}},
    "sign": {"quantize": {"method": "sign", "planes": 3, "group": 32, "iterations": 2}},
    "mixed": {
        "quantize": {"method": "sign"},
        "ignore": ["*.0.*.down_proj"],
        "overrides": [{"match": "*.v_proj", "quantize": {"method": "rtn", "bits": 8, "group": 64}}],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_text(folder / "text.txt", 500, SHAPE.vocab)
    return write_model(folder, layers=2, shape=SHAPE)


def recipe(model, name="gptq", **calibration):
    calibration = {"source": str(model / "text.txt"), "samples": 4, "length": 16, **calibration}
    return Recipe.model_validate({"name": name, "calibration": calibration, **RECIPES[name]})


@pytest.mark.parametrize("name", RECIPES)
def test_sizes_are_exact(model, name, tmp_path):
    planned = estimate(str(model), recipe(model, name), device="cpu")
    measured = measure_size(compress(str(model), recipe(model, name), tmp_path / "out", device="cpu").folder)
    assert planned.size == replace(measured, header_bytes=0)
    assert planned.size.total_bytes == measured.total_bytes
    assert planned.size.linear_bits_per_weight == measured.linear_bits_per_weight
    assert planned.size.model_bits_per_weight == measured.model_bits_per_weight


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_can_be_estimated(model, name):
    loaded = Recipe.load(name, [f"calibration.source={model / 'text.txt'}", "calibration.length=16"])
    planned = estimate(str(model), loaded, device="cpu")
    assert planned.size.linear_bits_per_weight < 6 and all(seconds >= 0 for seconds in planned.seconds.values())


@pytest.mark.parametrize(
    ("quantize", "exact"),
    [
        ({"method": "gptq"}, True),
        ({"method": "billm"}, True),  # which columns are salient depends on data, their bits do not
        ({"method": "pb_llm"}, True),
        ({"method": "pb_llm", "selection": "threshold"}, False),
        ({"method": "arb_rc"}, False),
        ({"method": "ptq161"}, True),
    ],
)
def test_sizes_that_depend_on_data_are_said_to(model, tmp_path, quantize, exact):
    chosen = recipe(model).model_copy(
        update={"quantize": Recipe.model_validate({"name": "x", "quantize": quantize}).quantize}
    )
    planned = estimate(str(model), chosen, device="cpu")
    assert any("depends on data" in note for note in planned.notes) is not exact
    measured = measure_size(compress(str(model), chosen, tmp_path / "out", device="cpu").folder)
    assert (planned.size.total_bytes == measured.total_bytes) is exact


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4),
        OPTConfig(
            vocab_size=96,
            hidden_size=64,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        ),
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=100,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=True,
            attention_bias=True,
            dtype="float32",
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_sizes_are_exact_for_tied_biased_and_transposed(config, tmp_path):
    folder = str(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rtn = Recipe.model_validate({"name": "rtn", "quantize": {"method": "rtn", "bits": 2, "group": 32}})
    planned = estimate(folder, rtn, device="cpu")
    assert planned.size == replace(measure_size(compress(folder, rtn, tmp_path / "out").folder), header_bytes=0)


@pytest.mark.parametrize("limit", [5 * 10**9, 20_000], ids=["one file", "an index"])
@pytest.mark.parametrize("kind", ["gpt2", "olmoe"])  # many norms and biases; a tensor in the place of all experts
def test_headers_are_no_more_than_is_counted_for_them(kind, limit, mixture_config, save_model, tmp_path, monkeypatch):
    monkeypatch.setattr("ultralowbit.checkpoint.merge.SHARD_BYTES", limit)
    gpt2 = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=8, n_head=4)
    folder = save_model(gpt2 if kind == "gpt2" else mixture_config(kind), tmp_path / "model")
    rtn = Recipe.model_validate({"name": "rtn", "quantize": {"method": "rtn"}, "embeddings": {"method": "ints"}})
    decoder = open_decoder(folder, torch.device("cpu"))
    formats = planned_formats(decoder, rtn) | planned_embeddings(decoder, rtn)
    done = compress(str(folder), rtn, tmp_path / "out").folder
    written = [path.stat().st_size for path in done.glob("model*.safetensors*")]  # with the index
    tensors, nbytes = planned_tensors(decoder, formats), planned_size(decoder, formats).total_bytes
    assert len(written) == 1 or limit < nbytes
    most = most_beside(tensors, {DIGEST: config_digest({})}, nbytes)
    assert 0 <= nbytes + most - sum(written) <= 8 * len(tensors) + 250 * len(written)


def test_groups_are_the_pipelines(model, tmp_path):
    decoder = open_decoder(model, torch.device("cpu"))
    groups = {}
    for name, leader in shared_inputs(decoder).items():
        groups.setdefault(leader, []).append(name.split(".", 4)[-1].removesuffix("_proj"))
    assert list(groups.values()) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]] * 2

    phi = PhiConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )  # its attention and MLP run side by side
    AutoModelForCausalLM.from_config(phi).save_pretrained(tmp_path)
    groups = shared_inputs(open_decoder(tmp_path, torch.device("cpu")))
    assert groups["model.layers.0.mlp.fc1"] == groups["model.layers.0.self_attn.q_proj"]


def test_memory_and_disk_follow_the_calibration(model):
    small = estimate(str(model), recipe(model), device="cpu")
    large = estimate(str(model), recipe(model, samples=400), device="cpu")
    assert large.disk["activation files"] == 100 * small.disk["activation files"] == 100 * 2 * 4 * 16 * 64 * 4
    assert large.disk["packed blocks and the files they are merged into"] == 2 * small.size.total_bytes
    assert small.device_memory == {} and small.memory["this process"] > 1e7
    # the widest, of down: an fp32 sum and an fp32 factor

    assert small.memory["Hessian and its factor"] == 8 * 172**2


def test_no_data_no_forward_passes(model):
    planned = estimate(str(model), recipe(model, "rtn"), device="cpu")
    assert planned.disk["activation files"] == 0
    assert planned.seconds.keys() == {"hashing", "rounding"}


def test_stages_that_train_are_in_the_estimates(model):
    training = {"lr": {"scale": 1e-3}, "epochs": 3, "batch": 2}
    plain = recipe(model)
    stages = {
        "blockwise": {"objective": {"kind": "mse"}, "training": training},
        "finetune": {"objective": {"kind": "kl"}, "training": training},
        "preprocess": {"training": training | {"lr": {"adapter": 1e-3}}},
    }
    before = estimate(str(model), plain, device="cpu")
    trained = Recipe.model_validate(plain.model_dump() | stages)
    planned = estimate(str(model), trained, device="cpu")
    assert {"blockwise", "finetune", "preprocess"} <= planned.seconds.keys()
    assert planned.seconds["preprocess"] > planned.seconds["blockwise"] > 0
    assert planned.disk["activation files"] == 2.5 * before.disk["activation files"]
    assert planned.size == before.size

    latent = {"finetune": stages["finetune"] | {"training": training | {"lr": {"latent": 1e-3}, "batch": 256}}}
    planned = estimate(str(model), Recipe.model_validate(plain.model_dump() | latent), device="cpu")
    weights = sum(math.prod(shape) for shape in SHAPE.linears.values()) * 2
    assert planned.memory["latent weights, gradients and moments"] == 16 * weights


def test_magnitudes_take_forward_passes_but_no_hessian(model):
    planned = estimate(str(model), recipe(model, "ptq161"), device="cpu")
    assert planned.seconds.keys() == {"forward passes", "hashing", "rounding"}
    assert planned.memory["Hessian and its factor"] == 0
    assert planned.disk["activation files"] == 2 * 4 * 16 * 64 * 4


def test_what_does_not_fit_is_said(model):
    planned = estimate(str(model), recipe(model), device="cpu")
    assert planned.warnings == []
    tight = replace(planned, available_disk=10, available_memory=10)
    assert [w.split(" are needed")[0].split(" of ")[1] for w in tight.warnings] == ["memory", "disk"]
    assert str(tight).count("WARNING") == 2


def test_what_makes_a_stage_fit_is_named(model):
    """The key that costs least and is enough; where none is, that is said."""
    training = {"lr": {"latent": 1e-3}, "batch": 4, "steps": 2}
    stage = {"objective": {"kind": "kl"}, "training": training}

    def planned(**changes):
        tuned = {"finetune": stage | changes}
        return estimate(str(model), Recipe.model_validate(recipe(model).model_dump() | tuned), device="cpu")

    plain = planned()
    totals = [less.total[0] for _, less in plain.smaller["finetune"]]
    assert totals == sorted(totals, reverse=True) and totals[0] < plain.stages["finetune"].total[0]
    alone = replace(plain, stages={"finetune": plain.stages["finetune"]})
    settings = ["--set finetune.checkpointing=true", "--set finetune.latents=bf16", "--set finetune.training.batch=1"]
    for i, total in enumerate(totals[:3]):
        (warning,) = replace(alone, available_memory=total).warnings
        assert "needed for fine-tuning" in warning
        assert [setting in warning for setting in settings] == [k <= i for k in range(3)]
    (warning,) = replace(alone, available_memory=1).warnings
    assert totals[-1] == 0 and warning.endswith("--set finetune=null leaves it out")
    less = planned(checkpointing=True, latents="bf16", training=training | {"batch": 1, "accumulation": 4})
    assert less.stages["finetune"].total[0] == totals[2] and "fine-tuning" in str(less)
    # what is so already, by the recipe or by size, is not named
    assert [setting for setting, _ in less.smaller["finetune"]] == ["--set finetune=null"]

    blocks = replace(plain, stages={"blocks": plain.stages["blocks"]}, available_memory=1)
    assert blocks.warnings[0].endswith("no key of the recipe makes it fit: close others")


def test_training_without_latent_weights_is_named_before_none(model):
    """Where the scale is trained beside them; it is what the key then makes of the recipe."""
    training = {"lr": {"latent": 1e-3, "scale": 1e-3}, "batch": 1, "steps": 2}
    stage = {"objective": {"kind": "kl"}, "training": training, "checkpointing": True, "latents": "bf16"}
    tuned = Recipe.model_validate(recipe(model, "sign").model_dump() | {"finetune": stage})
    (light, less), (none, _) = estimate(str(model), tuned, device="cpu").smaller["finetune"]
    assert none == "--set finetune=null"
    setting = shlex.split(light)[1]
    assert setting == "finetune.training.lr={scale: 0.0002, norm: 0.0002}"
    lr = yaml.safe_load(setting.partition("=")[2])
    stage = stage | {"training": training | {"lr": lr}}
    chosen = Recipe.model_validate(recipe(model, "sign").model_dump() | {"finetune": stage})
    planned = estimate(str(model), chosen, device="cpu")
    assert planned.stages["finetune"].total == less.total < estimate(str(model), tuned, "cpu").stages["finetune"].total


def test_windows_that_are_long_may_be_shorter(save_model, tiny_config, text, tmp_path):
    folder = save_model(tiny_config(max_position_embeddings=8192), tmp_path / "model")
    values = {"name": "long", "quantize": {"method": "gptq"}, "calibration": {"source": text, "samples": 2}}
    planned = {
        length: estimate(
            str(folder),
            Recipe.model_validate(values | {"calibration": values["calibration"] | {"length": length}}),
            "cpu",
        )
        for length in (8192, 2048)
    }
    ((setting, less),) = planned[8192].smaller["blocks"]
    assert setting == "--length 2048" and less.total == planned[2048].stages["blocks"].total
    assert "blocks" not in planned[2048].smaller


def test_activation_files_are_gone_where_the_whole_is_trained(model):
    training = {"lr": {"latent": 1e-3}, "steps": 2}
    stage = {"finetune": {"objective": {"kind": "kl"}, "training": training}}
    planned = estimate(str(model), Recipe.model_validate(recipe(model).model_dump() | stage), "cpu")
    beside = {name: host - planned.process - planned.stages[name].total[0] for name, (host, _) in planned.peaks.items()}
    assert beside == {"blocks": planned.mapped, "finetune": 0} and planned.mapped > 0


def test_ranks_share_what_is_trained_end_to_end(model):
    training = {"lr": {"latent": 1e-3}, "batch": 4, "steps": 2}
    stage = {"finetune": {"objective": {"kind": "kl"}, "training": training}}
    tuned = Recipe.model_validate(recipe(model).model_dump() | stage)
    parts = {n: estimate(str(model), tuned, "cpu", ranks=n).stages["finetune"].host for n in (1, 2, 4)}
    latents = {n: stage["latent weights, gradients and moments"] for n, stage in parts.items()}
    weights = sum(math.prod(shape) for shape in SHAPE.linears.values()) * 2
    # beside the shards, a block's weights and gradients while it runs
    assert latents == {1: 16 * weights, 2: 8 * weights + 4 * weights, 4: 4 * weights + 4 * weights}
    batch = {n: stage["a batch for the backward pass"] for n, stage in parts.items()}
    assert batch[1] == 2 * batch[2] == 4 * batch[4]


def test_prints_and_json(model):
    planned = estimate(str(model), recipe(model), device="cpu")
    stored = json.loads(json.dumps(planned.to_dict()))
    assert stored["size"]["total_bytes"] == planned.size.total_bytes
    assert stored["seconds_total"] == pytest.approx(sum(planned.seconds.values()))
    assert all(seconds >= 0 for seconds in planned.seconds.values())
    assert f"{planned.size.total_bytes:,} bytes" in str(planned)


def test_refuses_what_compress_refuses(model):
    with pytest.raises(InputError, match="nothing would be compressed"):
        estimate(str(model), recipe(model).model_copy(update={"ignore": ("*",)}), device="cpu")
    for pattern, near in {"*dwn_proj": "layers.0.mlp.down_proj", "lm_haed": "model.layers.0."}.items():
        with pytest.raises(InputError, match=f"'.{pattern[1:]}', which matches no module .*{near}.*: correct it"):
            estimate(str(model), recipe(model).model_copy(update={"ignore": ("*.o_proj", pattern)}), device="cpu")
    estimate(str(model), recipe(model).model_copy(update={"ignore": ("lm_head", "*.o_proj")}), device="cpu")
    with pytest.raises(InputError, match="no such folder"):
        estimate("./nowhere", recipe(model))


def calls(f) -> int:
    """How many functions, Python's own among them, `f` calls."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(None)
    return count


def test_training_takes_what_its_weights_and_logits_take(model):
    """Beside products, which are free here: 3 steps of 2 windows, 1 of the 4 windows judges at the start and twice."""
    training = {"lr": {"latent": 1e-3}, "steps": 3, "batch": 2, "evaluations": 2}
    tuned = recipe(model, "sign", samples=4, length=16).model_copy(
        update={"finetune": Finetune.model_validate({"objective": {"kind": "kl"}, "training": training})}
    )
    decoder = open_decoder(model, torch.device("cpu"))
    formats = planned_formats(decoder, tuned)
    work, size = Workload(decoder, tuned, formats), planned_size(decoder, formats)
    rates = Rates(
        single=math.inf, half=math.inf, factor=0, hashing=math.inf, rounding=lambda _: (0, 0),
        training=lambda *_: (1, 10), logits=lambda vocabulary, has_teacher: (1, 4) if has_teacher else (0, 0),
    )  # fmt: skip
    expected = size.linear_weights * (3 * 10 + 3 * 1) + 16 * SHAPE.vocab * (3 * 2 * 4 + 3 * 1)
    assert seconds(work, size, rates)["finetune"] == expected
    for name, measured in measured_rates(torch.device("cpu"))._asdict().items():
        if name == "training":
            forward, both = measured(tuned.finetune, torch.float32, tuned.quantize.quantize(torch.ones(8, 64), None))
            assert both > forward > 0
        elif name == "logits":
            assert all(both > forward > 0 for forward, both in (measured(96, True), measured(96, False)))


@pytest.mark.parametrize("grown", ["blocks", "experts"])
def test_planning_takes_as_long_for_every_tensor(grown, tmp_path, mixture_config, monkeypatch):
    """However many there are: work is counted, so that what is done for every two of them shows. No expert's Linear is
    made, of which a large model has tens of thousands."""
    made = []
    monkeypatch.setattr(ExpertLinear, "__init__", lambda self, *args: made.append(args))
    plan = Recipe.model_validate(RECIPES["gptq"] | {"name": "gptq", "ignore": ["*.layers.0.self_attn.*"]})
    monkeypatch.setattr("ultralowbit.pipeline.estimate.measured_rates", lambda *_: Card().rates)
    counted = []
    for n in (16, 32, 64):
        sizes = {"num_hidden_layers": n} if grown == "blocks" else {"num_experts": n}
        folder = write_headers(tmp_path / str(n), mixture_config("qwen3_moe", **sizes))
        run = partial(estimate, str(folder), plan, device="cpu")
        run()  # what is imported and kept from the first time
        counted.append(calls(run))
    first, second = counted[1] - counted[0], counted[2] - counted[1]  # of 16 and of 32 more
    assert second < 2.01 * first
    assert not made
