"""Loading packed checkpoints, and making packed models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ultralowbit.checkpoint.config import CONFIG, QUANT_METHOD, read_config_json
from ultralowbit.checkpoint.files import refuse_missing_folder, weight_files
from ultralowbit.checkpoint.names import expert_of
from ultralowbit.errors import CheckpointError, InputError, naming_memory, reason
from ultralowbit.format.weight import PackedWeight
from ultralowbit.nn import fused
from ultralowbit.nn.experts import Experts, separate_experts
from ultralowbit.nn.hf_names import compiled_steps
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.nn.quantizer import UltraLowBitConfig, UltraLowBitQuantizer, check_config, pack_module


def pack_model(
    model: PreTrainedModel, packed: Mapping[str, PackedWeight], recipe: str | None = None
) -> PreTrainedModel:
    """Replace the named Linears and embeddings of a model in memory by packed ones, in place; `save_pretrained` then
    writes a checkpoint that `load` reads."""
    config = UltraLowBitConfig.of({name: p.format for name, p in packed.items()}, recipe)
    mixtures = {place[0] for place in map(expert_of, packed) if place is not None}
    experts = separate_experts(model, mixtures.__contains__)
    for mixture in experts.values():
        mixture.make_linears()
    for name, weight in packed.items():
        pack_module(model, name, weight.format).fill(weight)
    for mixture in experts.values():
        mixture.drop_dense()
    quantizer = UltraLowBitQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    quantizer.postprocess_model(model)
    return model


def check_checkpoint(folder: Path) -> None:
    """Raise what `load` would raise for a folder, but for values that cannot be; only the files' headers are read."""
    _check_configs(folder)
    config = AutoConfig.from_pretrained(folder)
    packing = UltraLowBitConfig.from_dict(dict(config.quantization_config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    UltraLowBitQuantizer(packing, pre_quantized=True).preprocess_model(
        model, dtype=config.dtype, checkpoint_files=list(map(str, weight_files(folder)))
    )


def _check_configs(folder: Path) -> None:
    """Raise `CheckpointError` unless config.json is that of a packed checkpoint and belongs to the weights, and
    transformers can read the generation_config.json."""
    packing = read_config_json(folder).get("quantization_config")
    method = packing.get("quant_method") if isinstance(packing, dict) else None
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"{folder} is not a packed checkpoint (its quant_method is {method!r}): make one with "
            f"`ultralowbit compress {folder} --recipe NAME --out DIR`"
        )
    check_config(weight_files(folder))  # before transformers builds what an edited one describes
    _check_generation_config(folder)


def _check_generation_config(folder: Path) -> None:
    """Raise `CheckpointError` where there is a generation_config.json that transformers would trip over."""
    if not (folder / GENERATION_CONFIG_NAME).exists():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as e:  # any value of any type can stand there
        raise CheckpointError(f"{folder / GENERATION_CONFIG_NAME} cannot be read ({reason(e)}): copy it again") from e


def _check_name(name: str, options: Mapping[str, Any]) -> None:
    """Raise `InputError` for the name of a folder that is not there, and where the hub cannot be asked for it:
    transformers would try for a minute."""
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    refuse_missing_folder(name)
    if options.get("local_files_only"):
        return
    file, revision = "/".join(filter(None, (options.get("subfolder"), CONFIG))), options.get("revision")
    try:
        if not isinstance(try_to_load_from_cache(name, file, options.get("cache_dir"), revision), str):
            file_exists(name, file, revision=revision, token=options.get("token"))
    except (HfHubHTTPError, HFValidationError):  # of what the hub answers transformers has more to say
        return
    except Exception as error:  # of whichever library connects
        raise InputError(
            f"there is no folder {name!r}, and the hub cannot be reached for it ({reason(error)}): connect, or give a "
            "local folder"
        ) from error


def load(
    path: str | Path,
    activations: Literal["exact", "int8"] = "exact",
    fuse: bool = False,
    compile: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a packed checkpoint, from a folder or the hub, ready to run.

    activations: "int8" lets packed Linears round their inputs to 8 bits where that is faster (on a CPU). fuse: Linears
    that share an input, such as q, k and v, or gate and up, are multiplied at once. compile: `generate` keeps a cache
    of fixed size and runs each step as one compiled graph; `torch.compile` then takes its time at the first call of
    every batch size and length. kwargs go to `AutoModelForCausalLM.from_pretrained` (`device_map`, `dtype`,
    `attn_implementation`, ...); the dtype is what config.json names unless given.

    Raises `CheckpointError` or `FormatError`, naming what is missing, truncated, of the wrong shape or from a newer
    release; never returns a model with a weight that was not loaded. `InputError` for a name under which there is
    nothing, and where a mixture of experts is to be compiled.
    """
    if activations not in ("exact", "int8"):
        raise ValueError(f"activations is {activations!r}, expected 'exact' or 'int8'")
    if (folder := Path(path)).exists():
        _check_configs(folder)
    else:
        _check_name(str(path), kwargs)
    with naming_memory(f"loading {path}"):
        model = AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.int8 = activations == "int8"
    if fuse:
        fused.fuse(model)
    if compile:
        if any(isinstance(module, Experts) for module in model.modules()):
            raise InputError(
                f"{path} is a mixture of experts, whose steps are not compiled yet: load it without compile"
            )
        model.generation_config.__class__ = _CompilingConfig
        model.generation_config.cache_implementation = "static"
        model.generation_config.compile_config = compiled_steps()
    return model


class _CompilingConfig(GenerationConfig):
    """That of a model whose steps are compiled, which is no part of a checkpoint."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        here = {name: self.__dict__[name] for name in ("cache_implementation", "compile_config")}
        self.update(**dict.fromkeys(here))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.update(**here)
