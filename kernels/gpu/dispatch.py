"""Which Triton kernels multiply by a format on a GPU, and with which tiles.

Up to `gemv_tokens` and `gemm_tokens` tokens fields are multiplied as they are stored (`gemv`, `gemm`: the same kernels
with tiles of 8 and of 16 tokens), where the format is a sum of `matrices`. For more tokens, and for all other formats,
the weight is written out and multiplied by cuBLAS (`dequantized`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format.outliers import IndexedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels.gpu.dequantize import dequantize, knows, words_of
from ultralowbit.kernels.gpu.fields import Matrix, matrices, multiply, reduce
from ultralowbit.kernels.gpu.inputs import prologue, transformed
from ultralowbit.kernels.gpu.launch import NARROWEST_DOT, Launch, cdiv, run
from ultralowbit.kernels.gpu.outliers import correct

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCE_ROWS = 256
OUTLIER_ROWS, OUTLIER_ENTRIES, OUTLIER_SPLITS = 128, 16, 64
"""Rows of a program, entries of each that it is to take, and the most programs that share a row's entries: one entry
after the other is read and then gathered for, which is slow unless there are many at a time."""
DENSE_WEIGHTS = 1 << 26
"""Weights that are written out at a time: 128 MiB in 16 bits."""
LARGEST_HADAMARD = 1 << 15


@dataclass(frozen=True)
class Tile:
    """rows of the weight in a program, its warps, and the depth of its pipeline of loads."""

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """gemv_tokens, gemm_tokens: up to how many tokens fields are multiplied as they are stored; programs: how many for
    each multiprocessor a product is split into; tiles: by the tokens in a tile."""

    gemv_tokens: int
    gemm_tokens: int
    programs: int
    tiles: Mapping[int, Tile]
    processors: int = 132

    def tile(self, tokens: int) -> tuple[int, Tile]:
        """The smallest tile that holds the tokens, or the largest."""
        size = min((size for size in self.tiles if size >= tokens), default=max(self.tiles))
        return size, self.tiles[size]


@lru_cache
def tuning_of(device: torch.device) -> Tuning:
    """The tuning of the GPU that this is."""
    properties = torch.cuda.get_device_properties(device)
    return read_tuning(properties.name, properties.multi_processor_count)


def read_tuning(name: str, processors: int) -> Tuning:
    """Of a GPU by its name; what `tuning.json` does not list has the values of `default`."""
    table = json.loads(Path(__file__).with_name("tuning.json").read_text())
    values = table["default"] | table.get(name, {})
    tiles = {int(size): Tile(**tile) for size, tile in values.pop("tiles").items() if int(size) >= NARROWEST_DOT}
    return Tuning(**values, tiles=tiles, processors=processors)


def choose(format: Format, device: torch.device, dtype: torch.dtype, tokens: int) -> Callable[..., Tensor] | None:
    """The `packed_matmul.Chooser` of CUDA devices."""
    hadamard = format.transform and format.transform.hadamard
    if dtype not in DTYPES or not has_tensor_cores(device) or (hadamard or 0) > LARGEST_HADAMARD:
        return None
    if not knows(format):
        return None
    tuning = tuning_of(device)
    if matrices(format) is None or tokens > tuning.gemm_tokens:
        return dequantized
    if tokens <= tuning.gemv_tokens and (format.outliers is None or lies_on_planes(format)):
        return gemv
    return gemm if format.outliers is None else dequantized


@lru_cache
def has_tensor_cores(device: torch.device) -> bool:
    """NVIDIA's, from Ampere on: the kernels are written for their assembly."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def lies_on_planes(format: Format) -> bool:
    """Whether the outliers are such that a kernel corrects the product of the segments for them."""
    return isinstance(format.outliers, IndexedOutliers) and [type(part) for part in format.segments] == [Planes]


