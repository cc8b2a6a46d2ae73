"""A plain transformers checkpoint: the weights that the packed bytes mean, in the dtype of the original."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ultralowbit.checkpoint.manifest import MANIFEST, read_manifest
from ultralowbit.checkpoint.storage import follow_umask
from ultralowbit.export.base import Exporter
from ultralowbit.nn.hf import load
from ultralowbit.progress import Progress


@dataclass(frozen=True)
class DenseExporter(Exporter):
    """Everything but the packed weights is taken over as it is: tokenizer, chat templates, code, licence."""

    def export(self, folder: Path, out: Path, progress: Progress) -> None:
        """Write the dequantized model and its tokenizer into the folder `out`."""
        manifest = read_manifest(folder)
        progress.start("writing the dense model", 1)
        load(folder).dequantize().save_pretrained(out)
        follow_umask(*out.iterdir())
        written = {path.name for path in out.iterdir()} | {MANIFEST, "recipe.yaml", "config.json"}
        for name in manifest["files"]:
            if name not in written and not name.endswith((".safetensors", ".safetensors.index.json")):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, out / name)
        progress.step()
