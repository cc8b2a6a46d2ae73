"""What a checkpoint has to be so that it can be compressed: a config that transformers reads and can build, whole
weights in 16 bits or more, and no adapter beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ultralowbit.checkpoint.files import Source
from ultralowbit.errors import InputError, reason


def read_any_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model, packed or not; raises `InputError` where transformers cannot read it."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:  # any value of any type can stand there, and each class trips over it in its own way
        if not trust_remote_code and "trust_remote_code" in str(e):
            raise InputError(
                f"{folder} is built by Python code that comes with it: read the code, and give --trust-remote-code if "
                "you trust it"
            ) from e
        raise InputError(f"{folder}/config.json is not one that transformers can read ({reason(e)}): correct it") from e


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model to compress; raises `InputError` where it is quantized already too."""
    config = read_any_config(folder, trust_remote_code)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(f"{folder} is already quantized ({method}): {_instead(folder, method)}")
    return config


DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Formats in which models are published that have no other -> what tells transformers to make 16 bits of them."""


def _instead(folder: Path, method: object) -> str:
    """What to do about a model that is quantized already."""
    instead = "compress the original checkpoint instead"
    if made := DEQUANTIZED.get(str(method)):
        loaded = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, quantization_config={made}(dequantize=True))"
        instead += f", or what transformers makes of this one with {loaded} and save_pretrained"
    return instead


class _EmptyOnMeta(TorchFunctionMode):
    """Makes what `torch.empty` gives on meta: parameters, before they are filled. What buffers are computed from, such
    as `torch.arange`, stays real."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, its parameters on meta and its buffers real, in the memory of its buffers.

    accelerate moves each parameter to meta once it is there, and the experts of one layer can be 30 GB: they are made
    there. Raises whatever the model's class does.
    """
    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        # it notes the compute dtype in the config, which is to keep the stored one
        return AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        ).eval()


def refuse_adapters(folder: Path) -> None:
    """Raise `InputError` where an adapter lies beside the weights: transformers would apply it, packing would not."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter beside the weights (adapter_config.json): merge the adapter first, with peft's "
            "merge_and_unload and save_pretrained, or move it away"
        )


def refuse_codes(source: Source) -> None:
    """Raise `InputError` where the weights are codes of another quantization, whatever its config says."""
    signs = (".weight_scale", ".weight_scale_inv", ".qweight", ".weight_packed", ".qzeros", ".scales")
    for name, spec in source.specs.items():
        coded = len(spec.shape) >= 2 and name.endswith("weight")
        coded = coded and (spec.dtype is None or not spec.dtype.is_floating_point or spec.dtype.itemsize < 2)
        if coded or name.endswith(signs):
            stored = "a dtype that torch has none for" if spec.dtype is None else str(spec.dtype).removeprefix("torch.")
            raise InputError(
                f"{source.folder} holds codes of another quantization ({name} is {stored}), not weights: compress the "
                "original checkpoint instead"
            )
