"""Model folders are complete before anything reads them, and the hub's refusals say what to do."""

from __future__ import annotations

import json
import os
import re
import shlex

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from ultralowbit.errors import InputError
from ultralowbit.hub import resolve_model


def refused(name, *words):
    with pytest.raises(InputError) as error:
        resolve_model(str(name))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))


# -- folders


def test_a_folder_is_returned(folder, monkeypatch):
    assert resolve_model(str(folder)) == folder
    assert resolve_model(f"{folder}/") == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model") == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model("model").resolve() == folder


def test_incomplete_folders(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    refused(folder, "no model.safetensors and no model.safetensors.index.json", "model-1.safetensors")
    index(folder, {"metadata": {}, "weight_map": {"w": "model-1.safetensors"}})
    assert resolve_model(str(folder)) == folder
    index(folder, {"metadata": {}, "weight_map": {"v": "model-2.safetensors", "w": "model-1.safetensors"}})
    refused(folder, "model-2.safetensors is missing")
    for broken in ("{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"w": 5}}', '{"weight_map": {"w": ["a"]}}'):
        index(folder, broken)
        refused(folder, "model.safetensors.index.json", "again")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


def test_paths_that_do_not_exist(tmp_path, folder):
    for name in (tmp_path / "none", "./none", "~/none", "../none", "a/b/c", "/"):
        if name != "/":
            refused(name, "no such folder")
    refused("/", "config.json")
    refused("", "empty")
    refused(folder / "config.json", "is a file")


@pytest.mark.parametrize("name", ["model", 'it\'s "odd" $HOME'])
def test_pickles_are_refused_with_a_command_that_converts_them(tmp_path, monkeypatch, name):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path / name
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    model = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        folder
    )

    message = refused(folder, "pytorch_model*.bin", "pickles", "can run code")
    python, flag, script = shlex.split(re.search(r"`(.*)`", message)[1])
    assert (python, flag) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    loaded = LlamaForCausalLM.from_pretrained(resolve_model(f"{name}-safetensors"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# -- the hub


@pytest.fixture
def hub(monkeypatch, folder):
    """snapshot_download answers `hub.answer`: a folder or an exception."""

    class Hub:
        answer = folder

        def download(self, repo, **options):
            self.asked = repo, options
            if isinstance(self.answer, Exception):
                raise self.answer
            return os.fspath(self.answer)

    hub = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [("gpt2", "gpt2", None), ("org/model", "org/model", None), ("org/model@v1", "org/model", "v1")],
)
def test_hub_names(hub, folder, name, repo, revision):
    assert resolve_model(name) == folder
    assert hub.asked[0] == repo
    assert hub.asked[1]["revision"] == revision


def test_only_what_is_read_is_downloaded(hub):
    from huggingface_hub.utils import filter_repo_objects

    resolve_model("org/model")
    kept = ["config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.model", "merges.txt"]
    kept += ["modeling.py", "qwen.tiktoken", "vocab.bpe", "spiece.vocab", "additional_chat_templates/rag.jinja"]
    kept += ["vocab.txt", "chat_template.jinja", "README.md", "LICENSE", "LICENSE.txt", "NOTICE"]
    left = [
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "original/x.json",
    ]
    left += ["onnx/config.json", "tf_model.h5", "x.pth", "training_args.pkl"]
    patterns = {key: hub.asked[1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert [*filter_repo_objects(kept + left, **patterns)] == kept


def http(kind):
    """A hub error without a request behind it."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error. (Request ID: Root=1)\n\nlong story.",)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http(errors.RepositoryNotFoundError), ["no hub model 'org/model'", "private"]),
        (http(errors.GatedRepoError), ["gated", "https://huggingface.co/org/model", "hf auth login"]),
        (http(errors.RevisionNotFoundError), ["no revision 'v1'"]),
        (errors.LocalEntryNotFoundError("offline"), ["cannot be reached", "local folder"]),
        (errors.OfflineModeIsEnabled("offline"), ["cannot be reached", "local folder"]),
        (errors.HFValidationError("bad"), ["no hub name"]),
        (ConnectionError("reset"), ["cannot be reached"]),
        (http(errors.HfHubHTTPError), ["cannot be downloaded", "HfHubHTTPError"]),
        (OSError(28, "No space left on device"), ["cannot be downloaded", "No space left"]),
    ],
)
def test_hub_refusals(hub, error, words):
    hub.answer = error
    message = refused("org/model@v1", "org/model", *words)
    assert ". " not in message


def test_what_the_hub_sends_is_checked_too(hub, folder):
    (folder / "model.safetensors").unlink()
    refused("org/model", 'M.from_pretrained("org/model", dtype="auto")', '"model-safetensors"')
    refused("org/model@v1", 'T.from_pretrained("org/model", revision="v1")')


def test_names_that_are_none():
    refused("org/model@", "no revision after the '@'")
    refused("a b", "no hub name")
