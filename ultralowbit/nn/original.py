"""What a checkpoint has to be so that it can be compressed: a config that transformers reads, whole weights in 16 bits
or more, and no adapter beside them.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from ultralowbit.checkpoint.files import Source
from ultralowbit.errors import InputError, reason


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config; raises `InputError` where transformers cannot read it, or where it is quantized already."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:  # any value of any type can stand there, and each class trips over it in its own way
        if not trust_remote_code and "trust_remote_code" in str(e):
            raise InputError(
                f"{folder} is built by Python code that comes with it: read the code, and give --trust-remote-code if "
                "you trust it"
            ) from e
        raise InputError(f"{folder}/config.json is not one that transformers can read ({reason(e)}): correct it") from e
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(f"{folder} is already quantized ({method}): compress the original checkpoint instead")
    return config


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
