"""LoRA adapters of peft on packed Linears: the packed weights stay frozen, gradients pass through them to the inputs.

Importing this module registers `PackedLora` with every LoRA that peft puts on a model with packed Linears; it is
imported right after peft's own tuner (see `ultralowbit/__init__.py`), and never without peft.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora.config import LoraConfig  # peft itself is not whole yet
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from ultralowbit.errors import InputError
from ultralowbit.nn.linear import PackedLinear

_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not read the weight under the adapter."""

_READING = ("use_dora", "arrow_config", "velora_config", "monteclora_config", "kasa_config")
"""Options of a `LoraConfig` that read, or change, the weight under the adapter."""


class PackedLora(LoraLinear):
    """A LoRA adapter on a `PackedLinear`: y = packed(x) + scaling * B(A(x)), for x [..., in] and y [..., out].

    Raises `InputError` for variants of LoRA that need the weight itself, and for merging.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        needing = [name for name in _READING if getattr(config, name, None)]
        if config.init_lora_weights not in _STARTS:
            needing.append(f"init_lora_weights={config.init_lora_weights!r}")
        if needing:
            raise InputError(f"{needing[0]} needs dense weights, these are packed: leave it out of the LoraConfig")
        config.fan_in_fan_out = False  # packed weights are [out, in], those of a Conv1D too
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # peft reads the sizes of such layers all right
            super().__init__(base_layer, adapter_name, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise InputError(
            "an adapter cannot be merged into packed weights: keep it beside them, or call dequantize() on the model "
            "before the adapter is put on"
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        return (self.lora_B[adapter].weight @ self.lora_A[adapter].weight) * self.scaling[adapter]  # [out, in]


_inject = LoraModel.inject_adapter


def _inject_adapter(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """peft's own, for models with packed Linears told of them; "all-linear" then means those too."""
    packed = {name.removesuffix(".base_layer") for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if packed:
        config = self.peft_config[adapter_name]
        config._register_custom_module({PackedLinear: PackedLora})
        if config.target_modules == "all-linear":
            config.target_modules = packed | set(_maybe_include_all_linear_layers(config, model).target_modules)
    return _inject(self, model, adapter_name, *args, **kwargs)


LoraModel.inject_adapter = _inject_adapter
