"""From a model's name to a folder that holds its safetensors, and the tokenizer in it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ultralowbit.checkpoint.files import INDEX, WEIGHTS, refuse_missing_folder, weight_files
from ultralowbit.checkpoint.gguf import decoded_folder
from ultralowbit.checkpoint.storage import read_json
from ultralowbit.errors import CheckpointError, InputError, reason

_WANTED = [
    "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "merges*", "README.md", "LICENSE*", "NOTICE*",
    "*.py", "*.tiktoken", "*.bpe", "*.vocab",
]  # fmt: skip
_KEPT_HERE = [".*", "*/.*", "eval*.json", "tracks.json"]  # where things lie on this machine, and notes made there
_WEIGHTS = [WEIGHTS, "model-?????-of-?????.safetensors", INDEX]
_UNWANTED = ["original/*", "onnx/*", "consolidated*"]  # the same weights again, in other layouts


def resolve_model(name: str) -> Path:
    """The folder of a model: a local one, or a hub model `org/name` or `org/name@revision`, downloaded if need be. A
    GGUF file, or a folder without a config.json that holds one, stands for a folder with what the file means.

    It has a config.json, at least one .safetensors file and every shard that its index names; otherwise, or if the hub
    cannot deliver it, raises `InputError`.
    """
    if not name:
        raise InputError("the model's name is empty, expected a folder or a hub name like org/model: give one")
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder) and not (folder / "config.json").exists() and len(files := [*folder.glob("*.gguf")]) == 1:
        folder = files[0]
    if os.path.isfile(folder):
        if folder.suffix == ".gguf":
            return decoded_folder(folder)
        raise InputError(f"{name!r} is a file, expected a model's folder or hub name: give the folder that it lies in")
    if not os.path.isdir(folder):
        refuse_missing_folder(name)
        folder = _download(name)
    _check(folder, name)
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, at, revision = name.partition("@")
    if at and not revision:
        raise InputError(f"{name!r} has no revision after the '@': give org/model@revision, or leave the '@' out")
    try:
        snapshot = snapshot_download(repo, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except GatedRepoError as error:  # before its parent, RepositoryNotFoundError
        message = (
            f"the model {repo!r} is gated: accept its terms at https://huggingface.co/{repo} and run `hf auth login`"
        )
        raise InputError(message) from error
    except RevisionNotFoundError as error:
        message = f"the model {repo!r} has no revision {revision!r}: look for one at https://huggingface.co/{repo}"
        raise InputError(message) from error
    except RepositoryNotFoundError as error:
        message = f"there is no folder and no hub model {repo!r}: check the name, or `hf auth login` if it is private"
        raise InputError(message) from error
    except HFValidationError as error:
        message = f"there is no folder {name!r}, and it is no hub name either: give a folder or org/model"
        raise InputError(message) from error
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        message = f"there is no folder {name!r}, and the hub cannot be reached for it: connect, or give a local folder"
        raise InputError(message) from error
    except Exception as error:  # other answers of the server, proxies, a full disk
        message = f"the model {name!r} cannot be downloaded ({reason(error)}): try again, or give a local folder"
        raise InputError(message) from error
    return Path(snapshot)


def check_push(repo: str) -> None:
    """Raise `InputError` unless `repo` may be pushed to, as far as can be told beforehand: its name, and a token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"--push-to-hub is {repo!r}, expected a name on the hub like org/name") from error
    except LocalTokenNotFoundError as error:
        raise InputError("pushing to the hub needs a token: run `hf auth login` first") from error
    except Exception as error:  # no connection, a token that has expired
        raise InputError(
            f"the hub does not know who you are ({reason(error)}): connect, and run `hf auth login` first"
        ) from error


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload every file of a packed folder to the hub model `org/name`, made if need be; returns its address. The same
    commit takes away the weights of an earlier checkpoint, some of which transformers would load instead.

    Raises `InputError` where the hub refuses; what the folder holds stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Packed checkpoint by ultralowbit",
            ignore_patterns=_KEPT_HERE, delete_patterns=_WEIGHTS,
        )  # fmt: skip
    except Exception as error:  # whatever the hub, the network and the token's rights say
        raise InputError(
            f"{folder} cannot be pushed to {repo!r} ({reason(error)}): check that your token may write there, then run "
            "the same command, which only pushes again"
        ) from error
    return str(url)


def _check(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{name!r} has no config.json, expected a transformers model: give the folder that holds it")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name!r} has no .safetensors file, expected at least one (pickles such as pytorch_model*.bin are not "
            f"read, because opening one can run code): if you trust it, convert it with `{_conversion(name)}`"
        )
    try:
        weight_files(folder)
    except CheckpointError as error:
        raise InputError(str(error)) from error


def _conversion(name: str) -> str:
    """A shell command that writes the model again, as safetensors."""
    folder = Path(os.path.expanduser(name)).resolve()
    repo, _, revision = (str(folder), "", "") if folder.is_dir() else name.partition("@")
    # json writes Python's double quotes, which the shell's single ones leave alone
    source = json.dumps(repo) + (f", revision={json.dumps(revision)}" if revision else "")
    target = json.dumps(f"{Path(repo).name}-safetensors")
    script = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'M.from_pretrained({source}, dtype="auto").save_pretrained({target}); '
        f"T.from_pretrained({source}).save_pretrained({target})"
    )
    return f"python -c {shlex.quote(script)}"


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder; `InputError` where transformers finds none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some settings only fail in use
    except Exception as e:  # tokenizers and every class of transformers' have their own
        raise InputError(
            f"{folder} has no tokenizer that transformers can load ({_unreadable(folder)}{reason(e)}): put its "
            "tokenizer files there"
        ) from e
    return tokenizer


def _unreadable(folder: Path) -> str:
    """The tokenizer's file that is to blame, with a colon; nothing where there is none."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
    there = [name for name in names if (folder / name).is_file()]
    for name in there:
        try:
            read_json(folder / name)
            if name == "tokenizer.json":
                Tokenizer.from_file(str(folder / name))
        except Exception:  # tokenizers has no class of its own
            return f"{name}: "
    return "tokenizer_config.json: " if "tokenizer_config.json" in there else ""
