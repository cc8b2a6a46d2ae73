"""Which Triton kernels multiply by a format on a GPU, and with which tiles.

Up to `gemv_tokens` and `gemm_tokens` tokens fields are multiplied as they are stored (`gemv`, `gemm`: the same kernels
with tiles of few and of more tokens), where the format is a sum of `matrices`. Up to `unpacked_tokens` programs unpack
the weights that they multiply (`unpacked`), where the format is one segment of such fields and x has 16 bits. For more
tokens, and for all else, the weight is written out and multiplied by cuBLAS (`dequantized`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format.outliers import IndexedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels.gpu.dequantize import dequantize, knows
from ultralowbit.kernels.gpu.fields import multiply
from ultralowbit.kernels.gpu.inputs import prologue, transformed
from ultralowbit.kernels.gpu.launch import NARROWEST_DOT, Launch, cdiv, run
from ultralowbit.kernels.gpu.matrix import Matrix, matrices
from ultralowbit.kernels.gpu.plan import ALIGNMENT, Plan
from ultralowbit.kernels.gpu.unpacking import can_unpack, unpacking_product

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OUTLIER_ENTRIES, OUTLIER_SPLITS = 16, 64
"""Entries of a row that a program is to take, and the most programs that share a row's entries: one entry after the
other is read and then gathered for, which is slow unless there are many at a time."""
FILLED = 1024
"""Inputs that a program makes at a time: what they need stays in its registers."""
DENSE_WEIGHTS = 1 << 26
"""Weights that are written out at a time: 128 MiB in 16 bits."""
LARGEST_HADAMARD, LARGEST_TURNED = 1 << 15, 1 << 12
"""Block of inputs that a launch of its own transforms, and that every program of a product does for itself."""
SMALLEST_TURNED = 16 * 64
"""Inputs that a program transforms at a time, at least: what tensor cores take."""
NARROWEST_TILE = 64
"""Rows that tensor cores of sm_90 multiply at a time."""


@dataclass(frozen=True)
class Tile:
    """rows of the weight in a program, its warps, and the depth of its pipeline of loads."""

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """gemv_tokens, gemm_tokens, unpacked_tokens: up to how many tokens fields are multiplied as they are stored, in one
    launch and in more, and weights by the programs that unpack them; programs: how many for each multiprocessor a
    product is split into; fewest_rows: of a tile, where there are too few blocks to split; tiles, unpacked_tiles: by
    the tokens in a tile."""

    gemv_tokens: int
    gemm_tokens: int
    unpacked_tokens: int
    programs: int
    fewest_rows: int
    tiles: Mapping[int, Tile]
    unpacked_tiles: Mapping[int, Tile]
    processors: int = 132

    def tile(self, tokens: int) -> tuple[int, Tile]:
        """The smallest tile that holds the tokens, or the largest."""
        return _smallest(self.tiles, tokens)

    def unpacked_tile(self, tokens: int, out_rows: int) -> tuple[int, Tile]:
        """The smallest that holds the tokens, or the largest; of half the rows where there is not one for each
        multiprocessor."""
        size, tile = _smallest(self.unpacked_tiles, tokens)
        if tile.rows > NARROWEST_TILE and cdiv(tokens, size) * cdiv(out_rows, tile.rows) < self.processors:
            tile = replace(tile, rows=tile.rows // 2, warps=max(4, tile.warps // 2))
        return size, tile


def _smallest(tiles: Mapping[int, Tile], tokens: int) -> tuple[int, Tile]:
    size = min((size for size in tiles if size >= tokens), default=max(tiles))
    return size, tiles[size]


@lru_cache
def tuning_of(device: torch.device) -> Tuning:
    """The tuning of the GPU that this is."""
    properties = torch.cuda.get_device_properties(device)
    return read_tuning(properties.name, properties.multi_processor_count, properties.major)


def read_tuning(name: str, processors: int, major: int = 9) -> Tuning:
    """Of a GPU by its name; what `tuning.json` does not list has the values of `default`, or of `before sm_90`."""
    table = json.loads(Path(__file__).with_name("tuning.json").read_text())
    values = table["default"] | (table["before sm_90"] if major < 9 else {}) | table.get(name, {})
    tiles, unpacked = (
        {int(size): Tile(**tile) for size, tile in values.pop(name).items()} for name in ("tiles", "unpacked_tiles")
    )
    tiles = {size: tile for size, tile in tiles.items() if size >= NARROWEST_DOT}
    return Tuning(**values, tiles=tiles, unpacked_tiles=unpacked, processors=processors)


def choose(format: Format, device: torch.device, dtype: torch.dtype, tokens: int) -> Callable[..., Tensor] | None:
    """The `packed_matmul.Chooser` of CUDA devices."""
    few, more, many, most = _paths(format, dtype)
    if most is None or dtype not in DTYPES or not has_tensor_cores(device):
        return None
    tuning = tuning_of(device)
    limits = ((tuning.gemv_tokens, few), (tuning.gemm_tokens, more), (tuning.unpacked_tokens, many))
    return next((path for limit, path in limits if tokens <= limit), most)


@lru_cache(maxsize=1024)
def _paths(format: Format, dtype: torch.dtype) -> tuple[Callable[..., Tensor] | None, ...]:
    """What multiplies few tokens, more, many, and most; None where there is no kernel for the format."""
    hadamard = format.transform and format.transform.hadamard
    if (hadamard or 0) > LARGEST_HADAMARD or not knows(format):
        return None, None, None, None
    many = unpacked if can_unpack(format) and dtype != torch.float32 else dequantized
    if matrices(format) is None:
        return many, many, many, dequantized
    if format.outliers is None:
        return gemv, gemm, many, dequantized
    return gemv if lies_on_planes(format) else dequantized, dequantized, dequantized, dequantized


@lru_cache
def has_tensor_cores(device: torch.device) -> bool:
    """NVIDIA's, from Ampere on: the kernels are written for their assembly."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def lies_on_planes(format: Format) -> bool:
    """Whether the outliers are such that a kernel corrects the product of the segments for them."""
    return isinstance(format.outliers, IndexedOutliers) and [type(part) for part in format.segments] == [Planes]


