"""transformers integration: `quant_method: ultralowbit` in a config.json, and `load()`.

Importing this module registers the method, so that `AutoModelForCausalLM.from_pretrained(DIR)` works. Loading fails
closed: every tensor of the model must be in the files with the dtype and shape that the config promises, or it raises.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ultralowbit.checkpoint.config import QUANT_METHOD
from ultralowbit.checkpoint.files import read_headers
from ultralowbit.errors import CheckpointError
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.nn.linear import PackedLinear, swap


def _malformed(error: Exception) -> CheckpointError:
    return CheckpointError(f"the quantization_config is malformed ({error!r}): the config.json was edited or cut")


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
            raise _malformed(e) from e

    @classmethod
    def of(cls, formats: Mapping[str, Format], recipe: str | None = None) -> UltraLowBitConfig:
        """From the format of each packed module."""
        distinct = {format.summary: format.to_dict() for format in formats.values()}
        return cls({name: format.summary for name, format in formats.items()}, distinct, recipe)

    def module_formats(self) -> dict[str, Format]:
        """The format of each packed module; raises `FormatError` where this release cannot read one."""
        try:
            formats = {key: Format.from_dict(value) for key, value in self.formats.items()}
            return {name: formats[key] for name, key in self.modules.items()}
        except (KeyError, TypeError, AttributeError) as e:
            raise _malformed(e) from e


@register_quantizer(QUANT_METHOD)
class UltraLowBitQuantizer(HfQuantizer):
    """Puts a `PackedLinear` wherever the config names one; the shards then fill it as they fill any module."""

    requires_calibration = True
    required_packages: tuple[str, ...] = ()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.module_formats()  # an unreadable format stops here, before anything is built

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        modules = dict(model.named_modules())
        for name, format in self.quantization_config.module_formats().items():
            # AutoModel builds the same decoder without the head's prefix
            names = (name, name.removeprefix(f"{model.base_model_prefix}."))
            found = next((n for n in names if isinstance(modules.get(n), nn.Linear | Conv1D)), None)
            if found is None:
                raise CheckpointError(
                    f"config.json lists {name} as packed, which is no Linear of {type(model).__name__}: "
                    "the config.json was edited, or belongs to another model"
                )
            swap(model, found, PackedLinear.replacing(modules[found], format))
        if checkpoint_files is None:
            raise CheckpointError("a packed model is loaded from its safetensors files, not from a state_dict")
        check_files(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                swap(model, name, module.dense(dtype or model.dtype))
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters: packed_matmul passes gradients to its input

    @property
    def is_compileable(self) -> bool:
        return True


def match_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name of each tensor of the model that a checkpoint holds -> its key there: with transformers' own renamings
    (GPT-NeoX's `embed_out` is `lm_head` to it), and with or without the base model's prefix."""
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    renamed = {apply_renamings(key, renamings): key for key in keys}
    found = {}
    for name in model.state_dict():
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in renamed), None)
        if key is not None:
            found[name] = renamed[key]
    return found


def check_files(model: PreTrainedModel, files: list[str]) -> None:
    """Raise `CheckpointError` unless every tensor of the model is in the files, as the model expects it."""
    found = read_headers(files)
    key_of = match_keys(model, found)
    packed = {
        f"{name}.{suffix}": spec
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for suffix, spec in module.format.tensors(module.out_features, module.in_features).items()
    }
    problems = []
    for name, tensor in model.state_dict().items():
        stored = found.get(key_of.get(name))
        if stored is None:
            if name not in model.all_tied_weights_keys:
                problems.append(f"{name} is missing")
        elif stored.shape != tuple(tensor.shape):
            problems.append(f"{name} has shape {list(stored.shape)}, expected {list(tensor.shape)}")
        elif name in packed and stored.dtype != packed[name].dtype:
            problems.append(f"{name} has dtype {stored.dtype}, expected {packed[name].dtype}")
        elif stored.dtype is None or stored.dtype.is_floating_point != tensor.dtype.is_floating_point:
            problems.append(f"{name} has dtype {stored.dtype}, expected {tensor.dtype}")
    # a part that the format leaves out would change what the others mean
    modules = {key.rpartition(".")[0] for name, key in key_of.items() if name in packed}
    problems += [
        f"{key} is no part of the format of its module"
        for key in sorted(found.keys() - set(key_of.values()))
        if key.rpartition(".")[0] in modules
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the checkpoint does not hold the model that its config.json describes: {'; '.join(problems[:3])}{more}; "
            "copy it again, or compress again"
        )


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls the keys and values of earlier tokens: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def pack_model(
    model: PreTrainedModel, packed: Mapping[str, PackedWeight], recipe: str | None = None
) -> PreTrainedModel:
    """Replace the named Linears of a model in memory by packed ones, in place; `save_pretrained` then writes a
    checkpoint that `load` reads."""
    config = UltraLowBitConfig.of({name: p.format for name, p in packed.items()}, recipe)
    for name, weight in packed.items():
        module = PackedLinear.replacing(model.get_submodule(name), weight.format)
        module.fill(weight)
        swap(model, name, module)
    quantizer = UltraLowBitQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    quantizer.postprocess_model(model)
    return model


def load(
    path: str | Path, activations: Literal["exact", "int8"] = "exact", fuse: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a packed checkpoint, from a folder or the hub, ready to run.

    activations: "int8" lets packed Linears round their inputs to 8 bits where that is faster (on a CPU). fuse: Linears
    that share an input, such as q, k and v, or gate and up, are multiplied at once. kwargs go to
    `AutoModelForCausalLM.from_pretrained` (`device_map`, `dtype`, `attn_implementation`, ...); the dtype is what
    config.json names unless given. Raises `CheckpointError` or `FormatError`, naming what is missing, truncated, of the
    wrong shape or from a newer release; never returns a model with a weight that was not loaded.
    """
    if activations not in ("exact", "int8"):
        raise ValueError(f"activations is {activations!r}, expected 'exact' or 'int8'")
    folder = Path(path)
    if folder.exists():
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{folder} holds no readable config.json ({e}): is it a checkpoint folder?") from e
        packing = config.get("quantization_config") if isinstance(config, dict) else None
        method = packing.get("quant_method") if isinstance(packing, dict) else None
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"{folder} is not a packed checkpoint (its quant_method is {method!r}): make one with "
                f"`ultralowbit compress {folder} --recipe NAME --out DIR`"
            )
    model = AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.int8 = activations == "int8"
    if fuse:
        from ultralowbit.nn.fused import fuse as fuse_linears  # it looks at decoders, which are matched here

        fuse_linears(model)
    return model


__all__ = ["CheckpointError", "UltraLowBitConfig", "UltraLowBitQuantizer", "load", "pack_model"]
