"""The word layout: fields of a few bits in int16 words, and the fp16 scales beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ultralowbit.errors import FormatError

VERSION = 2
"""Of the packed format: raised when a stored byte, or its name, changes its meaning."""

WORD_BITS = 16

LANES = 32
"""Words of a full block: field f of word l holds column 32 f + l of the block."""


class TensorSpec(NamedTuple):
    """What a file and a module hold for one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What it takes to store."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def word_count(columns: int, width: int) -> int:
    """int16 words that hold `columns` fields of `width` bits, padding included."""
    per_word = WORD_BITS // width
    full, rest = divmod(columns, per_word * LANES)
    return full * LANES + -(-rest // per_word)


def pack_fields(codes: Tensor, width: int) -> Tensor:
    """codes [..., columns] uint8 below 2**width -> words [..., word_count] int16."""
    per_word = WORD_BITS // width
    *lead, columns = codes.shape
    full, rest = divmod(columns, per_word * LANES)
    words = codes.new_zeros((*lead, word_count(columns, width)), dtype=torch.int16)
    body = codes[..., : columns - rest].unflatten(-1, (full, per_word, LANES))  # [..., full, fields, 32]
    head = words[..., : full * LANES].unflatten(-1, (full, LANES))  # [..., full, 32], a view
    for f in range(per_word if full else 0):
        head |= body[..., f, :].to(torch.int16) << (width * f)
    tail, lanes = words[..., full * LANES :], -(-rest // per_word)
    for f in range(per_word):
        part = codes[..., columns - rest + f * lanes : columns][..., :lanes]
        tail[..., : part.shape[-1]] |= part.to(torch.int16) << (width * f)
    return words


def unpack_fields(words: Tensor, width: int, columns: int) -> Tensor:
    """words [..., word_count] int16 -> codes [..., columns] int16, the inverse of `pack_fields`."""
    per_word, mask = WORD_BITS // width, (1 << width) - 1
    full, rest = divmod(columns, per_word * LANES)
    shifts = torch.arange(0, WORD_BITS, width, dtype=torch.int16, device=words.device)[:, None]
    # the shift is arithmetic, so the mask is what drops the copies of the sign bit
    body = words[..., : full * LANES].unflatten(-1, (full, 1, LANES)) >> shifts  # [..., full, fields, 32]
    tail = words[..., None, full * LANES :] >> shifts  # [..., fields, lanes]
    if not rest:
        return body.bitwise_and_(mask).flatten(-3)
    return torch.cat([body.flatten(-3), tail.flatten(-2)[..., :rest]], dim=-1).bitwise_and_(mask)


def to_scale(values: Tensor) -> Tensor:
    """Round to the stored fp16, as fp32; raises `FormatError` where fp16 cannot hold a value."""
    stored = values.half()
    if not stored.isfinite().all():
        raise FormatError(
            f"a scale of {values.abs().max().item():.3g} does not fit fp16 (largest 65504): the weights are not finite "
            "or far too large, check the source checkpoint"
        )
    return stored.float()


def group_count(columns: int, group: int | None) -> int:
    """Scale groups in a row: one where `group` is None, else ceil(columns / group); the last may be shorter."""
    return 1 if group is None else -(-columns // group)


def group_views(tile: Tensor, values: Tensor, group: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair views of tile [rows, columns] with the values [groups, rows] of their groups, both as [rows, groups, .]."""
    rows = values.float().T[..., None]  # [rows, groups, 1]
    columns = tile.shape[1]
    group = group or columns
    whole = columns // group
    if whole:
        yield tile[:, : whole * group].unflatten(1, (whole, group)), rows[:, :whole]
    if columns % group:
        yield tile[:, None, whole * group :], rows[:, whole:]
