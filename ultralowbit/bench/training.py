"""Seconds of a step of block-wise training, as a multiple of the block's own passes."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultralowbit.bench.models import Shape, write_model
from ultralowbit.bench.timing import now
from ultralowbit.format.ints import Ints
from ultralowbit.format.planes import Planes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format
from ultralowbit.methods.rotation import Rotate, rotated_format
from ultralowbit.nn.calls import run_block
from ultralowbit.nn.linear import swap
from ultralowbit.pipeline.source import open_decoder
from ultralowbit.system import pick_device
from ultralowbit.training.fake_quant.linear import FakeQuantLinear
from ultralowbit.training.optimizer import AdamW8bit


class Trained(NamedTuple):
    """A format, and which of its tensors are trained."""

    segment: Callable[[int], Planes | Ints]  # of its columns
    train: set[str]
    scales: Literal["free", "analytic"] = "free"
    rotated: bool = False
    latents: torch.dtype = torch.float32


TRAINED: dict[str, Trained] = {
    "one plane: scale, offset, row": Trained(lambda m: Planes(m, 1, None, offset=True), {"scale", "offset", "row"}),
    "two planes: scale": Trained(lambda m: Planes(m, 2), {"scale"}),
    "2-bit integers, g128: scale": Trained(lambda m: Ints(m, 2, 128), {"scale"}),
    "dual planes, g64: scale": Trained(lambda m: Planes(m, 2, 64, "01"), {"scale"}),
    "one plane: latent": Trained(lambda m: Planes(m, 1, None, offset=True), {"latent"}, "analytic"),
    "two planes: latent, scale": Trained(lambda m: Planes(m, 2), {"latent", "scale"}),
    "the same, rotated": Trained(lambda m: Planes(m, 2), {"latent", "scale"}, rotated=True),
    "the same, latent in bf16": Trained(lambda m: Planes(m, 2), {"latent", "scale"}, "free", True, torch.bfloat16),
}


def training_bench(
    length: int = 512,
    batch: int = 2,
    repeat: int = 5,
    shape: Shape | None = None,
    device: str = "cpu",
    json_file: Path | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Time a training step of one block, AdamW included, beside the block's own forward and backward pass.

    That pass makes the gradients of all weights. Both take turns, `repeat` times; the median of the ratios of
    neighbours counts. Returns a row for each entry of `TRAINED`, in seconds.
    """
    shape = shape or Shape()
    where, rows = pick_device(device), []
    with tempfile.TemporaryDirectory() as folder:
        decoder = open_decoder(write_model(Path(folder), 1, replace(shape, vocab=256)), where)
        seen: list[Tensor] = []
        tokens = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
        (call,) = decoder.block_inputs(iter([tokens]), lambda _, hidden: seen.append(hidden))
        say(
            f"one block of {shape}, {batch} x {length} tokens, {str(decoder.dtype).removeprefix('torch.')} on "
            f"{where.type}, {torch.get_num_threads()} threads"
        )
        with decoder.filled_block(0) as (block, _):
            target = -seen[0]

            def step(block: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> float:
                started = now(where)
                for p in block.parameters():
                    p.grad = None
                F.mse_loss(run_block(block, seen[0], call), target).backward()
                for optimizer in optimizers:
                    optimizer.step()
                return now(where) - started

            for name, tuned in TRAINED.items():
                student = _student(block, tuned)
                optimizers = _optimizers(student)
                block.requires_grad_(True)
                step(block), step(student, optimizers)
                times = [(step(block), step(student, optimizers)) for _ in range(repeat)]
                plain, seconds = (statistics.median(column) for column in zip(*times, strict=True))
                ratio = statistics.median(b / a for a, b in times)
                rows.append({"what": name, "seconds": seconds, "plain": plain, "ratio": ratio})
                say(f"{name:>30}: {seconds:7.3f} s a step, {ratio:.2f} times the plain {plain:.3f} s")
                del student, optimizers
            block.requires_grad_(False)
            for p in block.parameters():
                p.grad = None
    if json_file is not None:
        settings = {"shape": asdict(shape), "length": length, "batch": batch, "device": where.type}
        Path(json_file).write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")
    return rows


def _optimizers(student: nn.Module) -> list[torch.optim.Optimizer]:
    """Those that training uses: latent weights in bf16 have moments of 8 bits."""
    trained = [p for p in student.parameters() if p.requires_grad]
    small = [p for p in trained if p.dtype == torch.bfloat16]
    plain = torch.optim.AdamW([p for p in trained if p.dtype != torch.bfloat16], 1e-5, weight_decay=0, fused=True)
    return [plain, AdamW8bit(small, 1e-5, (0.9, 0.999), 0.0, seed=0)] if small else [plain]


def _student(block: nn.Module, tuned: Trained) -> nn.Module:
    """A copy of the block with fake-quantized Linears, packed without care: nothing of it is timed."""
    student = deepcopy(block).requires_grad_(False)
    for name, module in [(name, m) for name, m in student.named_modules() if isinstance(m, nn.Linear)]:
        weight = module.weight.float()
        segment = tuned.segment(module.in_features)
        format, block = Format((segment,)), Rotate().block(module.in_features)
        format = rotated_format(format, block) if tuned.rotated and block else format
        packed = random_packed(format, module.out_features, device=weight.device)
        stored = packed.tensors["weight_scale"]  # [groups, out], or [planes, groups, out]
        sizes = (1,) if isinstance(segment, Ints) else (2, -1) if segment.alphabet == "01" else (1, 0.5)
        factor = torch.tensor(sizes[: len(stored)], device=weight.device).view(-1, *[1] * (stored.ndim - 1))
        scale = weight.abs().mean(1) * factor
        packed.tensors["weight_scale"] = scale.half().expand_as(stored).contiguous()
        if "weight_offset" in packed.tensors:
            packed.tensors["weight_offset"].zero_()
        latent = {"latent": weight, "scales": tuned.scales, "dtype": tuned.latents}
        swap(student, name, FakeQuantLinear(packed, tuned.train, **latent))
    return student