def gemv(x: Tensor, tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    """For one tile of tokens: bound by reading and unpacking the fields."""
    return _planned(x, tensors, format)


def gemm(x: Tensor, tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    """For some tiles of tokens, each of which unpacks the fields again: bound by the tensor cores."""
    return _planned(x, tensors, format)


def unpacked(x: Tensor, tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    """For so many tokens that a weight's unpacking is shared by a tile of them: bound by the tensor cores."""
    return _planned(x, tensors, format, unpacks=True)


def _planned(x: Tensor, tensors: Mapping[str, Tensor], format: Format, unpacks: bool = False) -> Tensor:
    stored = [_aligned(tensor) for tensor in tensors.values()]  # a caller may hand over slices of rows
    device, out_rows = x.device, tensors["weight"].shape[-2]
    plan = plan_of(format, len(x), out_rows, x.dtype, device, subnormals_are_exact(device), unpacks)
    return plan(_aligned(x), stored)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is not as plans expect it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


@lru_cache(maxsize=4096)
def plan_of(
    format: Format, tokens: int, out_rows: int, dtype: torch.dtype, device: torch.device, subnormal: bool, unpacks: bool
) -> Plan:
    """The product of x [tokens, in] with a weight of so many rows, worked out once."""
    x = torch.empty(tokens, format.in_features, dtype=dtype, device="meta")
    specs = format.tensors(out_rows, format.in_features).items()
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs}
    if unpacks:
        launches, y = unpacking(x, tensors, format, tuning_of(device))
    else:
        launches, y = product(x, tensors, format, tuning_of(device), subnormal)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return Plan(launches, x, list(tensors.values()), y, device)


def dequantized(x: Tensor, tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    """For many tokens and for every format: rows of the weight, at most `DENSE_WEIGHTS` weights at a time, are written
    out in x's dtype and multiplied by cuBLAS."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    launches, x = transformed(x, tensors, format, x.dtype)
    run(launches, x.device)
    out_rows = tensors["weight"].shape[-2]
    step = max(1, DENSE_WEIGHTS // format.in_features)
    step = min(out_rows, step - step % 128 or step)  # in whole tiles of cuBLAS, whose outputs are then aligned
    weight = x.new_empty(step, format.in_features)
    y = x.new_empty(len(x), out_rows)
    for row in range(0, out_rows, step):
        rows = weight[: out_rows - row]
        run(list(dequantize(tensors, format, row, rows)), x.device)
        if step == out_rows:
            return F.linear(x, rows)
        y[:, row : row + step] = F.linear(x, rows)
    return y


_EXACT: dict[torch.device, bool] = {}


def subnormals_are_exact(device: torch.device) -> bool:
    """Whether the tensor cores multiply fp16 subnormals exactly: asked with a small product at a device's first use.

    While a CUDA graph is captured it cannot be asked, and what is documented is assumed: that they do.
    """
    if device not in _EXACT:
        if torch.cuda.is_current_stream_capturing():
            return True
        _EXACT[device] = _small_product_is_exact(device)
    return _EXACT[device]


def _small_product_is_exact(device: torch.device) -> bool:
    format = Format((Planes(512, 1),))
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (1, 64, 512), generator=generator, device="cpu").bool()
    packed = PackedWeight.encode(
        format, {"bits": bits, "scale": torch.ones(1, 64, 1, device="cpu", dtype=torch.float32)}
    )
    x = torch.randint(-8, 9, (8, 512), generator=generator, device="cpu").to(torch.float16)
    tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
    launches, y = product(x.to(device), tensors, format, tuning_of(device))
    run(launches, device)
    exact = torch.equal(y.float().cpu(), x.float() @ packed.dequantize().T)
    if not exact:
        warnings.warn(
            f"the tensor cores of {device} round fp16 subnormals: its kernels take a slower way", stacklevel=2
        )
    return exact


def product(
    x: Tensor, tensors: Mapping[str, Tensor], format: Format, tuning: Tuning, subnormal: bool = True
) -> tuple[list[Launch], Tensor]:
    """The launches that multiply x [tokens, in] by the stored fields, and y [tokens, out] that they leave.

    Up to `gemv_tokens` tokens they are one for each matrix, and one before where the inputs are transformed in a way
    that a program cannot do for itself; above, one more that makes the inputs of each matrix.
    """
    out_rows, tokens = tensors["weight"].shape[-2], len(x)
    digits = 2 if x.dtype == torch.float32 else 1
    y = x.new_empty(tokens, out_rows)
    whole, few = matrices(format), tokens <= tuning.gemv_tokens
    turns = few and turns_itself(format)
    launches, source = ([], x) if turns else transformed(x, tensors, format, torch.float32)
    size, tile = tuning.tile(digits * tokens)
    dealt = [Dealt.of(matrix, cdiv(digits * tokens, size), out_rows, tile, tuning) for matrix in whole]
    corrections = 0
    if format.outliers is not None:
        corrections = min(OUTLIER_SPLITS, cdiv(len(tensors["weight_outliers_value"]), OUTLIER_ENTRIES))
    parts = sum(each.parts for each in dealt) + corrections
    partial = x.new_empty(parts, digits * tokens, out_rows, dtype=torch.float32)
    before = 0
    for each in dealt:
        inputs = Inputs.of(source, each.matrix, digits)
        if not few:
            launches.append(_prologue(source, inputs, each.matrix, digits))
        last = each is dealt[-1]
        launch = _Multiply(source, tensors, format, each, inputs, y, partial, digits, size, subnormal)
        launches.append(launch.launch(before, corrections if last else 0, last, few, turns))
        before += each.parts
    return launches, y


def turns_itself(format: Format) -> bool:
    """Whether the programs of a product of few tokens can transform its inputs: in place, each channel with its block,
    and nobody else reads them."""
    steps = format.transform
    if steps is None:
        return True
    alone = len(matrices(format)) == 1 and format.outliers is None
    block = steps.hadamard or 1
    return alone and not steps.channel_order and block <= LARGEST_TURNED and format.in_features % block == 0


def unpacking(x: Tensor, tensors: Mapping[str, Tensor], format: Format, tuning: Tuning) -> tuple[list[Launch], Tensor]:
    """The launches that multiply x, contiguous, by weights that they unpack, and y that they leave."""
    size, tile = tuning.unpacked_tile(len(x), tensors["weight"].shape[-2])
    return unpacking_product(x, tensors, format, size, tile.rows, tile.warps, tile.stages)


@dataclass(frozen=True)
class Dealt:
    """How a matrix is dealt out to programs: their tiles of rows, and the blocks of columns of a split."""

    matrix: Matrix
    tile: Tile
    span: int

    @classmethod
    def of(cls, matrix: Matrix, token_tiles: int, out_rows: int, tile: Tile, tuning: Tuning) -> Dealt:
        """So that there are `programs` for each multiprocessor; tiles of fewer rows where the blocks are too few."""
        wanted = tuning.programs * tuning.processors
        others = token_tiles * matrix.planes
        while tile.rows > tuning.fewest_rows and others * cdiv(out_rows, tile.rows) * matrix.blocks < wanted:
            tile = replace(tile, rows=tile.rows // 2)
        splits = min(matrix.blocks, cdiv(wanted, others * cdiv(out_rows, tile.rows)))
        return cls(matrix, tile, cdiv(matrix.blocks, splits))

    @property
    def splits(self) -> int:
        return cdiv(self.matrix.blocks, self.span)

    @property
    def parts(self) -> int:
        return self.matrix.planes * self.splits


@dataclass(frozen=True)
class Inputs:
    """Room for the inputs of a matrix, as `inputs.py` lays them out."""

    x16: Tensor
    sums: Tensor
    units: Tensor

    @classmethod
    def of(cls, x: Tensor, matrix: Matrix, digits: int) -> Inputs:
        lines = digits * len(x)
        return cls(
            x.new_empty(lines, matrix.blocks * matrix.block, dtype=torch.float16),
            x.new_empty(lines, matrix.blocks * matrix.groups_in_block, dtype=torch.float32),
            x.new_empty(lines, matrix.blocks, dtype=torch.float32),
        )


def _pieces(matrix: Matrix, blocks: int) -> int:
    """Blocks whose inputs are made at a time, of so many."""
    return min(1 << (blocks - 1).bit_length(), max(1, FILLED // matrix.block))


def _prologue(x: Tensor, inputs: Inputs, matrix: Matrix, digits: int) -> Launch:
    args = (
        x, inputs.x16, inputs.sums, inputs.units, *x.stride(), matrix.column, matrix.columns, matrix.blocks,
        matrix.full, matrix.lanes, matrix.group or matrix.columns,
    )  # fmt: skip
    pieces = _pieces(matrix, matrix.blocks)
    constants = {"width": matrix.width, "groups_in_block": matrix.groups_in_block, "digits": digits, "pieces": pieces}
    return Launch(prologue, (cdiv(matrix.blocks, pieces), len(x)), args, constants)


@dataclass(frozen=True)
class _Multiply:
    """What the launches of `multiply` have in common."""

    x: Tensor
    tensors: Mapping[str, Tensor]
    format: Format
    dealt: Dealt
    inputs: Inputs
    y: Tensor
    partial: Tensor
    digits: int
    size: int
    subnormal: bool

    def launch(self, before: int, corrections: int, last: bool, prepares: bool, turns: bool) -> Launch:
        """Of the matrix whose parts follow `before` others; the last one corrects and adds up."""
        x, matrix, tile, (parts, lines, out_rows) = self.x, self.dealt.matrix, self.dealt.tile, self.partial.shape
        steps = self.format.transform if turns else None
        hadamard, own = (steps and steps.hadamard) or 1, self.dealt.parts + corrections
        grid = cdiv(lines, self.size), cdiv(out_rows, tile.rows), own
        turned = x.new_empty(x.shape, dtype=torch.float32) if hadamard > 1 else x
        arrived = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=x.device)
        aligned = math.gcd(8, matrix.stride, matrix.start, matrix.lanes)
        args = (
            x, turned, *self._stored(corrections > 0, bool(steps and steps.column_scale)), self.partial, arrived,
            self.y, len(x), *x.stride(), matrix.column, matrix.columns, matrix.group or matrix.columns, out_rows,
            matrix.planes, out_rows * matrix.stride // aligned, matrix.stride // aligned, matrix.blocks, matrix.full,
            matrix.lanes // aligned, matrix.groups, matrix.blocks_in_group, self.dealt.span, self.dealt.splits,
            before, parts, *self._entries(corrections > 0),
        )  # fmt: skip
        constants = {
            "width": matrix.width, "fields_in_group": matrix.fields // matrix.groups_in_block,
            "row_scale": matrix.groups == 1, "tail": matrix.tails > 0, "multiplier": matrix.multiplier,
            "z": matrix.zero, "zero_width": matrix.zero_width, "has_offset": matrix.offset,
            "subnormal": self.subnormal, "aligned": aligned, "few_rows": out_rows < tile.rows, "digits": self.digits,
            "prepares": prepares, "rounds": hadamard.bit_length() - 1, "root": hadamard**-0.5,
            "has_scale": bool(steps and steps.column_scale),
            "corrects": corrections > 0, "alone": parts == self.digits == 1, "last": last,
            "pieces": _pieces(matrix, self.dealt.span),
            "turn": max(hadamard, SMALLEST_TURNED) // 64, "BM": self.size, "BN": tile.rows,
        }  # fmt: skip
        return Launch(multiply, grid, args, constants, tile.warps, tile.stages)

    def _stored(self, corrects: bool, has_scale: bool) -> list[Tensor]:
        """The column scale, the inputs, the matrix and the entries; another tensor for what there is not."""
        matrix, tensors = self.dealt.matrix, self.tensors
        words, scale = tensors[matrix.prefix], tensors[f"{matrix.prefix}_scale"]
        entries = ("index", "value", "scale", "zero")
        return [
            tensors["weight_input_scale"] if has_scale else scale,
            self.inputs.x16, self.inputs.sums, self.inputs.units, words[..., matrix.start :], scale,
            tensors[f"{matrix.prefix}_zero"] if matrix.zero_width else scale,
            tensors[f"{matrix.prefix}_offset"] if matrix.offset else scale,
            *(tensors[f"weight_outliers_{name}"] if corrects else scale for name in entries),
        ]  # fmt: skip

    def _entries(self, corrects: bool) -> tuple[int, int, int]:
        """Stored entries of a row, of a block, and the columns of that."""
        if not corrects:
            return 0, 1, 1
        outliers = self.format.outliers
        return len(self.tensors["weight_outliers_value"]), outliers.count, outliers.block
