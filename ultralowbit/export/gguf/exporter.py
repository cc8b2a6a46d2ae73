"""A GGUF file with every packed weight in a block type of llama.cpp that holds it exactly, or why there is none."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from ultralowbit.checkpoint.config import QUANT_METHOD, read_config_json
from ultralowbit.checkpoint.files import weight_files
from ultralowbit.errors import InputError, reason
from ultralowbit.export.base import Exporter
from ultralowbit.export.gguf.architectures import architecture
from ultralowbit.export.gguf.tensors import F16, Stored, Tensors, fitting_recipe, write
from ultralowbit.export.gguf.vocabulary import Vocabulary
from ultralowbit.nn.hf import load
from ultralowbit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ultralowbit.export.gguf.blocks import BlockType

log = logging.getLogger(__name__)

_OLDEST = (0, 19)
"""Of the gguf package: older ones lack names and keys of these architectures."""

_BLOCK_VERSION = 2
"""Of ggml's block types."""

_GROWN = 1.3
"""How much larger packed weights become without a word: scales for smaller groups alone make less."""


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
        model = _open(folder)
        target = architecture(model.config)
        stops = _listed(model.generation_config.eos_token_id if model.generation_config else None)
        vocabulary = Vocabulary.read(folder, model.get_input_embeddings().num_embeddings, stops)
        tensors = Tensors(model, folder, target, self.embeddings == "q8_0", self.dequantize)
        size = sum(tensor.bytes for tensor in tensors.stored)
        if (free := shutil.disk_usage(out.parent).free) < size:
            raise InputError(
                f"the file needs {size / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB left: make room, or choose "
                "another --out"
            )
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
    """llama.cpp's number for the type that most of the packed weights have."""
    weights: Counter[BlockType] = Counter()
    for tensor in tensors.stored:
        if tensor.block is not None:
            weights[tensor.block] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0].file_type if weights else F16


def _say_types(tensors: Tensors, progress: Progress) -> None:
    """Say which types packed weights get, and warn where that makes them much larger."""
    packed = [tensor for tensor in tensors.stored if tensor.block is not None]
    if not packed:
        return
    weights = sum(math.prod(tensor.shape) for tensor in packed)
    before = 8 * sum(tensor.packed_bytes for tensor in packed) / weights
    after = 8 * sum(tensor.bytes for tensor in packed) / weights
    counts = Counter(tensor.block.name for tensor in packed).most_common()
    progress.say(f"packed weights: {', '.join(f'{n} as {name}' for name, n in counts)}, {after:.3f} bits per weight")
    if after > _GROWN * before:
        log.warning(
            "the block types of llama.cpp that hold these weights exactly take %.3f bits per weight, %.3f in the "
            "checkpoint: %s", after, before, _why_larger(packed),
        )  # fmt: skip


def _why_larger(packed: list[Stored]) -> str:
    """Rows that the blocks of the recipe's own type do not divide, or another recipe."""
    recipe, kind = fitting_recipe(packed[0].format.claimed_bits)
    undivided = next((tensor for tensor in packed if tensor.shape[1] % kind.size), None)
    if undivided is not None:
        return f"rows of {undivided.shape[1]} columns are no whole blocks of {kind.name}, which have {kind.size}"
    return f"the recipe {recipe} makes weights for {kind.name}, {kind.bits:g} bits"
