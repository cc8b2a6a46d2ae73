"""Post-training quantization of causal language models to 1-4 true bits per weight.

Importing it is cheap, and lets transformers load packed checkpoints: `AutoModelForCausalLM.from_pretrained(DIR)` works
whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultralowbit.nn.hf import load
    from ultralowbit.pipeline.compress import compress
    from ultralowbit.recipe import Recipe

__all__ = ["Recipe", "__version__", "compress", "load"]

_HOMES = {"load": "ultralowbit.nn.hf", "compress": "ultralowbit.pipeline.compress", "Recipe": "ultralowbit.recipe"}
_REGISTERED_AFTER = {
    "transformers.quantizers.auto": "ultralowbit.nn.quantizer",
    "peft.tuners.lora.model": "ultralowbit.nn.lora",
}
"""Another package's module -> ours that registers what it should know, imported right after it."""


def __getattr__(name: str) -> Any:
    """What is public is imported when it is first used: torch alone takes more than a second."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("ultralowbit")
    raise AttributeError(f"module 'ultralowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Registering(importlib.abc.MetaPathFinder):
    """Imports one of our modules right after the module of another package that it registers something with."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(self.ours)

            spec.loader.exec_module = exec_module  # of this one module's own loader
        return spec


for _theirs, _ours in _REGISTERED_AFTER.items():
    if _theirs in sys.modules:
        importlib.import_module(_ours)
    else:
        sys.meta_path.insert(0, _Registering(_theirs, _ours))
