"""The stage `allocate`: how many planes each Linear gets, within the bits that a recipe asks for.

What a Linear would cost alone, with all others as they were, tells too much of the difference between Linears once all
of them are packed: errors meet, and later Linears make up for earlier ones. Of the cost of a weight the square root
counts. On novel-4m (WikiText-2 / novels) it gave 109.2 / 66.3 at 2.10 bits and 128.4 / 82.4 at 1.59, the cost itself
112.4 / 67.6 and 132.4 / 85.0, all weights alike 109.7 / 67.1 and 134.6 / 85.9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ultralowbit.checkpoint.job import Job
from ultralowbit.checkpoint.names import weight_name
from ultralowbit.errors import InputError
from ultralowbit.methods.allocation import allocate
from ultralowbit.methods.base import Method
from ultralowbit.nn.decoder import Decoder
from ultralowbit.pipeline.sensitivity import MEASURED
from ultralowbit.pipeline.source import packed_linears
from ultralowbit.recipe import Recipe

PLANES = (1, 2, 3, 4)


def expected_planes(decoder: Decoder, recipe: Recipe) -> Recipe:
    """The recipe as if all weights mattered alike: where it allocates, the planes that then fit its bits.

    Which Linears they are for is not known before the text is read; that their bytes are not more than asked for is.
    """
    return _within_budget(decoder, recipe, {})


def allocated(job: Job, decoder: Decoder, recipe: Recipe) -> Recipe:
    """The recipe with planes for each Linear, by the sensitivities in the job; where rows make up for each other's
    errors a Linear costs less, by what that gains."""
    if recipe.allocate is None:
        return recipe
    gains = job.state.get("outputs", {})
    losses = {name: kl * gains.get(name, 1.0) for name, kl in job.state["allocation"]["kl"].items()}
    return _within_budget(decoder, recipe, losses)


def _within_budget(decoder: Decoder, recipe: Recipe, losses: Mapping[str, float]) -> Recipe:
    if recipe.allocate is None:
        return recipe
    shapes = packed_linears(decoder, recipe)
    free: dict[str, list[str]] = {}  # by the tensor of the model: experts of a projection get planes alike
    for name in shapes:
        if recipe.is_allocated(name):
            free.setdefault(weight_name(name), []).append(name)
    if not free:
        raise InputError("allocate has no Linear to choose planes for: every one has an override or is ignored")
    weights = sum(n * m for n, m in shapes.values())
    fixed = sum(
        recipe.method_for(name).format(m).nbytes(n, m)
        for name, (n, m) in shapes.items()
        if not recipe.is_allocated(name)
    )

    @cache  # experts are alike
    def takes(shape: tuple[int, int], planes: int) -> int:
        n, m = shape
        return replace(recipe.quantize, planes=planes).format(m).nbytes(n, m)

    nbytes = torch.tensor([[sum(takes(shapes[name], K) for name in names) for K in PLANES] for names in free.values()])
    asked = recipe.allocate.bits
    least, most = (8 * (fixed + int(nbytes[:, choice].sum())) / weights for choice in (0, -1))
    if not least <= asked <= most:
        few = f"one plane for every Linear takes {math.ceil(1e4 * least) / 1e4:g}"
        many = f"{PLANES[-1]} planes for every Linear take {math.floor(1e4 * most) / 1e4:g}"
        raise InputError(
            f"allocate.bits, which --bits sets, is {asked:g}, and {few if asked < least else many} true bits a weight, "
            f"scales included: ask for that at {'least' if asked < least else 'most'}"
        )
    sizes = torch.tensor([sum(math.prod(shapes[n]) for n in names) for names in free.values()], dtype=torch.float64)
    kl = torch.tensor([sum(losses.get(n, 0.0) for n in names) for names in free.values()], dtype=torch.float64)
    kl = kl if losses else sizes
    of_each = sizes * (kl / sizes).sqrt()
    lost = _lost_by_planes(recipe.quantize)
    budget = math.floor(asked * weights / 8 + 1e-3) - fixed  # whole bytes, where a float is next to less
    chosen = allocate(torch.outer(of_each, lost / lost[MEASURED - 1]), nbytes, budget)
    return recipe.with_planes(
        {name: PLANES[choice] for names, choice in zip(free.values(), chosen, strict=True) for name in names}
    )


def _lost_by_planes(method: Method) -> Tensor:
    """What each number of planes loses of a Gaussian weight [planes] fp64, rounded without data."""
    weight = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    lost = [weight - replace(method, planes=K).quantize(weight, None).dequantize() for K in PLANES]
    return torch.stack([d.double().square().sum() for d in lost])
