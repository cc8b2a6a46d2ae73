"""Products with packed weights on the CPU: only packed words are read.

Three paths, each faster than `packed_matmul_ref` where it is chosen:

- `exact_matmul`  fp32 arithmetic: sums of activations are looked up by the nibbles of the words (kernel.h)
- `int8_matmul`   the same with activations rounded to 8 bits, a scale for each token and up to 128 columns; only where
                  the caller asks for it
- `tiled_matmul`  decodes some rows at a time and multiplies by them: many tokens, and weights with outliers

They are C++ (`native.cpp`, compiled when the package is installed) called through ctypes: it depends on no version of
Python or torch, and numba could not write the AVX-512 lookups that it lives from. The instruction set is chosen at run
time, `isa()` names it. Without the compiled file everything works through the reference. ULTRALOWBIT_CPU=avx2, neon,
portable or reference forces a lesser path.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.weight import Format
from ultralowbit.format.words import group_count, word_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ultralowbit.kernels.packed_matmul import Kernel
    from ultralowbit.kernels.signs import Signs

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Costs(NamedTuple):
    """What else costs as much as looking up so many bits of a weight for one token; measured on 2048 x 2048."""

    dense: dict[torch.dtype, tuple[float, float]]
    """Multiplying by a decoded weight for each token, and decoding it once."""
    int8: Callable[[float, int], float]
    """A product in int8, from the bits of a weight and the streams of fields that they lie in."""
    halves: bool
    """Whether torch multiplies in bf16 and fp16 with instructions for them; else tiles are fp32."""


COSTS = {
    "avx512": Costs(
        {torch.float32: (1.5, 48), torch.bfloat16: (0.6, 32), torch.float16: (5.8, 50)},
        lambda bits, streams: 0.55 * streams + 0.18 * bits, halves=True,
    ),
    "avx2": Costs(dict.fromkeys(DTYPES, (1.95, 25)), lambda bits, streams: 0.7 * bits, halves=False),
}  # fmt: skip
"""By instruction set; others are taken to be like AVX-512."""

_TILE = 1 << 20  # weights decoded at a time


class _Table(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("column", "columns", "width", "group", "mul", "add")]


class _Stream(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("table", "words", "plane", "skip", "stride", "scale", "joined")]


class _Offset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("values", "scale", "table", "width", "middle")]


class _Outliers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("index", "mask", "values", "scale", "zero", "count", "block")]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("columns", "hadamard", "channel_order", "first", "column_scale")),
        *((name, ctypes.c_int64) for name in ("tables", "streams", "offsets", "outlier_formats")),
        ("table", ctypes.POINTER(_Table)),
        ("stream", ctypes.POINTER(_Stream)),
        ("offset", ctypes.POINTER(_Offset)),
        ("outliers", ctypes.POINTER(_Outliers)),
    ]


class _Signs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("latent", "centre", "scale", "stored", "offset", "slope")),
        *((name, ctypes.c_void_p) for name in ("weight", "latent_gradient", "sums")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "groups", "planes", "hadamard")),
        *((name, ctypes.c_int64) for name in ("latent_dtype", "dtype")),
    ]


def _load() -> ctypes.CDLL | None:
    """The compiled file beside this one, or None where there is none that can be used."""
    folder = Path(__file__).parent
    files = [folder / f"native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    try:
        library = ctypes.CDLL(str(next(file for file in files if file.exists())))
    except (StopIteration, OSError):  # installed without a compiler, or copied from another machine
        return None
    for name, result, arguments in (
        ("sources", ctypes.c_char_p, ""),
        ("isa", ctypes.c_char_p, "n"),
        ("product", ctypes.c_int, "nppnpnnpnn"),
        ("decode", ctypes.c_int, "nppnnnnpn"),
        ("round_block", ctypes.c_int, "npppppnnnnnppn"),
        ("amx", ctypes.c_int, ""),
        ("add_products", ctypes.c_int, "ppnnnpn"),
        ("hadamard", None, "npnnnpn"),
        ("signs", ctypes.c_int, "npnn"),
    ):
        function = getattr(library, f"ultralowbit_{name}")
        function.restype = result
        function.argtypes = [ctypes.c_int64 if kind == "n" else ctypes.c_void_p for kind in arguments]
    sources = sorted(file for file in folder.iterdir() if file.suffix in (".cpp", ".h"))  # only in a checkout
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    if sources and digest != library.ultralowbit_sources().decode():
        warnings.warn(
            "kernels/cpu has changed since it was compiled: run `pip install --editable .` again, until then products "
            "on the CPU run the slow reference",
            stacklevel=2,
        )
        return None
    return library


_library = _load()


def instruction_sets() -> list[str]:
    """What the compiled kernels can use on this CPU, best first; empty without them."""
    names = []
    while _library is not None and (name := _library.ultralowbit_isa(len(names))) is not None:
        names.append(name.decode())
    return names


def _chosen() -> int | None:
    """Index of the instruction set to use, None for the reference."""
    names, wanted = instruction_sets(), os.environ.get("ULTRALOWBIT_CPU")
    if wanted == "reference" or not (names or wanted):
        return None
    if wanted and wanted not in names:
        raise ValueError(f"ULTRALOWBIT_CPU is {wanted!r}, expected one of {', '.join([*names, 'reference'])}")
    return names.index(wanted) if wanted else 0


_names = instruction_sets()
_isa = _chosen()


def isa() -> str:
    """The instruction set that the CPU kernels run with, or why there is none."""
    if _isa is not None:
        return instruction_sets()[_isa]
    if _library is None:
        return "reference (no compiled kernels: install a C++ compiler, then ultralowbit again)"
    return "reference (ULTRALOWBIT_CPU)"


class _Planned(NamedTuple):
    """A plan, the bits of a weight and the streams of fields that they lie in; `direct` unless only a decoded weight
    will do."""

    plan: _Plan
    bits: float
    streams: float
    direct: bool


class _Pieces(NamedTuple):
    """What one segment adds to a plan."""

    tables: list[_Table]
    streams: list[_Stream]
    offsets: list[_Offset]


def _planes(segment: Planes, column: int, table: int, at: Mapping[str, int]) -> _Pieces:
    mul, add = (2, -1) if segment.alphabet == "pm1" else (1, 0)
    words = word_count(segment.columns, 1)
    streams = [_Stream(table, at[""], p, 0, words, at["_scale"], 0) for p in range(segment.planes)]
    offsets = [_Offset(at["_offset"], at["_scale"], table, 0, 0)] if segment.offset else []
    return _Pieces([_Table(column, segment.columns, 1, _group(segment), mul, add)], streams, offsets)


def _tied(segment: TiedPlanes, column: int, table: int, at: Mapping[str, int]) -> _Pieces:
    width = segment.planes
    stream = _Stream(table, at[""], 0, 0, word_count(segment.columns, width), at["_scale"], 0)
    return _Pieces([_Table(column, segment.columns, width, _group(segment), 2, 1 - 2**width)], [stream], [])


def _ints(segment: Ints, column: int, table: int, at: Mapping[str, int]) -> _Pieces:
    middle, widths = 2 ** (segment.bits - 1), segment.widths
    sizes = [word_count(segment.columns, width) for width in widths]
    pieces = _Pieces([], [], [])
    if not segment.symmetric:
        pieces.offsets.append(_Offset(at["_zero"], at["_scale"], table, segment.zero_width, middle))
    for k, width in enumerate(widths):
        joined = k + 1 < len(widths)
        pieces.streams.append(_Stream(table + k, at[""], 0, sum(sizes[:k]), sum(sizes), at["_scale"], joined))
        mul, add = 2 ** sum(widths[:k]), -middle if k == 0 else 0
        pieces.tables.append(_Table(column, segment.columns, width, _group(segment), mul, add))
    return pieces


_PIECES = {Planes: _planes, TiedPlanes: _tied, Ints: _ints}
"""The segments that the native code knows: (segment, its first column, the number of its first table, suffix -> the
number of a stored tensor) -> what it adds to a plan."""

_SIZES = {IndexedOutliers: lambda part: (part.count, part.block), MaskedOutliers: lambda part: (part.capacity, 0)}
"""The outliers that it knows -> `count` and `block` of them."""


def _group(segment: Planes | TiedPlanes | Ints) -> int:
    return segment.group or segment.columns


@lru_cache(maxsize=4096)
def _plan(format: Format) -> _Planned | None:
    """How the native code sees a format; None where it has a part that the native code does not know."""
    outliers, transform = format.outliers, format.transform
    if not all(type(s) in _PIECES for s in format.segments) or not (outliers is None or type(outliers) in _SIZES):
        return None
    names = {name: i for i, name in enumerate(format.row_axes)}
    whole, bits, fields, direct = _Pieces([], [], []), 0, 0, outliers is None
    for (prefix, column, _), segment in zip(format.parts, format.segments, strict=False):
        at = {suffix: names[prefix + suffix] for suffix in segment.tensors(1)}
        pieces = _PIECES[type(segment)](segment, column, len(whole.tables), at)
        for all_of, own in zip(whole, pieces, strict=True):
            all_of += own
        # each smaller group is a pass of its own
        direct &= _group(segment) >= 16 or group_count(segment.columns, segment.group) == 1
        share = segment.columns / format.in_features
        bits += share * segment.code_bits
        fields += share * len(pieces.streams)
    tables, streams, offsets = whole
    replaced = []
    if outliers is not None:
        places = [names.get(f"weight_outliers_{part}", -1) for part in ("index", "mask", "value", "scale", "zero")]
        replaced.append(_Outliers(*places, *_SIZES[type(outliers)](outliers)))
    plan = _Plan(
        format.in_features, (transform and transform.hadamard) or 0, names.get("weight_input_channel_order", -1),
        format.segments[0].columns, names.get("weight_input_scale", -1), len(tables), len(streams), len(offsets),
        len(replaced), (_Table * len(tables))(*tables), (_Stream * len(streams))(*streams),
        (_Offset * len(offsets))(*offsets), (_Outliers * len(replaced))(*replaced),
    )  # fmt: skip
    return _Planned(plan, bits, fields, direct)


def choose(format: Format, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel | None:
    """The fp32-exact path for a case: what `KERNELS` asks."""
    if _isa is None or dtype not in DTYPES or (planned := _plan(format)) is None:
        return None
    return exact_matmul if planned.direct and _beats_decoding(planned.bits, dtype, tokens) else tiled_matmul


def choose_int8(format: Format, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel | None:
    """The path for a case whose activations may be rounded to 8 bits, or None."""
    if _isa is None or dtype not in DTYPES or (planned := _plan(format)) is None:
        return None
    cost = _costs().int8(planned.bits, planned.streams)
    return int8_matmul if planned.direct and _beats_decoding(cost, dtype, tokens) else None


def _costs() -> Costs:
    return COSTS.get(_names[_isa], COSTS["avx512"])


def _beats_decoding(cost: float, dtype: torch.dtype, tokens: int) -> bool:
    dense, decoding = _costs().dense[dtype]
    return tokens * (cost - dense) <= decoding


def exact_matmul(x: Tensor, tensors: dict[str, Tensor], format: Format) -> Tensor:
    """x [tokens, in] times a packed weight -> [tokens, out]: products and sums in fp32, rounded once to x's dtype."""
    return _product(x, tensors, format, int8=False)


