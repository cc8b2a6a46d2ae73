"""The only file that uses what transformers does not document: the names under which weights are stored and tied, the
keyword of the cache, and what lets `generate` compile on any device. `tests/nn/test_hf_names.py` says what each needs,
from 5.10 on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn
from transformers import CompileConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def match_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name of each tensor of the model that a checkpoint holds -> its key there: with transformers' own renamings
    (GPT-NeoX's `embed_out` is `lm_head` to it), and with or without the base model's prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    renamed = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        renamed[name] = key
    prefix = f"{model.base_model_prefix}."
    key_of = {}
    for name in model.state_dict():
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in renamed), None)
        if key is not None:
            key_of[name] = renamed[key]
    return key_of


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Name of each weight that is tied -> the name of the one that it is tied to."""
    return model.all_tied_weights_keys


def untie(model: PreTrainedModel, source: str) -> None:
    """Let transformers tie nothing to the weight of this name any more."""
    model._tied_weights_keys = {name: other for name, other in model._tied_weights_keys.items() if other != source}
    model.all_tied_weights_keys = {name: other for name, other in tied_names(model).items() if other != source}


def retie(model: PreTrainedModel) -> None:
    """Undo every `untie`."""
    del model._tied_weights_keys
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls the keys and values of earlier tokens: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def compiled_steps() -> CompileConfig:
    """What `generate` is told so that a step is one graph: on a GPU a CUDA graph, and compiled on a CPU too."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    config._compile_all_devices = True
    return config
