"""Architectures that checkpoints are written for: what llama.cpp's code for them computes, and the keys that it reads.

Names of tensors come from the gguf package (`TensorNameMap`); keys are those that llama.cpp's own converter writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ultralowbit.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's code for an architecture does, where it differs from one to another.

    name: what llama.cpp calls it. neighbours: its rotary embedding turns neighbouring rows of a head of q and k, where
    transformers turns rows of its two halves. norm_offset: what transformers adds to the weights of norms. biases:
    modules whose bias it adds. windows: it knows layers that look back over a window only.
    """

    name: str
    activation: str = "silu"
    neighbours: bool = False
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ()
    windows: bool = False

    def faults(self, config: PreTrainedConfig) -> Iterator[str]:
        """What a model does otherwise than this code."""
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        if activation != self.activation:
            yield f"has the activation {activation!r}, expected {self.activation!r}"
        rope = rope_parameters(config)
        kind = rope.get("rope_type", "default")
        known = ("default", "longrope") if self.name == "phi3" else ("default", "linear", "llama3", "yarn")
        if kind not in known:
            yield f"has rotary embeddings of the type {kind!r}, expected one of {', '.join(known)}"
        elif kind == "yarn" and (other := rope.keys() - _YARN.keys() - _ROPE):
            yield f"has {', '.join(sorted(other))} of yarn, which it does not know"
        if self.name == "gemma3":
            yield from _gemma_faults(config)

    def describe(self, writer: GGUFWriter, config: PreTrainedConfig) -> None:
        """Add the keys that llama.cpp reads the shape of the model from."""
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        self._describe_rope(writer, config, head_size)
        self._describe_windows(writer, config)
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            writer.add_final_logit_softcapping(cap)

    def _describe_rope(self, writer: GGUFWriter, config: PreTrainedConfig, head_size: int) -> None:
        from gguf import RopeScalingType

        rope = rope_parameters(config)
        writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        kind = rope.get("rope_type", "default")
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
        if kind in ("yarn", "longrope") or self.name == "phi3":
            writer.add_rope_scaling_orig_ctx_len(_original_context(config))
        for key, method in _YARN.items() if kind == "yarn" else ():
            if key in rope and method:
                getattr(writer, method)(rope[key])
        if kind == "longrope":
            ratio, context = config.max_position_embeddings / _original_context(config), _original_context(config)
            factor = rope.get("attention_factor") or math.sqrt(1 + math.log(max(1.0, ratio)) / math.log(context))
            writer.add_rope_scaling_attn_factors(factor)

    def _describe_windows(self, writer: GGUFWriter, config: PreTrainedConfig) -> None:
        window = _window(config)
        if self.windows:
            writer.add_sliding_window(window)
            writer.add_sliding_window_pattern(_GEMMA_PERIOD)
            writer.add_rope_freq_base_swa(config.rope_parameters[_SLIDING]["rope_theta"])
        elif self.name == "phi3":
            writer.add_sliding_window(window)  # 0 tells Phi-4 from Phi-3
        if window and not self.windows and window < config.max_position_embeddings:
            log.warning(
                "layers of this model look back over %d tokens, in llama.cpp over all of them: texts longer than that "
                "will differ", window,
            )  # fmt: skip

    def rope_tensors(self, config: PreTrainedConfig) -> dict[str, Tensor]:
        """Factors that frequencies are divided by, as tensors of the file: fp32 [rotated channels / 2]."""
        rope = rope_parameters(config)
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            return {
                f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
                for length in ("long", "short")
            }
        if kind != "llama3":
            return {}
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        count = len(frequencies)
        plain = rope["rope_theta"] ** -(torch.arange(count, dtype=torch.float32) / count)
        return {"rope_freqs.weight": plain / frequencies}

    def row_order(self, name: str, rows: int, config: PreTrainedConfig) -> Tensor | None:
        """The row of transformers' weight or bias that comes to each place in llama.cpp's; None where all stay."""
        module = name.split(".")[-2]
        if not self.neighbours or module not in ("q_proj", "k_proj"):
            return None
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


ARCHITECTURES = {
    "llama": Architecture(
        "llama", neighbours=True,
        biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "mistral": Architecture("llama", neighbours=True),
    "qwen2": Architecture("qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture("gemma3", activation="gelu_pytorch_tanh", norm_offset=1.0, windows=True),
    "phi3": Architecture("phi3"),
}  # fmt: skip
"""transformers' `model_type` -> llama.cpp's architecture."""

_GEMMA_PERIOD = 6
"""llama.cpp's code for Gemma 3 has a layer that sees all tokens after five that see a window."""

_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

_YARN = {
    "factor": None,
    "original_max_position_embeddings": None,
    "beta_fast": "add_rope_scaling_yarn_beta_fast",
    "beta_slow": "add_rope_scaling_yarn_beta_slow",
}
"""Parameters of yarn -> how they are added; None for those that other kinds have too."""


def architecture(config: PreTrainedConfig) -> Architecture:
    """llama.cpp's architecture for a model; `InputError` where it has none that computes the same."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(
            f"the exporter gguf does not know the architecture {kind!r}, expected one of {', '.join(ARCHITECTURES)}: "
            "export to dense, and convert that with llama.cpp's own converter"
        )
    fault = next(ARCHITECTURES[kind].faults(config), None)
    if fault:
        raise InputError(f"the model {fault}, and llama.cpp computes nothing else for {kind}: export to dense instead")
    return ARCHITECTURES[kind]


def rope_parameters(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The parameters of the rotary embedding, of layers that see all tokens where there are two kinds."""
    rope = config.rope_parameters
    return rope.get(_FULL, rope)


def _original_context(config: PreTrainedConfig) -> int:
    """Positions that the model was trained on before they were stretched."""
    own = rope_parameters(config).get("original_max_position_embeddings")
    return own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings


def _window(config: PreTrainedConfig) -> int:
    """Tokens that layers with a sliding window look back over, 0 where no layer has one."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    return 0 if kinds is not None and _SLIDING not in kinds else window


def _gemma_faults(config: PreTrainedConfig) -> Iterator[str]:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield "caps the logits of attention"
    if getattr(config, "use_bidirectional_attention", False):
        yield "looks at later tokens too"
    # the one size whose queries llama.cpp scales by another number, which it knows by its depth
    size = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    if config.query_pre_attn_scalar != size:
        yield f"scales queries by {config.query_pre_attn_scalar} ** -0.5, expected {size}"
    expected = [_SLIDING if (i + 1) % _GEMMA_PERIOD else _FULL for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != expected:
        yield "has layers that see all tokens in other places than every sixth"
    if config.rope_parameters[_SLIDING].get("rope_type", "default") != "default":
        yield "stretches the positions of layers with a window"
