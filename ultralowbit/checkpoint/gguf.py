"""A GGUF file as a model: what transformers decodes of it, kept as a folder of safetensors."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ultralowbit.checkpoint.storage import follow_umask, json_digest
from ultralowbit.errors import InputError, reason

if TYPE_CHECKING:
    from gguf import GGUFReader

log = logging.getLogger(__name__)

_FLOATS = {"F64", "F32", "F16", "BF16"}


def decoded_folder(file: Path) -> Path:
    """The folder of a model that holds what a GGUF file means, in 16 bits, with its tokenizer; made on the first call,
    and kept among the assets of the hub's cache as long as the file stays as it is.

    Raises `InputError` where transformers cannot decode the file, or would leave out what it says of positions.
    """
    from huggingface_hub import cached_assets_path

    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"reading {file} needs the package gguf: install it with `pip install 'ultralowbit[gguf]'`, or give the "
            "original's folder"
        )
    stat = file.stat()
    digest = json_digest([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    folder = Path(cached_assets_path("ultralowbit", "gguf", digest[:16])) / file.stem
    if not folder.exists():
        _decode(file, folder)
    return folder


def _decode(file: Path, folder: Path) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as e:  # whatever bytes it trips over, and types that it does not know
        if "GGMLQuantizationType" in str(e):
            raise InputError(
                f"{file} has weights of a type that transformers cannot read ({reason(e)}), such as q1_0 and q2_0: run "
                "it with llama.cpp, or give the folder that it was exported from"
            ) from e
        raise InputError(f"{file} cannot be read as GGUF ({reason(e)}): copy it again") from e
    if lost := _lost(reader):
        raise InputError(f"{file} says of its positions what transformers does not read ({lost}): give the original")
    weights = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            weights[tensor.tensor_type.name] += tensor.n_elements
    types = ", ".join(f"{count / weights.total():.0%} {name}" for name, count in weights.most_common())
    (log.info if weights.keys() <= _FLOATS else log.warning)(
        "%s is a GGUF file whose weights are %s: they are read as 16-bit floats, and stand for the original",
        file,
        types,
    )
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(file, place, torch.bfloat16 if "BF16" in weights else torch.float16)
        follow_umask(place, *place.iterdir())
        place.replace(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _lost(reader: GGUFReader) -> str | None:
    """A key or tensor that changes how positions count and that transformers drops."""
    for key, field in reader.fields.items():
        if key.endswith("rope.scaling.type") and field.contents() != "none":
            return key
    return next((tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")), None)


def _save(file: Path, folder: Path, dtype: torch.dtype) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    options = {"dtype": dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # releases without it always decode
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(**where, **options)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as e:  # architectures, shapes and tokenizers that it does not know
        raise InputError(f"transformers cannot decode {file} ({reason(e)}): give the original's folder") from e
    if missing := sorted({*loaded["missing_keys"]} - model.all_tied_weights_keys.keys()):
        raise InputError(f"{file} has no {missing[0]}, as transformers needs it: give the original's folder")
    model.hf_quantizer = None  # its weights are decoded, and yet transformers takes it for quantized
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
