"""Random packed weights in any format, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import pack_fields


def random_packed(format: Format, out: int, device: torch.device, seed: int = 0) -> PackedWeight:
    """Random bytes of every stored tensor, padding included; scales such that a row's sums stay near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in format.tensors(out, format.in_features).items():
        if dtype == torch.float16:
            values = torch.randn(shape, generator=generator, device=device)
            tensors[name] = (values * format.in_features**-0.5).half()
        else:
            limits = torch.iinfo(dtype)
            sizes = {"generator": generator, "dtype": dtype, "device": device}
            tensors[name] = torch.randint(limits.min, limits.max + 1, shape, **sizes)
    return PackedWeight(format, (out, format.in_features), tensors | _random_parts(format, out, generator))


def _random_parts(format: Format, out: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors that say where something is, which cannot be any bytes."""

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    def marks(rows: int, columns: int, counts: Tensor | int) -> Tensor:  # words with so many bits set in each row
        order = random(rows, columns).argsort(1).argsort(1)
        return pack_fields((order < counts).to(torch.uint8), 1)

    found = {}
    for i, part in enumerate(format.segments):
        if isinstance(part, SalientSplit):
            found[f"weight_{i}_salient" if i else "weight_salient"] = marks(1, part.columns, part.salient)[0]
    if isinstance(format.outliers, IndexedOutliers):
        chosen = [random(size, out).argsort(0)[:entries] for _, size, entries in format.outliers.blocks]
        found["weight_outliers_index"] = torch.cat([c.sort(0).values.to(torch.uint8) for c in chosen])
    if isinstance(format.outliers, MaskedOutliers):
        counts = (random(out, 1) * (format.outliers.capacity + 1)).long()
        found["weight_outliers_mask"] = marks(out, format.in_features, counts)
    if format.transform is not None and format.transform.channel_order:
        found["weight_input_channel_order"] = marks(1, format.in_features, format.segments[0].columns)[0]
    return found
