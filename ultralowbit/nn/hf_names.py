"""The only file that uses what transformers does not document: the names under which weights are stored and tied, how
it joins the weights of experts, the keyword of the cache, what lets `generate` compile on any device, and accelerate's
hooks on modules.
`tests/nn/test_hf_names.py` says what each needs, from 5.10 on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from ultralowbit.checkpoint.names import natural
from ultralowbit.format.words import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


def match_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name of each tensor of the model that a checkpoint holds -> its key there: with transformers' own renamings
    (GPT-NeoX's `embed_out` is `lm_head` to it), and with or without the base model's prefix."""
    return _match_names(model, _renamed(model, keys))


def match_stored(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], dict[str, Joined]]:
    """What `match_keys` gives, and the name of each tensor of the model that transformers makes of several tensors of a
    checkpoint -> how."""
    renamed = _renamed(model, keys)
    return _match_names(model, renamed), _match_parts(model, renamed)


def _match_names(model: PreTrainedModel, renamed: Mapping[str, str]) -> dict[str, str]:
    renamed = {name: key for key, name in renamed.items()}
    key_of = {}
    for name in model.state_dict():
        key = next((k for k in _with_and_without_prefix(model, name) if k in renamed), None)
        if key is not None:
            key_of[name] = renamed[key]
    return key_of


class Joined(NamedTuple):
    """A tensor of the model that a checkpoint holds in parts, such as the weight of each expert."""

    name: str
    converter: WeightConverter
    parts: dict[str, list[str]]
    """The converter's patterns -> the keys that match, in the order in which they are joined."""

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.parts.values() for key in keys]

    def spec(self, specs: Mapping[str, TensorSpec]) -> TensorSpec:
        """Dtype and shape of the tensor, of those of its parts by key."""
        parts = {key: torch.empty(specs[key].shape, dtype=specs[key].dtype, device="meta") for key in self.keys}
        joined = self.join(parts)
        return TensorSpec(joined.dtype, tuple(joined.shape))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor of the model, of its parts by key."""
        converter = deepcopy(self.converter)
        for pattern, keys in self.parts.items():
            for key in keys:
                converter.add_tensor(self.name, key, pattern, tensors[key])
        (joined,) = converter.convert(self.name).values()
        return joined[0] if isinstance(joined, list) else joined


def _match_parts(model: PreTrainedModel, renamed: Mapping[str, str]) -> dict[str, Joined]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    converters = [t for t in converters if len(t.target_patterns) == 1]
    joined: dict[str, Joined] = {}
    for key, name in sorted(renamed.items(), key=lambda item: natural(item[1])) if converters else ():
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                parts = joined.setdefault(target, Joined(target, converter, {})).parts
                parts.setdefault(pattern, []).append(key)
                break
    names = {name: _with_and_without_prefix(model, name) for name in model.state_dict() if joined}
    return {name: joined[n] for name, others in names.items() for n in others if n in joined}


def _renamed(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Key in a checkpoint -> what transformers renames it to."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    renamed = {}
    for key in keys:
        renamed[key] = key
        for renaming in renamings:
            renamed[key], _ = renaming.rename_source_key(renamed[key])
    return renamed


def _with_and_without_prefix(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """The names that a tensor of the model may have, its own first."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What transformers would save of a model, by the keys that it would have: each expert's weights are its own."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


class ExpertsLayout(NamedTuple):
    """How a module of transformers keeps the weights of all its experts, each projection in one tensor."""

    projections: tuple[str, str]
    """The names of the tensors [experts, out, in] that a token is multiplied by, one after the other."""
    transposed: bool
    """They are [experts, in, out]."""
    has_bias: bool
    """Each has a `NAME_bias` [experts, out] beside it."""
    activation: str
    """The name of what the module calls between the two products."""


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout of a module of fused experts; None for any other module, and for experts with a norm of their own."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "_apply_gate"):
        return None
    first = "gate_up_proj" if module.has_gate else "up_proj"
    fused = all(getattr(module, name, None) is not None for name in (first, "down_proj"))
    if not fused or getattr(module, "has_post_expert_norm", False):
        return None
    activation = "_apply_gate" if module.has_gate else "act_fn"
    return ExpertsLayout((first, "down_proj"), module.is_transposed, module.has_bias, activation)


def cast_to(model: nn.Module) -> set[str]:
    """The names of the modules to the dtype of whose weights a model's own code casts: packed words are of none that
    hidden states can have."""
    return {
        f"{name}.{leaf}".removeprefix(".") for name, m in model.named_modules() for leaf in _cast_to(type(m).forward)
    }


@cache
def _cast_to(forward: Callable[..., Any]) -> list[str]:
    try:
        return re.findall(r"\.to\(self\.(\w+)\.weight\.dtype\)", inspect.getsource(forward))
    except (OSError, TypeError):  # there is no source
        return []


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Name of each weight that is tied -> the name of the one that it is tied to."""
    return model.all_tied_weights_keys


def untie(model: PreTrainedModel, source: str) -> None:
    """Let transformers tie nothing to the weight of this name any more."""
    model._tied_weights_keys = {name: other for name, other in model._tied_weights_keys.items() if other != source}
    model.all_tied_weights_keys = {name: other for name, other in tied_names(model).items() if other != source}


def separate(model: PreTrainedModel, name: str) -> None:
    """Give a tied weight, by name, an empty one of its own on meta."""
    untie(model, tied_names(model)[name])
    module = model.get_submodule(name.rpartition(".")[0])
    module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)


def retie(model: PreTrainedModel) -> None:
    """Undo every `untie`."""
    del model._tied_weights_keys
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls the keys and values of earlier tokens: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def leave_uninitialized(tensor: Tensor) -> None:
    """Let transformers draw no random values for a tensor, wherever it is when a model's weights are initialized."""
    tensor._is_hf_initialized = True


def onloaded(module: nn.Module) -> AbstractContextManager[None]:
    """Where the tensors that accelerate has offloaded of a module, such as to a disk, are there as in its forward."""
    hook = getattr(module, "_hf_hook", None)
    return nullcontext() if hook is None else _onloaded(module, hook)


@contextmanager
def _onloaded(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def without_hook(module: nn.Module) -> nn.Module:
    """A shallow copy of a module, without the hook that accelerate may have put on it."""
    copied = copy(module)
    for name in ("_hf_hook", "_old_forward", "forward"):
        copied.__dict__.pop(name, None)
    return copied


def compiled_steps() -> CompileConfig:
    """What `generate` is told so that a step is one graph: on a GPU a CUDA graph, and compiled on a CPU too."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    config._compile_all_devices = True
    return config
