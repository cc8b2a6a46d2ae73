"""AdamW whose memory is one byte a moment, for weights in bf16.

The moments are kept in 8 bits, in blocks of 256 of a row with a scale each, as in Dettmers et al.: 8-bit Optimizers via
Block-wise Quantization, ICLR 2022, arXiv 2110.02861. A step of 2e-5 is less than half of the distance between
neighbours in bf16 from 0.01 on: rounded to nearest, weights would stand still. They are rounded up or down at random,
the nearer neighbour being the likelier one, so that steps count in the mean.

torchao has the same optimizer. It draws its random numbers from the global state, so that a resumed run would end with
other bytes, and it compiles itself when it is first used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultralowbit.training.shards import local

BLOCK = 256
"""Numbers that share a scale."""
CHUNK = BLOCK << 12
"""Numbers whose fp32 forms are in memory at a time."""
EPSILON = 1e-8


class AdamW8bit(torch.optim.Optimizer):
    """AdamW for parameters in bf16, which may be sharded by rows.

    The state of a parameter [..., n]: `exp_avg` and `exp_avg_sq` [..., n] uint8, codes in the tables of `dynamic_map`;
    `exp_avg_scale` and `exp_avg_sq_scale` [..., blocks] fp32, the largest number of each block; `step`, a scalar in
    fp32. No block has numbers of two rows, so that the moments of shards are the shards of the moments.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float, seed: int
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient; the random numbers are those of the seed and of the step."""
        parameters = ((p, group) for group in self.param_groups for p in group["params"] if p.grad is not None)
        for i, (p, group) in enumerate(parameters):
            state = self.state[p]
            if not state:
                state |= self._start(p)
            state["step"] += 1
            sharded = [p.device_mesh.get_local_rank()] if isinstance(p, DTensor) else []
            generator = torch.Generator(p.device).manual_seed(mixed_seed(self.seed, int(state["step"]), i, *sharded))
            values, grad = _rows(p), _rows(p.grad)
            own = {name: _rows(t) for name, t in state.items() if t.ndim}
            for part in _chunks(values):
                moments = {name: t[part] for name, t in own.items()}
                self._update(values[part], grad[part].float(), moments, int(state["step"]), group, generator)

    @staticmethod
    def _start(p: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zero = int(dynamic_map(signed, p.device).abs().argmin())
            state[name] = torch.full_like(p, zero, dtype=torch.uint8)
            state[f"{name}_scale"] = torch.zeros_like(p[..., ::BLOCK], dtype=torch.float32)
        return state

    @staticmethod
    def _update(
        p: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        step: int,
        group: dict[str, Any],
        generator: torch.Generator,
    ) -> None:
        """The step for some rows p [rows, n] of a parameter, with their gradient [rows, n] in fp32."""
        moments = []
        for name, beta, new in zip(("exp_avg", "exp_avg_sq"), group["betas"], (grad, grad.square()), strict=True):
            codes, scale = state[name], state[f"{name}_scale"]
            moment = decode(codes, scale, name == "exp_avg").lerp_(new, 1 - beta)
            encode_(moment, codes, scale, name == "exp_avg")
            moments.append(moment.div_(1 - beta**step))
        mean, square = moments
        value = p.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(mean, square.sqrt_().add_(EPSILON), value=-group["lr"])
        p.copy_(rounded_at_random(value, generator))


def _rows(t: Tensor) -> Tensor:
    """The rows [rows, n] of a tensor that this rank has, as a view."""
    return local(t).view(-1, t.shape[-1])


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of so many rows [rows, n]."""
    step = max(1, CHUNK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def mixed_seed(*numbers: int) -> int:
    """A seed for what these numbers name, of the 32 bits that a generator takes."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The numbers [256] in rising order that 8 bits stand for: 0, 1, and seven decades up to 1, each with twice as many
    numbers as the one below."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        middles = (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        numbers += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Numbers [..., n] fp32 from their codes [..., n] uint8 and the scales [..., blocks] of their blocks."""
    numbers = dynamic_map(signed, codes.device)[codes.int()]
    for x, s in _by_blocks(numbers, scale):
        x.mul_(s)
    return numbers


def encode_(numbers: Tensor, codes: Tensor, scale: Tensor, signed: bool) -> None:
    """Write the nearest codes of numbers [..., n] fp32, and the scales of their blocks, into what `decode` takes."""
    shares = torch.empty_like(numbers)
    for (x, s), (share, _) in zip(_by_blocks(numbers, scale), _by_blocks(shares, scale), strict=True):
        torch.amax(x.abs(), -1, keepdim=True, out=s)
        torch.div(x, s.clamp_min(torch.finfo(s.dtype).tiny), out=share)
    codes.copy_(_nearest(signed, codes.device)[shares.half().view(torch.int16).int()])


@cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """The code [65536] uint8 of every number in fp16, by its bits as an index from -32768 on: a search in the map takes
    ten times as long."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    table = dynamic_map(signed, torch.device("cpu"))
    return torch.bucketize(numbers, (table[:-1] + table[1:]) / 2).to(device, torch.uint8)


def _by_blocks(numbers: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of numbers [..., n] as [..., blocks, BLOCK] with their scales [..., blocks, 1]; then of those that fill no
    whole block."""
    whole = numbers.shape[-1] // BLOCK
    if whole:
        yield numbers[..., : whole * BLOCK].unflatten(-1, (whole, BLOCK)), scale[..., :whole, None]
    if whole * BLOCK < numbers.shape[-1]:
        yield numbers[..., None, whole * BLOCK :], scale[..., whole:, None]


def rounded_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """x in fp32, which is changed, in bf16: one of its two neighbours, each as likely as the other one is far."""
    bits = x.view(torch.int32)  # bf16 is the upper half of fp32
    noise = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return bits.add_(noise).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