def int8_matmul(x: Tensor, tensors: dict[str, Tensor], format: Format) -> Tensor:
    """As `exact_matmul`, of activations rounded to 8 bits: an error of up to 1/254 of the largest in 128 columns."""
    return _product(x, tensors, format, int8=True)


def tiled_matmul(x: Tensor, tensors: dict[str, Tensor], format: Format) -> Tensor:
    """What `packed_matmul_ref` computes, some rows of the weight at a time; in fp32 where that is faster."""
    x, out = format.transformed(tensors, x), tensors["weight"].shape[-2]
    y = x.new_empty(len(x), out)
    x = x if _costs().halves else x.float()
    tile = x.new_empty(max(16, _TILE // format.in_features), format.in_features)
    for row in range(0, out, len(tile)):
        rows = tile[: out - row]
        decode_rows(tensors, format, row, rows)
        y[:, row : row + len(rows)] = F.linear(x, rows)
    return y


def decode_rows(tensors: dict[str, Tensor], format: Format, row: int, to: Tensor) -> None:
    """Write the rows of the weight from `row` on into `to` [rows, in], as `format.untransformed.decode` has them."""
    _call("decode", tensors, format, row, len(to), DTYPES[to.dtype], to.data_ptr())


def _product(x: Tensor, tensors: dict[str, Tensor], format: Format, int8: bool) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(len(x), tensors["weight"].shape[-2])
    _call("product", tensors, format, x.data_ptr(), DTYPES[x.dtype], len(x), y.data_ptr(), int8)
    return y


def _call(name: str, tensors: dict[str, Tensor], format: Format, *arguments: int) -> None:
    kept = [t.contiguous() for t in tensors.values()]  # a caller may hand over slices of rows
    pointers = (ctypes.c_void_p * len(kept))(*[t.data_ptr() for t in kept])
    plan, out = ctypes.addressof(_plan(format).plan), tensors["weight"].shape[-2]
    function = getattr(_library, f"ultralowbit_{name}")
    if function(_isa, plan, pointers, out, *arguments, torch.get_num_threads()):
        raise MemoryError("no memory for the tables of a product: use fewer tokens at a time")


def _address(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor begins; raises `RuntimeError` unless it is what is read or written from there on."""
    if not (tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == dtype and tensor.shape == shape):
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        raise RuntimeError(f"a kernel of the CPU was given {found}, expected contiguous {dtype} {list(shape)} on cpu")
    return tensor.data_ptr()


def _check_block(block: int) -> None:
    if block < 1 or block & (block - 1):
        raise RuntimeError(f"the block of a Hadamard matrix is {block}, expected a power of two")


def round_block(
    weight: Tensor, rest: Tensor, R: Tensor, tables: Tensor, which: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """`kernels.columns.round_block`, several rows of the weight at a time; `runs_here` says whether it can."""
    weight, R, tables, which = (t.contiguous() for t in (weight, R, tables, which))
    gram, rest = R @ R.T if sweeps else R, rest.clone(memory_format=torch.contiguous_format)
    values = torch.empty_like(rest)
    (columns, out), (groups, levels, _) = weight.shape, tables.shape
    whole, square = (columns, out), (columns, columns)
    pointers = [_address(weight, whole), _address(R, square), _address(gram, square)]
    pointers += [_address(tables, (groups, levels, out)), _address(which, (columns,), torch.int64)]
    results = (_address(rest, whole), _address(values, whole))
    if levels < 1 or (columns and not 0 <= int(which.min()) <= int(which.max()) < groups):
        raise RuntimeError(
            f"columns are of the groups {which.tolist()}, of which there are {groups} of {levels} levels"
        )
    numbers = (columns, out, groups, levels, sweeps)
    if _library.ultralowbit_round_block(_isa, *pointers, *numbers, *results, torch.get_num_threads()):
        raise MemoryError("no memory for rounding a block of columns: use fewer threads")
    return values, rest


def add_products(total: Tensor, x: Tensor, y: Tensor | None) -> None:
    """`kernels.products.add_products`, rounded to bfloat16; `has_amx` says whether it can."""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    (tokens, n), m = x.shape, (x if y is None else y).shape[1]
    left, right = _address(x, (tokens, n)), None if y is None else _address(y, (tokens, m))
    sums = _address(total, (n, m))
    if _library.ultralowbit_add_products(left, right, tokens, n, m, sums, torch.get_num_threads()):
        raise MemoryError("no memory for the tiles of a product: use fewer tokens at a time")


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """`kernels.hadamard.block_hadamard` of x [rows, columns] fp32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    addresses = [_address(t, tuple(x.shape)) for t in (x, y)]
    _check_block(block)
    _library.ultralowbit_hadamard(_isa, addresses[0], *x.shape, block, addresses[1], torch.get_num_threads())
    return y


def nearest_signs(latent: Tensor, stored: Tensor, offset: Tensor | None, signs: Signs, dtype: torch.dtype) -> Tensor:
    """`kernels.signs.weight`."""
    weight = torch.empty(latent.shape, dtype=dtype)
    _nearest_signs(latent, signs, weight, gradient=False, stored=stored, offset=offset)
    return weight


def nearest_signs_gradients(
    grad: Tensor, latent: Tensor, slope: Tensor, with_offset: bool, signs: Signs
) -> tuple[Tensor, Tensor]:
    """`kernels.signs.gradients`."""
    rows, planes, groups = signs.scale.shape
    own = torch.empty(latent.shape, dtype=latent.dtype)
    sums = torch.empty(rows, planes + with_offset, groups, dtype=torch.float32)
    offset = sums if with_offset else None  # not read: says that there is one
    _nearest_signs(latent, signs, grad, gradient=True, slope=slope, offset=offset, latent_gradient=own, sums=sums)
    return own, sums


def _nearest_signs(latent: Tensor, signs: Signs, weight: Tensor, gradient: bool, **tensors: Tensor | None) -> None:
    tensors |= {"latent": latent, "weight": weight, "scale": signs.scale, "centre": signs.centre}
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    (rows, columns), planes, groups = latent.shape, signs.scale.shape[1], group_count(latent.shape[1], signs.group)
    shapes = dict.fromkeys(("latent", "weight", "latent_gradient"), (rows, columns))
    shapes |= dict.fromkeys(("scale", "stored"), (rows, planes, groups))
    shapes |= dict.fromkeys(("centre", "offset", "slope"), (rows, groups))
    sums = (rows, planes + ("offset" in kept), groups)
    shapes |= {"sums": sums, "offset": sums} if gradient else {}
    _check_block(signs.block or 1)
    halves = {"latent": latent.dtype, "latent_gradient": latent.dtype, "weight": weight.dtype}
    job = _Signs(
        **{name: _address(t, shapes[name], halves.get(name, torch.float32)) for name, t in kept.items()}, rows=rows,
        columns=columns, group=signs.group, groups=groups, planes=planes, hadamard=signs.block,
        latent_dtype=DTYPES[latent.dtype], dtype=DTYPES[weight.dtype],
    )  # fmt: skip
    if _library.ultralowbit_signs(_isa, ctypes.addressof(job), gradient, torch.get_num_threads()):
        raise MemoryError("no memory for the rows of a weight: use fewer threads")


def has_amx() -> bool:
    """Whether compiled kernels are used that multiply bfloat16 numbers by AMX tiles."""
    return _isa is not None and _names[_isa] == "avx512" and bool(_library.ultralowbit_amx())


def runs_here() -> bool:
    """Whether compiled kernels are used."""
    return _isa is not None
