"""A program that has set torch's default dtype gets the same bytes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ultralowbit
from ultralowbit.eval.runner import measure_beside, measure_depth, read_texts
from ultralowbit.export.base import export
from ultralowbit.nn.hf import pack_model
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

SHARD = "model.safetensors"
FACTORIES = {f"torch.{name}" for name in ("zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn")}


@contextmanager
def changed_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def default_dtype(request) -> Iterator[torch.dtype]:
    with changed_dtype(request.param):
        yield request.param


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


@pytest.mark.parametrize("stage", ["rotate", "error_correction", "allocate", "preprocess", "blockwise", "finetune"])
def test_the_default_dtype_changes_no_stage(source, text, tmp_path, monkeypatch, stage):
    training = {"lr": {"scale": 0.01, "latent": 0.01}, "steps": 2, "batch": 2, "evaluations": 1}
    values = {
        "rotate": {},
        "error_correction": {},
        "allocate": {"bits": 2.0, "windows": 2},
        "preprocess": {"rank": 2, "training": {**training, "lr": {"adapter": 0.1}}},
        "blockwise": {"objective": {"kind": "mse"}, "training": training},
        "finetune": {"objective": {"kind": "kl"}, "training": training},
    }[stage]  # fmt: skip
    calibration = {"source": text, "samples": 4, "length": 16}
    quantize = {"method": "sign", "planes": 2, "refine": 1}
    recipe = Recipe.model_validate(
        {"name": stage, "quantize": quantize, "ignore": ["*mlp*"], "calibration": calibration, stage: values}
    )
    expected = (compress(str(source), recipe, tmp_path / "plain").folder / SHARD).read_bytes()
    for dtype in (torch.bfloat16, torch.float64):
        with changed_dtype(dtype):
            out = compress(str(source), recipe, tmp_path / str(dtype)).folder
        assert (out / SHARD).read_bytes() == expected


def test_the_default_dtype_changes_no_figure(undisturbed: Path, source: Path, text, default_dtype):
    def measured() -> dict:
        texts = read_texts(undisturbed, (text,), context=16, max_tokens=128)
        both = measure_beside(source, [undisturbed], texts, torch.device("cpu"))
        depth = measure_depth(source, undisturbed, texts[0], torch.device("cpu"), dtype=torch.float32)
        return {"original": both.original, "packed": both.models, "depth": depth}

    changed = measured()
    torch.set_default_dtype(torch.float32)
    assert changed == measured()


def test_the_default_dtype_changes_no_export(undisturbed: Path, tmp_path, default_dtype):
    changed = load_file(export(undisturbed, "dense", tmp_path / "changed") / SHARD)
    torch.set_default_dtype(torch.float32)
    assert same(changed, load_file(export(undisturbed, "dense", tmp_path / "expected") / SHARD))


@torch.no_grad()
def test_the_default_dtype_changes_nothing_packed_in_memory(undisturbed: Path, source: Path, tmp_path, default_dtype):
    def saved(folder: Path) -> dict[str, torch.Tensor]:
        stored = ultralowbit.load(undisturbed)
        packed = {name: m.packed for name, m in stored.named_modules() if isinstance(m, PackedLinear)}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        pack_model(model, packed).save_pretrained(folder)
        return load_file(folder / SHARD)

    changed = saved(tmp_path / "changed")
    torch.set_default_dtype(torch.float32)
    assert same(changed, saved(tmp_path / "expected"))


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
