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
_REGISTRY = "transformers.quantizers.auto"


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
    """Registers the packed format right after transformers has imported its table of formats."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module("ultralowbit.nn.quantizer")

            spec.loader.exec_module = exec_module  # of this one module's own loader
        return spec


if _REGISTRY in sys.modules:
    importlib.import_module("ultralowbit.nn.quantizer")
else:
    sys.meta_path.insert(0, _Registering())
