"""A GGUF file with every packed weight in a block type of llama.cpp that holds it exactly, or why there is none."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ultralowbit.checkpoint.config import QUANT_METHOD, read_config_json
from ultralowbit.checkpoint.files import weight_files
from ultralowbit.errors import InputError, reason
from ultralowbit.export.base import Exporter
from ultralowbit.export.gguf.architectures import architecture
from ultralowbit.export.gguf.tensors import F16, RECIPES, Tensors, write
from ultralowbit.export.gguf.vocabulary import Vocabulary
from ultralowbit.nn.hf import load
from ultralowbit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_OLDEST = (0, 19)
"""Of the gguf package: older ones lack names and keys of these architectures."""

_BLOCK_VERSION = 2
"""Of ggml's block types."""


@dataclass(frozen=True)
class GgufExporter(Exporter):
    """embeddings: `f16`, or `q8_0` to round the embeddings and the head to 8 bits; dequantize: 16 bits for every packed
    weight, where no block type holds it or to compare with."""

    embeddings: str = "f16"
    dequantize: bool = False

    def companions(self, target: Path) -> list[Path]:
        return [target.with_suffix(".Modelfile")]

    def export(self, folder: Path, out: Path, progress: Progress) -> None:
        """Write the file `out`, and a Modelfile for Ollama beside it. What is no packed weight has 16 bits, norms and
        biases 32. A checkpoint that is not packed becomes a file of 16 bits."""
        if self.embeddings not in ("f16", "q8_0"):
            raise InputError(f"--embeddings is {self.embeddings!r}, expected f16 or q8_0")
        _check_package()
        target = architecture(AutoConfig.from_pretrained(folder))
        model = _open(folder)
        stops = _listed(model.generation_config.eos_token_id if model.generation_config else None)
        vocabulary = Vocabulary.read(folder, model.get_input_embeddings().weight.shape[0], stops)
        tensors = Tensors(model, folder, target, self.embeddings == "q8_0", self.dequantize)
        size = sum(tensor.bytes for tensor in tensors.stored)
        if (free := shutil.disk_usage(out.parent).free) < size:
            raise InputError(f"the file needs {size / 1e6:,.0f} MB and {out.parent} has {free / 1e6:,.0f}: make room")
        _say_types(tensors, progress)

        def describe(writer: Any) -> None:
            writer.add_name(folder.resolve().name)
            writer.add_file_type(_file_type(tensors))
            writer.add_quantization_version(_BLOCK_VERSION)
            target.describe(writer, model.config)
            vocabulary.describe(writer)

        progress.start("writing the GGUF file", size)
        write(out, target, describe, tensors, progress.step)
        out.with_suffix(".Modelfile").write_text(f"# ollama create NAME -f {out.stem}.Modelfile\nFROM ./{out.name}\n")


def _check_package() -> None:
    try:
        version = importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError as e:
        raise InputError(
            "exporting to gguf needs the package gguf: install it with `pip install 'ultralowbit[gguf]'`"
        ) from e
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST:
        raise InputError(
            f"the package gguf is of version {version}, expected {'.'.join(map(str, _OLDEST))} or newer: upgrade it "
            "with `pip install -U gguf`"
        )


def _open(folder: Path) -> PreTrainedModel:
    """The checkpoint on meta, its files checked as when it is loaded."""
    method = (read_config_json(folder).get("quantization_config") or {}).get("quant_method")
    if method == QUANT_METHOD:
        return load(folder, device_map="meta")
    if method is not None:
        raise InputError(
            f"{folder} is quantized by {method!r}, expected a checkpoint that `ultralowbit compress` wrote or one that "
            "is not quantized"
        )
    weight_files(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=torch.device("meta"))
    except Exception as e:  # whatever transformers says of a folder that is none
        raise InputError(f"{folder} cannot be loaded by transformers ({reason(e)}): give a whole checkpoint") from e


def _listed(tokens: int | list[int] | None) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def _file_type(tensors: Tensors) -> int:
    """llama.cpp's number for the type that most weights have."""
    weights = Counter()
    for tensor in tensors.stored:
        if tensor.packed_bytes:
            weights[tensor.block] += tensor.shape[0] * tensor.shape[1]
    most = max(weights, key=weights.get, default=None)
    return F16 if most is None else most.file_type


def _say_types(tensors: Tensors, progress: Progress) -> None:
    """Say which types packed weights get, and warn where they grow by more than scales."""
    packed = [tensor for tensor in tensors.stored if tensor.block is not None and tensor.packed_bytes]
    if not packed:
        return
    counts = Counter(tensor.block for tensor in packed)
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in packed)
    before, after = (
        8 * sum(sizes) / weights for sizes in zip(*((t.packed_bytes, t.bytes) for t in packed), strict=True)
    )
    types = ", ".join(f"{count} as {block.name}" for block, count in counts.most_common())
    progress.say(f"packed weights: {types}, {after:.3f} bits per weight")
    if after > 1.3 * before:
        smaller = [f"{name} ({bits:g} bits)" for name, bits in RECIPES if bits < after]
        log.warning(
            "the smallest block types of llama.cpp that hold these weights exactly take %.2f bits per weight, %.2f in "
            "the checkpoint: made for them are the recipes %s", after, before, " and ".join(smaller) or "of others",
        )  # fmt: skip