def gemv(x: Tensor, tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    """For one tile of tokens: bound by reading and unpacking the fields."""
    return _run_product(x, tensors, format)


def gemm(x: Tensor, tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    """For some tiles of tokens, each of which unpacks the fields again: bound by the tensor cores."""
    return _run_product(x, tensors, format)


def _run_product(x: Tensor, tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # a caller may hand over slices of rows
    launches, y = product(x, tensors, format, tuning_of(x.device), subnormals_are_exact(x.device))
    run(launches, x.device)
    return y


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
    """The launches that multiply x [tokens, in] by the stored fields, and y [tokens, out] that they leave."""
    out_rows, tokens = tensors["weight"].shape[-2], len(x)
    digits = 2 if x.dtype == torch.float32 else 1
    y = x.new_empty(tokens, out_rows)
    launches, x = transformed(x, tensors, format, torch.float32)
    whole = matrices(format)
    lines = digits * tokens
    size, tile = tuning.tile(lines)
    tiles = cdiv(lines, size) * cdiv(out_rows, tile.rows)
    wanted = tuning.programs * tuning.processors  # of each matrix: they run one after the other
    parts = [m.planes * min(m.blocks, cdiv(wanted, tiles * m.planes)) for m in whole]
    if format.outliers is not None:
        parts.append(min(OUTLIER_SPLITS, cdiv(len(tensors["weight_outliers_value"]), OUTLIER_ENTRIES)))
    partial = x.new_empty(sum(parts), lines, out_rows, dtype=torch.float32)
    partials = partial.split(parts)
    for matrix, out in zip(whole, partials, strict=False):
        x16 = x.new_empty(lines, matrix.blocks * matrix.block, dtype=torch.float16)
        sums = x.new_empty(lines, matrix.blocks * matrix.groups_in_block, dtype=torch.float32)
        units = x.new_empty(lines, matrix.blocks, dtype=torch.float32)
        launches += [
            _prologue(x, x16, sums, units, matrix, digits),
            _multiply(x16, sums, units, tensors, out, matrix, size, tile, subnormal),
        ]
    if format.outliers is not None:
        launches.append(_correct(x, tensors, partials[-1], format))
    grid = cdiv(out_rows, REDUCE_ROWS), tokens
    constants = {"digits": digits, "BN": REDUCE_ROWS}
    return [*launches, Launch(reduce, grid, (partial, y, len(partial), tokens, out_rows), constants)], y


def _prologue(x: Tensor, x16: Tensor, sums: Tensor, units: Tensor, matrix: Matrix, digits: int) -> Launch:
    args = (
        x, x16, sums, units, len(x), *x.stride(), matrix.column, matrix.columns, matrix.blocks, matrix.full,
        matrix.lanes, matrix.group or matrix.columns,
    )  # fmt: skip
    constants = {"width": matrix.width, "groups_in_block": matrix.groups_in_block, "digits": digits}
    return Launch(prologue, (matrix.blocks, len(x)), args, constants)


def _multiply(
    x16: Tensor, sums: Tensor, units: Tensor, tensors: Mapping[str, Tensor], partial: Tensor, matrix: Matrix,
    size: int, tile: Tile, subnormal: bool,
) -> Launch:  # fmt: skip
    words, scale = tensors[matrix.prefix], tensors[f"{matrix.prefix}_scale"]
    zero = tensors[f"{matrix.prefix}_zero"] if matrix.zero_width else scale
    offset = tensors[f"{matrix.prefix}_offset"] if matrix.offset else scale
    lines, out_rows = len(x16), words.shape[-2]
    aligned = math.gcd(8, matrix.stride, matrix.start, matrix.lanes)
    args = (
        x16, sums, units, words[..., matrix.start :], scale, zero, offset, partial, lines, out_rows, matrix.planes,
        out_rows * matrix.stride // aligned, matrix.stride // aligned, matrix.blocks, matrix.full,
        matrix.lanes // aligned, matrix.groups, matrix.blocks_in_group, len(partial) // matrix.planes,
    )  # fmt: skip
    row_scale = matrix.groups == 1
    constants = {
        "width": matrix.width, "fields_in_group": matrix.fields // matrix.groups_in_block, "row_scale": row_scale,
        "tail": matrix.tails > 0, "multiplier": matrix.multiplier, "z": matrix.zero, "zero_width": matrix.zero_width,
        "has_offset": matrix.offset, "subnormal": subnormal, "aligned": aligned, "few_rows": out_rows < tile.rows,
        "BM": size, "BN": tile.rows,
    }  # fmt: skip
    grid = cdiv(lines, size), cdiv(out_rows, tile.rows), len(partial)
    return Launch(multiply, grid, args, constants, tile.warps, tile.stages)


def _correct(x: Tensor, tensors: Mapping[str, Tensor], partial: Tensor, format: Format) -> Launch:
    (part,), outliers = format.segments, format.outliers
    words, scale = tensors["weight"], tensors["weight_scale"]
    stored = [tensors[f"weight_outliers_{name}"] for name in ("index", "value", "scale", "zero")]
    entries, out_rows = stored[0].shape
    splits, lines, _ = partial.shape
    size = min(8, 1 << (lines - 1).bit_length())
    args = (
        x, *stored, words, scale, tensors.get("weight_offset", scale), partial, len(x), lines, *x.stride(), out_rows,
        entries, outliers.count, outliers.block, *words_of(part.columns, 1), words.shape[-1], scale.shape[1],
        part.group or part.columns, splits,
    )  # fmt: skip
    constants = {
        "planes": part.planes, "sign": part.alphabet == "pm1", "has_offset": part.offset, "BM": size,
        "BN": OUTLIER_ROWS,
    }  # fmt: skip
    return Launch(correct, (cdiv(lines, size), cdiv(out_rows, OUTLIER_ROWS), splits), args, constants)
