"""What transformers is told of packed checkpoints: `quant_method: ultralowbit` in a config.json.

Importing this module registers the method. It names only what `transformers.quantizers.auto` has itself imported by
then, since it is imported right after that (see `ultralowbit/__init__.py`). Loading fails closed: every tensor of the
model must be in the files with the dtype and shape that the config promises, and the config must be the one that was
written with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ultralowbit.checkpoint.check import by_module, weight_mismatches
from ultralowbit.checkpoint.config import (
    CONFIG,
    DIGEST,
    QUANT_METHOD,
    TENSORS_DIGEST,
    config_digest,
    malformed,
    module_formats,
    tensors_digest,
)
from ultralowbit.checkpoint.files import read_headers, read_metadata, read_raw_header
from ultralowbit.checkpoint.names import expert_of
from ultralowbit.checkpoint.storage import read_json
from ultralowbit.errors import CheckpointError, FormatError
from ultralowbit.format.weight import Format
from ultralowbit.format.words import TensorSpec
from ultralowbit.nn.embedding import PackedEmbedding, pack_embedding, unpack_embedding
from ultralowbit.nn.experts import ExpertLinear, Experts, separate_experts
from ultralowbit.nn.hf_names import leave_uninitialized, match_stored, tied_names
from ultralowbit.nn.linear import PackedLinear, PackedModule, swap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class UltraLowBitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint.

    modules: name of each packed Linear -> key in `formats`; formats: key -> `Format.to_dict()`; recipe: its name.
    """

    def __init__(
        self,
        modules: Mapping[str, str] | None = None,
        formats: Mapping[str, Mapping[str, Any]] | None = None,
        recipe: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.recipe = recipe
        try:
            self.formats = {key: dict(value) for key, value in (formats or {}).items()}
            self.modules = dict(modules or {})
        except (TypeError, ValueError, AttributeError) as e:
            raise malformed(repr(e)) from e

    @classmethod
    def of(cls, formats: Mapping[str, Format], recipe: str | None = None) -> UltraLowBitConfig:
        """From the format of each packed module."""
        distinct = {format.summary: format.to_dict() for format in formats.values()}
        return cls({name: format.summary for name, format in formats.items()}, distinct, recipe)

    def module_formats(self) -> dict[str, Format]:
        """The format of each packed module; raises `FormatError` where this release cannot read one."""
        return module_formats(self.modules, self.formats)


@register_quantizer(QUANT_METHOD)
class UltraLowBitQuantizer(HfQuantizer):
    """Puts a packed module wherever the config names one; the shards then fill it as they fill any module."""

    requires_calibration = True
    required_packages: tuple[str, ...] = ()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.module_formats()  # an unreadable format stops here, before anything is built

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if checkpoint_files is None:
            raise CheckpointError("a packed model is loaded from its safetensors files, not from a state_dict")
        check_config([Path(file) for file in checkpoint_files])
        formats = self.quantization_config.module_formats()
        # AutoModel builds the same decoder without the head's prefix, and without the head
        prefix = f"{model.base_model_prefix}."
        mixtures = {place[0].removeprefix(prefix) for place in map(expert_of, formats) if place is not None}
        experts = separate_experts(model, lambda name: name.removeprefix(prefix) in mixtures)
        for module in experts.values():
            module.make_linears()
        modules = dict(model.named_modules())
        kinds = nn.Linear | Conv1D | nn.Embedding | ExpertLinear
        for name, format in formats.items():
            own = next((n for n in (name, name.removeprefix(prefix)) if isinstance(modules.get(n), kinds)), None)
            if own is None:
                raise CheckpointError(
                    f"config.json lists {name} as packed, which is no Linear of {type(model).__name__}: "
                    "the config.json was edited, or belongs to another model"
                )
            pack_module(model, own, format)
        for module in experts.values():
            module.drop_dense()
        check_files(model, checkpoint_files)
        for module in model.modules():
            if isinstance(module, PackedModule):
                leave_uninitialized(module.weight)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PackedModule) and not module.weight.is_meta:  # what is on a disk is not read here
                try:
                    module.format.check_values(module.packed.tensors)
                except FormatError as e:
                    raise CheckpointError(f"{name}.{e}") from e
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = dtype or model.dtype
        if isinstance(dtype, str):  # as a config.json has it
            dtype = getattr(torch, dtype)
        for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, Experts)]:
            swap(model, name, module.dense(dtype))
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedEmbedding):
                unpack_embedding(model, name, dtype)
            elif isinstance(module, PackedLinear):
                swap(model, name, module.dense(dtype))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Ties the weights that `save_pretrained` writes to the config.json beside them."""
        config = json.loads(model.config.to_json_string()) | {"dtype": str(model.dtype).removeprefix("torch.")}
        return None, {DIGEST: config_digest(config)}

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters: packed_matmul passes gradients to its input

    @property
    def is_compileable(self) -> bool:
        return True


def pack_module(model: PreTrainedModel, name: str, format: Format) -> PackedModule:
    """Put a packed module on meta where a Linear, a Conv1D or an embedding is in the model."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        return pack_embedding(model, name, format)
    packed = PackedLinear.replacing(module, format)
    swap(model, name, packed)
    return packed


def check_config(files: Sequence[Path]) -> None:
    """Raise `CheckpointError` unless config.json and the headers of the files are as they were written together."""
    config = read_json(files[0].parent / CONFIG)
    for file in files:
        metadata = read_metadata(file)
        written_with = metadata.get(DIGEST)
        if written_with != config_digest(config):
            found = f"{file} does not say with which {CONFIG} it was written"
            if written_with is not None:
                found = (
                    f"{file.with_name(CONFIG)} is not the one that {file.name} was written with, so one of them was "
                    "edited or comes from another checkpoint"
                )
            raise CheckpointError(f"{found}: copy both again, or compress again")
        header = metadata.get(TENSORS_DIGEST)  # what `save_pretrained` wrote has none
        if header is not None and header != tensors_digest(read_raw_header(file)[0]):
            raise CheckpointError(f"the header of {file} has changed since it was written: copy it again")


def check_files(model: PreTrainedModel, files: Sequence[str | Path]) -> None:
    """Raise `CheckpointError` unless every tensor of the model is in the files, as the model expects it."""
    stored = read_headers(files)
    key_of, joined = match_stored(model, stored)
    modules, problems, packed = by_module(stored), [], set()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            packed |= {f"{name}.{tensor}" for tensor in module.format.row_axes}
            own = modules.get(key_of.get(f"{name}.weight", name).rpartition(".")[0], {})
            problems += weight_mismatches(name, module.format, module.out_features, own)
    for name, tensor in model.state_dict().items():
        spec = stored.get(key_of.get(name))
        if name in packed:
            continue
        if spec is None:
            if name not in tied_names(model) and name not in joined:
                problems.append(f"{name} is missing")
        elif (
            spec.shape != tuple(tensor.shape)
            or spec.dtype is None
            or spec.dtype.is_floating_point != tensor.dtype.is_floating_point
        ):
            problems.append(f"{name} is {spec}, expected {TensorSpec(tensor.dtype, tuple(tensor.shape))}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the checkpoint does not hold the model that its config.json describes: {'; '.join(problems[:3])}{more}; "
            "copy it again, or compress again"
        )
