"""Quantization preprocessing of PTQ1.61 (Zhao et al., ACL 2025, arXiv 2502.13179, section 3.3): a restorative LoRA.

The model is quantized once; low-rank adapters are trained on the frozen result with the next-token loss and merged,

    W' = dequant(W) + (alpha / r) B A,

and W', which lies near what the format can hold, is the model that is then quantized from the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ultralowbit.checkpoint.manifest import changed_files, read_manifest
from ultralowbit.checkpoint.storage import json_digest, read_json, sha256_file, write_json
from ultralowbit.errors import InputError
from ultralowbit.nn.hf import load
from ultralowbit.nn.linear import PackedLinear, linear_shape, swap
from ultralowbit.progress import Progress
from ultralowbit.training.loop import Fitted, fit
from ultralowbit.training.memory import checkpoint_blocks
from ultralowbit.training.objectives import CrossEntropy, Outputs
from ultralowbit.training.specs import Preprocess


class Adapted(nn.Module):
    """A packed Linear with an adapter: y = W x + (alpha / r) B A dropout(x), A [r, in], B [out, r]."""

    def __init__(self, linear: PackedLinear, spec: Preprocess, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = linear_shape(linear)
        self.linear, self.spec = linear, spec
        device = linear.weight.device
        bound = in_features**-0.5  # as Kaiming's uniform with a = sqrt(5), which LoRA's code starts A from
        start = torch.empty(spec.rank, in_features, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start.to(device))
        self.B = nn.Parameter(torch.zeros(out_features, spec.rank, dtype=torch.float32, device=device))
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training and self.spec.dropout:
            keep = torch.rand(x.shape, generator=self.generator, dtype=torch.float32).to(x.device) >= self.spec.dropout
            x = x * keep / (1 - self.spec.dropout)
        return y + F.linear(F.linear(x, self.A), self.B) * (self.spec.alpha / self.spec.rank)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype) -> nn.Module:
        """The Linear or Conv1D with the adapter added to its weight, in a dtype."""
        dense = self.linear.dense(torch.float32)
        delta = self.B @ self.A * (self.spec.alpha / self.spec.rank)
        dense.weight += delta.T if isinstance(dense, Conv1D) else delta
        return dense.to(dtype)


def preprocess(
    quantized: Callable[[Path], Path],
    tokens: Tensor,
    spec: Preprocess,
    dtype: torch.dtype,
    work: Path,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[Path, dict[str, Any], float]:
    """Make the model whose weights are W' in `work` and return its folder, with how the training went and the seconds
    that all of it took, in this and in killed runs; what is there already is not made again.

    quantized: writes the model, quantized once, into a folder and returns that; tokens [windows, length]: what is
    trained on; dtype: what W' is stored in. Raises `InputError` where no packed Linear matches the spec's targets.
    """
    merged = work / "model"
    if not merged.exists():
        folder = quantized(work / "quantized")
        spent, started = sum(read_manifest(folder)["block_seconds"].values()), time.perf_counter()
        model = load(folder, dtype=torch.float32, trust_remote_code=trust_remote_code).to(device)
        adapt = [n for n, m in model.named_modules() if isinstance(m, PackedLinear) and spec.adapts(n)]
        if not adapt:
            raise InputError(f"preprocess.targets {list(spec.targets)} match no packed Linear: give patterns of names")
        model.requires_grad_(False)
        fitted = _train(model, adapt, tokens, spec, work / "adapters.safetensors", progress)
        for name in adapt:
            swap(model, name, model.get_submodule(name).merge(dtype))
        half_done = work / "merging"
        model.dequantize().to(dtype).save_pretrained(half_done)
        files = {path.name: sha256_file(path) for path in half_done.iterdir()}
        spent += fitted.earlier_seconds + time.perf_counter() - started
        made = {"fitted": fitted.to_dict(), "files": files, "seconds": round(spent, 3)}
        write_json(half_done / "preprocess.json", {**made, "sha256": json_digest(made)})
        half_done.replace(merged)
    made = read_json(merged / "preprocess.json", "begin again with --restart")
    if made.pop("sha256", None) != json_digest(made) or changed_files(merged, made):
        raise InputError(f"{merged} has changed since it was made: begin again with --restart")
    return merged, made["fitted"], made.get("seconds", 0.0)  # an earlier version did not keep them


def _train(
    model: PreTrainedModel, adapt: Sequence[str], tokens: Tensor, spec: Preprocess, state: Path, progress: Progress
) -> Fitted:
    """Give the named Linears adapters and train these on the next tokens of tokens [windows, length]."""
    generator = torch.Generator().manual_seed(spec.training.seed)
    if spec.is_checkpointed(sum(math.prod(linear_shape(model.get_submodule(name))) for name in adapt)):
        checkpoint_blocks(model, generator)
    for name in adapt:
        swap(model, name, Adapted(model.get_submodule(name), spec, generator))
    training, held_out, notes = spec.windows(tokens, model.device)
    objective = CrossEntropy()

    def loss(batch: Tensor) -> Tensor:
        return objective(Outputs(model(batch, use_cache=False).logits), None, batch)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        judged = sum(loss(window[None]).item() for window in held_out) / len(held_out)
        model.train()
        return judged

    parameters = {"adapter": [p for p in model.parameters() if p.requires_grad]}
    total = spec.training.total_steps(len(training))
    fitted = fit(
        parameters, lambda rows: loss(training[rows]), spec.training, len(training), evaluate, state=state,
        progress=progress, what="training adapters",
        # a run that goes on drops the same inputs at every step
        on_progress=lambda share: generator.manual_seed(spec.training.seed + 1 + round(share * total)),
    )  # fmt: skip
    return replace(fitted, notes=notes + fitted.notes)
