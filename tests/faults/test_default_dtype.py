"""A program that has set torch's default dtype gets the same bytes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ultralowbit
from ultralowbit.pipeline.compress import compress

SHARD = "model.safetensors"
FACTORIES = {f"torch.{name}" for name in ("zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn")}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def default_dtype(request) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def test_the_default_dtype_changes_no_byte(source, every_format, undisturbed, tmp_path, default_dtype):
    out = compress(str(source), every_format, tmp_path / "out").folder
    assert (out / SHARD).read_bytes() == (undisturbed / SHARD).read_bytes()


def test_the_default_dtype_changes_no_logit(undisturbed: Path, default_dtype):
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        changed = ultralowbit.load(undisturbed)(ids).logits
        torch.set_default_dtype(torch.float32)
        expected = ultralowbit.load(undisturbed)(ids).logits
    assert changed.dtype == torch.float32
    assert torch.equal(changed, expected)


def test_every_factory_says_its_dtype():
    """Of what torch makes in its default dtype unless told otherwise."""
    package = Path(ultralowbit.__file__).parent
    files = [
        path for root in (package, package.parent / "kernels", package.parent / "eval") for path in root.rglob("*.py")
    ]
    silent = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
                keywords = {keyword.arg for keyword in node.keywords}
                if not {"dtype", "out", None} & keywords:  # None: **options
                    silent.append(f"{path.name}:{node.lineno}")
    assert len(files) > 100
    assert silent == []
