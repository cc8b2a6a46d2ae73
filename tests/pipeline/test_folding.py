"""`rotate: {inputs: folded}`: what is packed is the folded model, which computes what the original does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ultralowbit.checkpoint.size import measure_size
from ultralowbit.checkpoint.storage import read_json
from ultralowbit.data.corpora import read_text
from ultralowbit.demo.run import CHECKPOINT
from ultralowbit.errors import InputError
from ultralowbit.eval.perplexity import perplexity
from ultralowbit.eval.windows import token_stream
from ultralowbit.hub import open_tokenizer
from ultralowbit.nn.folding import give_folded
from ultralowbit.nn.hf import load
from ultralowbit.pipeline import stream
from ultralowbit.pipeline.compress import Compressed, compress
from ultralowbit.pipeline.estimate import estimate
from ultralowbit.pipeline.source import open_decoder
from ultralowbit.pipeline.verify import rerun, verify
from ultralowbit.progress import Silent
from ultralowbit.recipe import Recipe

FOLDED = {"inputs": "folded"}
ALONE = {"inputs": "folded", "others": "none"}
NEAR = {"method": "rtn", "bits": 8, "group": 32}
GOOD = {"method": "gptq", "bits": 8, "group": 32}
NOVELS = Path(__file__).parents[3] / "shared/models/novel-4m"


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture
def recipe(text) -> Callable[..., Recipe]:
    def make(**values: Any) -> Recipe:
        calibration = {"source": text, "samples": 6, "length": 24}
        return Recipe.model_validate({"name": "test", "quantize": NEAR, "calibration": calibration} | values)

    return make


@pytest.mark.parametrize("embeddings", [None, {"method": "ints"}], ids=["stored", "packed"])
def test_an_untied_head_takes_bytes_and_is_no_weight_of_the_original(source, recipe, tmp_path, embeddings):
    values = {"rotate": FOLDED, "embeddings": embeddings}
    planned = estimate(str(source), recipe(**values), "cpu").size
    size = measure_size(compress(str(source), recipe(**values), tmp_path / "out").folder)
    assert size.other["head"] > 0 == measure_size(source).other["head"]
    assert size.total_weights == planned.total_weights == measure_size(source).total_weights
    assert size.total_bytes == planned.total_bytes


@pytest.fixture(scope="module")
def source(save_model, tiny_config, tmp_path_factory) -> Path:
    config = tiny_config(num_hidden_layers=2, tie_word_embeddings=True, attention_bias=True)
    return save_model(config, tmp_path_factory.mktemp("tied") / "model")


def transforms(done: Compressed) -> dict[str, Any]:
    """What is done to the inputs of each kind of packed Linear."""
    layers = done.manifest["layers"].items()
    return {name.rpartition(".")[2]: layer["layout"].get("transform") for name, layer in layers}


@torch.no_grad()
def distance(a: Any, b: Any) -> float:
    """How far the logits of b lie from those of a, in parts of a's, at the median token: in mixtures some tokens, which
    are between two experts, change to the other."""
    tokens = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(0))
    of_a, of_b = (model(tokens, use_cache=False).logits for model in (a, b))
    return ((of_a - of_b).norm(dim=-1) / of_a.norm(dim=-1)).median().item()


@pytest.mark.parametrize("rotate", [None, {"inputs": "online"}, FOLDED, ALONE], ids=str)
@pytest.mark.parametrize("embeddings", [None, {"method": "ints", "bits": 8}], ids=["dense", "packed"])
def test_the_packed_model_computes_what_the_original_does(rotate, embeddings, source, recipe, tmp_path):
    done = compress(str(source), recipe(rotate=rotate, embeddings=embeddings), tmp_path / "out")
    original, packed = AutoModelForCausalLM.from_pretrained(source), load(done.folder)
    assert distance(original, packed) < 0.03  # eight bits
    online = {name for name, transform in transforms(done).items() if transform}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert online == {str(FOLDED): {"down_proj"}, str({"inputs": "online"}): every}.get(str(rotate), set())
    folded = rotate in (FOLDED, ALONE)
    assert read_json(done.folder / "config.json")["tie_word_embeddings"] is not folded
    stored = load_file(done.folder / "model.safetensors")
    assert ("lm_head.weight" in stored) == folded
    assert folded == all((t == 1).all() for name, t in stored.items() if name.endswith("norm.weight"))
    assert done.manifest.get("rotation", {}).get("inputs") == ("folded" if folded else None)
    assert verify(done.folder) == []


def test_what_is_folded_can_be_unpacked_and_saved_again(source, recipe, tmp_path):
    done = compress(str(source), recipe(rotate=FOLDED), tmp_path / "out")
    packed = load(done.folder)
    packed.save_pretrained(tmp_path / "again")
    assert distance(packed, load(tmp_path / "again")) == 0
    dense = load(done.folder).dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert distance(packed, AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) < 1e-5


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_architectures_end_to_end(kind, save_model, tiny_config, recipe, tmp_path):
    config = tiny_config(kind, num_hidden_layers=2, head_dim=16, pad_token_id=3, tie_word_embeddings=True)
    source = save_model(config, tmp_path / "model")
    stages = {"rotate": FOLDED, "error_correction": {}, "output_feedback": {}, "quantize": GOOD}
    done = compress(str(source), recipe(**stages), tmp_path / "out")
    assert distance(AutoModelForCausalLM.from_pretrained(source), load(done.folder)) < 0.05


def test_a_mixture_is_folded_with_its_router(save_model, mixture_config, recipe, tmp_path):
    source = save_model(mixture_config("mixtral"), tmp_path / "model")
    done = compress(str(source), recipe(rotate=FOLDED), tmp_path / "out")
    assert {name for name, transform in transforms(done).items() if transform} == {"packed_down_proj"}
    assert distance(AutoModelForCausalLM.from_pretrained(source), load(done.folder)) < 0.03


@pytest.mark.parametrize(
    ("rotate", "instead"), [(FOLDED, "inputs are rotated where they enter"), (ALONE, "nothing is rotated")], ids=str
)
def test_what_cannot_be_folded_is_said(rotate, instead, save_model, tiny_config, recipe, tmp_path):
    config = tiny_config("gemma3_text", num_hidden_layers=2, head_dim=16, tie_word_embeddings=True)
    source, lines = save_model(config, tmp_path / "model"), Lines()
    done = compress(str(source), recipe(rotate=rotate), tmp_path / "out", progress=lines)
    (note,) = done.manifest["rotation"]["notes"]
    assert note.startswith("rotations cannot be folded into gemma3_text, norms stand") and note.endswith(instead)
    assert note in lines.said and note in estimate(str(source), recipe(rotate=rotate)).notes
    online = recipe(rotate=None if rotate == ALONE else {})
    expected = compress(str(source), online, tmp_path / "online")
    assert done.manifest["layers"].keys() == expected.manifest["layers"].keys()
    assert all((done.folder / f).read_bytes() == (expected.folder / f).read_bytes() for f in ("model.safetensors",))


@pytest.mark.parametrize("rotate", [{}, FOLDED], ids=str)
def test_inputs_that_no_block_divides_are_said(rotate, save_model, tiny_config, recipe, tmp_path):
    source, lines = save_model(tiny_config(num_hidden_layers=1, intermediate_size=99), tmp_path / "model"), Lines()
    done = compress(str(source), recipe(rotate=rotate, quantize={"method": "sign"}), tmp_path / "out", progress=lines)
    (note,) = (note for note in done.manifest["rotation"]["notes"] if note.startswith("no Hadamard block"))
    assert "divides 99 inputs" in note and note in lines.said
    assert note in estimate(str(source), recipe(rotate=rotate, quantize={"method": "sign"})).notes


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_head_stays_so_where_it_is_to(tied, save_model, tiny_config, recipe, tmp_path):
    source = save_model(tiny_config(num_hidden_layers=2, tie_word_embeddings=tied), tmp_path / "model")
    done = compress(str(source), recipe(rotate=FOLDED | {"tied": "keep"}), tmp_path / "out")
    assert done.manifest["rotation"]["inputs"] == ("online" if tied else "folded")
    assert read_json(done.folder / "config.json")["tie_word_embeddings"] is tied
    notes = ["rotations cannot be folded into llama, its head is tied to the embedding, and is to stay so: inputs are"]
    assert [note.partition(" rotated")[0] for note in done.manifest["rotation"]["notes"]] == notes * tied
    online = {name for name, transform in transforms(done).items() if transform}
    assert len(online) == (7 if tied else 1)


def test_every_stage_sees_the_folded_model(source, recipe, tmp_path):
    """Adapters, trained blocks and a trained whole: each is measured against what it is to be near to."""
    training = {"epochs": 2, "batch": 2, "evaluations": 2}
    stages = {
        "preprocess": {"rank": 2, "held_out": 0.2, "training": training | {"lr": {"adapter": 1e-4}}},
        "blockwise": {"objective": {"kind": "mse"}, "held_out": 0.2, "training": training | {"lr": {"scale": 1e-4}}},
        "finetune": {"objective": {"kind": "kl"}, "held_out": 0.2, "training": training | {"lr": {"scale": 1e-4}}},
    }
    original = AutoModelForCausalLM.from_pretrained(source)
    for stage, spec in stages.items():
        done = compress(str(source), recipe(rotate=FOLDED, quantize=GOOD, **{stage: spec}), tmp_path / stage)
        assert distance(original, load(done.folder)) < 0.05, stage
    assert done.manifest["finetune"]["before"] < 0.01  # nats from the original: the teacher is the same function


def test_allocated_planes_and_packed_embeddings(source, recipe, tmp_path):
    planes = {"quantize": {"method": "sign", "refine": 1}, "allocate": {"bits": 3.0}, "embeddings": {"method": "ints"}}
    done = compress(str(source), recipe(rotate=FOLDED, **planes), tmp_path / "out")
    assert set(done.manifest["embeddings"]) == {"model.embed_tokens", "lm_head"}
    assert not any(entry["layout"].get("transform") for entry in done.manifest["embeddings"].values())
    online = compress(str(source), recipe(rotate={}, **planes), tmp_path / "online")
    original = AutoModelForCausalLM.from_pretrained(source)
    assert distance(original, load(done.folder)) < 1.2 * distance(original, load(online.folder))


def test_sizes_are_predicted_with_the_head_of_its_own(source, recipe, tmp_path):
    folded = recipe(rotate=FOLDED)
    size, done = estimate(str(source), folded), compress(str(source), folded, tmp_path / "out")
    stored = measure_size(done.folder)
    assert (size.size.total_bytes, size.size.other) == (stored.total_bytes, stored.other)
    plain = estimate(str(source), recipe(rotate={}))
    assert size.size.total_bytes - plain.size.total_bytes == 96 * 64 * 4
    assert any("has a weight of its own" in note for note in size.notes)


def test_a_stopped_run_goes_on_and_a_repeated_one_writes_the_same(source, recipe, tmp_path, monkeypatch):
    whole = compress(str(source), recipe(rotate=FOLDED, quantize=GOOD), tmp_path / "whole")
    pack, calls = stream.quantize_weight, []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return pack(*args)

    monkeypatch.setattr(stream, "quantize_weight", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(str(source), recipe(rotate=FOLDED, quantize=GOOD), tmp_path / "parts")
    assert read_json(tmp_path / "parts.work" / "job.json")["blocks"] == 1
    monkeypatch.setattr(stream, "quantize_weight", pack)
    parts = compress(str(source), recipe(rotate=FOLDED, quantize=GOOD), tmp_path / "parts")
    assert parts.manifest["files"] == whole.manifest["files"]
    assert rerun(whole.folder).different == {}


def test_another_seed_is_other_work(source, recipe, tmp_path):
    compress(str(source), recipe(rotate=FOLDED), tmp_path / "out")
    with pytest.raises(InputError, match=r"different recipe \(rotate\)"):
        compress(str(source), recipe(rotate=FOLDED | {"seed": 1}), tmp_path / "out")


@pytest.mark.parametrize("source", [CHECKPOINT, NOVELS], ids=["embedded", "novels"])
def test_folded_weights_have_the_perplexity_of_the_original(source):
    """To 1e-3 of it, before anything is quantized, though the weights are rounded anew to the dtype of the files."""
    if not source.is_dir():
        pytest.skip("needs the model novel-4m")
    tokens = token_stream(open_tokenizer(source), read_text("python-docs", "test").text)[:4096]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    before = perplexity(model, tokens, context=256).perplexity
    decoder = open_decoder(source, torch.device("cpu"))
    assert decoder.fold(0) is None
    give_folded(model, decoder)
    assert perplexity(model, tokens, context=256).perplexity == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(
    ("rotate", "said"),
    [
        ({"inputs": "fold"}, "'online' or 'folded'"),
        ({"inputs": "folded", "others": "off"}, "'online' or 'none'"),
        ({"inputs": "online", "others": "none"}, "others: none goes with inputs: folded"),
        ({"inputs": "folded", "tied": "yes"}, "'untie' or 'keep'"),
        ({"inputs": "folded", "seed": "x"}, "valid integer"),
        ({"inputs": "folded", "seed": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_values_are_one_sentence(rotate, said, tmp_path):
    (tmp_path / "r.yaml").write_text("quantize: {method: rtn, bits: 4}\n")
    settings = [f"rotate.{key}={value!r}" for key, value in rotate.items()]
    with pytest.raises(InputError) as error:
        Recipe.load(tmp_path / "r.yaml", settings)
    assert said in str(error.value) and "\n" not in str(error.value)
