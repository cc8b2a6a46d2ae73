"""The compiled CPU kernels, with every instruction set that this CPU has, against fp64 and the decoded weight."""

from __future__ import annotations

import ctypes
import json
import shutil
import struct
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.segment import Segment
from ultralowbit.format.testing import random_packed
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels import cpu
from ultralowbit.kernels import packed_matmul as op
from ultralowbit.kernels.packed_matmul import kernel_for, packed_matmul, packed_matmul_ref
from ultralowbit.kernels.signs import Signs

ISAS = cpu.instruction_sets()
needs_kernels = pytest.mark.skipif(not ISAS, reason="the package was installed without a compiler")
pytestmark = pytest.mark.filterwarnings("error")

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a step at 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def magnitudes(packed: PackedWeight) -> Tensor:
    """What a kernel adds up, without signs: |scale| |code| of every plane and |offset|, [out, in] in fp64."""
    weights = []
    for i, segment in enumerate(packed.format.segments):
        name = "weight" if i == 0 else f"weight_{i}"
        group = segment.group or segment.columns
        of_column = torch.arange(segment.columns) // group
        scale = packed.tensors[f"{name}_scale"].double().abs()[..., of_column, :]
        if isinstance(segment, Ints):
            largest = 2**segment.bits  # |code - middle| + |middle - zero|
        else:
            largest = 2**segment.planes - 1 if isinstance(segment, TiedPlanes) else 1
        total = (scale if isinstance(segment, Planes) else scale[None]).sum(0).T * largest
        if isinstance(segment, Planes) and segment.offset:
            total += packed.tensors[f"{name}_offset"].double().abs()[of_column].T
        weights.append(total)
    return torch.cat(weights, dim=1)


def expected_and_bound(packed: PackedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    """The fp64 product and how far from it fp32 sums in any order may end, rounded once to x's dtype.

    A sum of depth d has an error below d u / (1 - d u) times the sum of magnitudes: 3 additions make a table's entry,
    16 words of each parity are added, then nibbles, superblocks, planes, groups' offsets; Hadamard blocks before them.
    """
    x = x.double()
    format = packed.format
    expected = x @ _decode64(packed).T
    inputs = _transformed64(packed, x).abs()
    words = sum(s.columns for s in format.segments)
    if format.transform is not None and format.transform.hadamard:  # magnitudes spread over the blocks
        inputs = x.norm(dim=-1, keepdim=True) * _column_scale(packed)
    depth = 3 + 32 + 4 + 4 * (words // 64 + 4) + words // 16 + 20
    bound = 2.0**-24 * depth * (inputs @ magnitudes(packed).T)
    return expected, bound


def _column_scale(packed: PackedWeight) -> Tensor:
    scale = packed.tensors.get("weight_input_scale")
    return torch.ones(packed.shape[1], dtype=torch.float64) if scale is None else scale.double().abs()


def _transformed64(packed: PackedWeight, x: Tensor) -> Tensor:
    """T(x) of fp64 x, through the matrix that T is: its columns are what it makes of the unit vectors."""
    if packed.format.transform is None:
        return x
    return x @ packed.format.transformed(packed.tensors, torch.eye(packed.shape[1])).double()


def _decode64(packed: PackedWeight) -> Tensor:
    """Products with T in fp64: `dequantize` rounds the rotated weight to fp32."""
    plain = packed.format.untransformed.decode(packed.tensors).double()
    return _transformed64(packed, torch.eye(packed.shape[1], dtype=torch.float64)).matmul(plain.T).T


def multiply(x: Tensor, packed: PackedWeight, int8: bool = False) -> Tensor:
    return packed_matmul(x, list(packed.tensors.values()), json.dumps(packed.format.to_dict()), int8)


def assert_exact(packed: PackedWeight, x: Tensor) -> None:
    y = cpu.exact_matmul(x, packed.tensors, packed.format)
    assert y.dtype == x.dtype and y.shape == (len(x), packed.shape[0])
    expected, bound = expected_and_bound(packed, x)
    tiny = torch.finfo(x.dtype).smallest_normal
    error, allowed = (y.double() - expected).abs(), bound + UNIT[x.dtype] * (expected.abs() + bound) + tiny
    assert (error <= allowed).all(), f"{packed.format.summary}: {(error / allowed).max():.3g} of what is allowed"


def assert_int8(packed: PackedWeight, x: Tensor) -> None:
    """Rounding moves an activation by up to half a 127th of the largest in its unit."""
    y = cpu.int8_matmul(x, packed.tensors, packed.format)
    expected, bound = expected_and_bound(packed, x)
    inputs = _transformed64(packed, x.double())
    steps = inputs.abs().amax(dim=1, keepdim=True).expand_as(inputs) / 254 * (1 + 1e-5)
    allowed = steps @ magnitudes(packed).T + bound + UNIT[x.dtype] * (expected.abs() * 1.02 + 1e-30)
    assert ((y.double() - expected).abs() <= allowed).all(), packed.format.summary


@st.composite
def segments(draw) -> Segment:
    columns = draw(st.one_of(st.integers(1, 70), st.integers(1, 1300), st.sampled_from([512, 1024, 768])))
    group = draw(st.one_of(st.none(), st.sampled_from([32, 64, 128, 256]), st.integers(16, 200)))
    kind = draw(st.sampled_from([Planes, Ints, TiedPlanes]))
    if kind is TiedPlanes:
        return TiedPlanes(columns, draw(st.sampled_from([2, 4])), group)
    if kind is Planes:
        planes, alphabet = draw(st.integers(1, 4)), draw(st.sampled_from(["pm1", "01"]))
        return Planes(columns, planes, group, alphabet, draw(st.booleans()))
    return Ints(columns, draw(st.sampled_from([2, 3, 4, 8])), group, draw(st.booleans()))


@st.composite
def formats(draw) -> Format:
    parts = tuple(draw(st.lists(segments(), min_size=1, max_size=2)))
    columns = sum(s.columns for s in parts)
    transform = None
    if draw(st.booleans()):
        hadamard = draw(st.sampled_from([None, 2, 32, 4096]))
        channel_order, scale = draw(st.booleans()), draw(st.booleans())
        if hadamard or channel_order or scale:
            transform = InputTransform(columns, channel_order, scale, hadamard)
    return Format(parts, None, transform)


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(format=formats(), out=st.integers(1, 40), tokens=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("name", ISAS)
def test_any_format_and_shape(name, format, out, tokens, seed, data):
    packed = random_packed(format, out, seed)
    dtype = data.draw(st.sampled_from(list(UNIT)))
    x = torch.randn(tokens, format.in_features, generator=generator(seed)).to(dtype)
    kept, cpu._isa = cpu._isa, ISAS.index(name)  # hypothesis runs many examples in one test
    try:
        assert_exact(packed, x)
        assert_int8(packed, x)
    finally:
        cpu._isa = kept


FORMATS = {
    "1 plane, row": Format((Planes(1100, 1),)),
    "2 planes, g128": Format((Planes(1100, 2, 128),)),
    "4 bool planes, g64, offset": Format((Planes(1100, 4, 64, "01", True),)),
    "2 tied planes, row": Format((TiedPlanes(1100, 2),)),
    "int2, g128": Format((Ints(1100, 2, 128),)),
    "int3, g64": Format((Ints(1100, 3, 64),)),
    "int4, g32": Format((Ints(1100, 4, 32),)),
    "int8, row": Format((Ints(1100, 8),)),
    "salient channels": Format(
        (Ints(230, 4, None), Planes(870, 1, None, "pm1", True)), None, InputTransform(1100, True, True, 64)
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_many_rows(isa, kind):
    packed = random_packed(FORMATS[kind], 300)
    x = torch.randn(3, 1100, generator=generator(1))
    assert_exact(packed, x)
    assert_int8(packed, x)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
def test_threads_and_company_do_not_change_a_result(isa, kind, int8):
    """A token's result has the same bits on one thread or more, alone or among others."""
    packed = random_packed(FORMATS[kind], 300)
    x = torch.randn(5, 1100, generator=generator(1)).bfloat16()
    matmul = cpu.int8_matmul if int8 else cpu.exact_matmul
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(matmul(x, packed.tensors, packed.format))
    finally:
        torch.set_num_threads(threads)
    results.append(torch.cat([matmul(row[None], packed.tensors, packed.format) for row in x]))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind", ["2 planes, g128", "int3, g64", "salient channels"])
def test_every_output_is_written(isa, kind, monkeypatch):
    packed = random_packed(FORMATS[kind], 53)
    x = torch.randn(2, 1100, generator=generator(1))
    expected = [f(x, packed.tensors, packed.format) for f in (cpu.exact_matmul, cpu.int8_matmul, cpu.tiled_matmul)]
    new_full = torch.Tensor.new_full
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: new_full(self, size, torch.nan, **kw))
    products = [f(x, packed.tensors, packed.format) for f in (cpu.exact_matmul, cpu.int8_matmul, cpu.tiled_matmul)]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(expected, products, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_is_not_hidden(isa, bad):
    packed = random_packed(FORMATS["2 planes, g128"], 20)
    x = torch.randn(2, 1100, generator=generator(1))
    x[1, 700] = bad
    for matmul in (cpu.exact_matmul, cpu.int8_matmul):
        y = matmul(x, packed.tensors, packed.format)
        assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_an_outlier_costs_only_its_unit_its_precision(isa):
    """In int8, activations have a scale for each 128 columns."""
    packed = random_packed(Format((Planes(1024, 1),)), 40)
    x = torch.randn(1, 1024, generator=generator(1))
    x[0, 900] = 1e4
    packed.tensors["weight"].zero_()  # all signs equal: what column 900 adds is known
    scale = packed.tensors["weight_scale"].double()[0]
    blocks = x.double().view(8, 128).abs().amax(1)
    error = cpu.int8_matmul(x, packed.tensors, packed.format).double() + x.double().sum() * scale
    small = (blocks.sum() - blocks[7]) * 128 / 254 + 127 * 1e4 / 254  # of column 900's neighbours
    assert (error.abs() <= scale.abs() * (small + 2.0**-24 * 100 * x.abs().sum())).all()


def test_zeros_and_columns_beyond_the_end(isa):
    packed = random_packed(FORMATS["1 plane, row"], 20)
    x = torch.zeros(1, 1100)
    assert torch.equal(cpu.exact_matmul(x, packed.tensors, packed.format), torch.zeros(1, 20))
    assert torch.equal(cpu.int8_matmul(x, packed.tensors, packed.format), torch.zeros(1, 20))


ARM = {"compiler": "aarch64-linux-gnu-g++", "emulator": "qemu-aarch64"}


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory) -> Path:
    """The kernels for 64-bit ARM, in a program that reads a product and writes its result."""
    if not ISAS or not all(map(shutil.which, ARM.values())):
        pytest.skip("needs a compiler for ARM and an emulator: apt install g++-aarch64-linux-gnu qemu-user")
    sources, program = Path(cpu.__file__).parent, tmp_path_factory.mktemp("arm") / "product"
    files = [*sources.glob("*.cpp"), Path(__file__).with_name("product_main.cpp")]
    options = ["-O1", "-std=c++17", "-static", "-pthread", "-w", "-ffp-contract=off", '-DSOURCES=""', f"-I{sources}"]
    subprocess.run([ARM["compiler"], *options, *map(str, files), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("index, name", [(0, "neon-dotprod"), (1, "neon")], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_on_arm(arm_program, index, name, kind, monkeypatch):
    def call(function, tensors, format, x, dtype, tokens, y, int8):
        plan, size = cpu._plan(format).plan, 2 if dtype else 4
        out, data = tensors["weight"].shape[-2], ctypes.string_at(x, tokens * format.in_features * size)
        parts = [struct.pack("7q", index, len(tensors), out, dtype, tokens, int8, len(data)), bytes(plan)]
        counts = {"table": plan.tables, "stream": plan.streams, "offset": plan.offsets}
        parts += [bytes(getattr(plan, part)[i]) for part, count in counts.items() for i in range(count)]
        for tensor in tensors.values():
            stored = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
            parts += [struct.pack("q", len(stored)), stored]
        command = [ARM["emulator"], "-cpu", "max", str(arm_program)]
        done = subprocess.run(command, input=b"".join([*parts, data]), capture_output=True, check=True)
        assert done.stderr.decode() == name
        ctypes.memmove(y, done.stdout, tokens * out * size)

    monkeypatch.setattr(cpu, "_call", call)
    packed = random_packed(FORMATS[kind], 21)
    dtype = list(UNIT)[list(FORMATS).index(kind) % len(UNIT)]
    x = torch.randn(3, 1100, generator=generator(1)).to(dtype)
    assert_exact(packed, x)
    assert_int8(packed, x)


OUTLIER_FORMATS = {
    "outliers": Format((Planes(700, 1, 128, "pm1", True),), IndexedOutliers(700, 25)),
    "masked": Format((Planes(300, 2, 64), Ints(400, 3, 50)), MaskedOutliers(700, 120, 0.1)),
    "transform": Format((Ints(700, 4, 128),), IndexedOutliers(700, 3, 100), InputTransform(700, hadamard=64)),
}


@pytest.mark.parametrize("kind", [*FORMATS, *OUTLIER_FORMATS])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_decoding_is_that_of_the_format(isa, kind, dtype):
    packed = random_packed((FORMATS | OUTLIER_FORMATS)[kind], 37)
    tile = torch.full(packed.shape, torch.nan, dtype=dtype)
    cpu.decode_rows(packed.tensors, packed.format, 0, tile)
    assert torch.equal(tile, packed.format.untransformed.decode(packed.tensors, dtype))


@pytest.mark.parametrize("kind", OUTLIER_FORMATS)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_tiles_multiply_like_the_reference(isa, kind, dtype, tokens, monkeypatch):
    monkeypatch.setattr(cpu, "_TILE", 700 * 16)
    packed = random_packed(OUTLIER_FORMATS[kind], 37)
    x = torch.randn(tokens, 700, generator=generator(1)).to(dtype)
    assert kernel_for(packed.format, "cpu", dtype, tokens) is cpu.tiled_matmul
    y, reference = multiply(x, packed), packed_matmul_ref(x, packed.tensors, packed.format)
    exact = x.double() @ packed.dequantize().double().T
    scale = exact.abs().max() * UNIT[dtype]
    assert (y.double() - exact).abs().max() <= 2 * (reference.double() - exact).abs().max() + scale


def test_more_tokens_than_tables_fit_in_memory(isa):
    packed = random_packed(Format((Ints(1100, 4, 64),)), 20)  # 80 KB of tables a token
    x = torch.randn(131, 1100, generator=generator(1))
    assert_exact(packed, x)
    alone = [cpu.exact_matmul(row[None], packed.tensors, packed.format) for row in x[::10]]
    assert torch.equal(cpu.exact_matmul(x, packed.tensors, packed.format)[::10], torch.cat(alone))


def test_slices_of_rows_and_strided_inputs(isa):
    packed = random_packed(FORMATS["int3, g64"], 64)
    x = torch.randn(1100, 2, 3, generator=generator(1)).permute(2, 1, 0)
    whole = multiply(x, packed)
    rows = PackedWeight(packed.format, (20, 1100), packed.format.rows(packed.tensors, slice(30, 50)))
    assert torch.equal(multiply(x, rows), whole[..., 30:50])
    assert torch.equal(multiply(x.contiguous(), packed), whole)
    assert multiply(x[:0], packed).shape == (0, 2, 64)


@needs_kernels
def test_the_path_is_told():
    plain, small, outliers = FORMATS["int4, g32"], Format((Planes(100, 1, 8),)), OUTLIER_FORMATS["outliers"]
    assert kernel_for(plain, "cpu", torch.bfloat16, 1) is cpu.exact_matmul
    assert kernel_for(plain, "cpu", torch.bfloat16, 20) is cpu.tiled_matmul
    assert kernel_for(plain, "cpu", torch.bfloat16, 1, int8=True) is cpu.int8_matmul
    assert kernel_for(plain, "cpu", torch.bfloat16, 20, int8=True) is cpu.int8_matmul
    assert kernel_for(plain, "cpu", torch.bfloat16, 400, int8=True) is cpu.tiled_matmul
    assert kernel_for(plain, "cpu", torch.float64) is packed_matmul_ref
    for format in (small, outliers):  # groups of 8 columns would need 16 tables for a nibble
        assert kernel_for(format, "cpu") is cpu.tiled_matmul is kernel_for(format, "cpu", int8=True)
    assert kernel_for(plain, "meta") is packed_matmul_ref


def test_the_instruction_set_can_be_chosen(monkeypatch):
    monkeypatch.setenv("ULTRALOWBIT_CPU", "reference")
    monkeypatch.setattr(cpu, "_isa", cpu._chosen())
    assert kernel_for(FORMATS["int2, g128"], "cpu") is packed_matmul_ref and cpu.isa().startswith("reference")
    for i, name in enumerate(ISAS):
        monkeypatch.setenv("ULTRALOWBIT_CPU", name)
        assert cpu._chosen() == i
    monkeypatch.setenv("ULTRALOWBIT_CPU", "mmx")
    with pytest.raises(ValueError, match="ULTRALOWBIT_CPU is 'mmx', expected one of"):
        cpu._chosen()


def test_without_compiled_kernels_the_reference_runs(monkeypatch):
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.delenv("ULTRALOWBIT_CPU", raising=False)
    monkeypatch.setattr(cpu, "_isa", cpu._chosen())
    assert cpu.instruction_sets() == [] and "install a C++ compiler" in cpu.isa()
    packed = random_packed(FORMATS["int4, g32"], 10)
    x = torch.randn(2, 1100, generator=generator(1))
    assert kernel_for(packed.format, "cpu") is packed_matmul_ref
    assert torch.equal(multiply(x, packed), packed_matmul_ref(x, packed.tensors, packed.format))
    assert torch.equal(multiply(x, packed, int8=True), packed_matmul_ref(x, packed.tensors, packed.format))


def test_int8_only_where_it_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(op, "INT8_KERNELS", {"cpu": lambda *case: seen.append(case)})
    packed = random_packed(FORMATS["int4, g32"], 10)
    x = torch.randn(2, 1100, generator=generator(1))
    exact = multiply(x, packed)
    assert not seen
    assert torch.equal(multiply(x, packed, int8=True), exact)  # what has no path in 8 bits takes the exact one
    assert seen == [(packed.format, torch.device("cpu"), torch.float32, 2)]


@needs_kernels
def test_a_compiled_file_of_other_sources_is_not_used(tmp_path, monkeypatch):
    folder = shutil.copytree(Path(cpu.__file__).parent, tmp_path / "changed")
    monkeypatch.setattr(cpu, "__file__", str(folder / "__init__.py"))
    assert cpu._load() is not None
    (folder / "kernel.h").write_text("// another\n")
    with pytest.warns(match="has changed since it was compiled: run `pip install --editable"):
        assert cpu._load() is None


@needs_kernels
def test_a_compiled_file_of_another_machine_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / f"native{EXTENSION_SUFFIXES[-1]}").write_bytes(b"of another machine")
    assert cpu._load() is None


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32)


ENTRIES = {
    "hadamard": lambda bad: cpu.block_hadamard(bad(ones(4, 8)), 8),
    "products": lambda bad: cpu.add_products(ones(8, 8), ones(4, 8), bad(ones(4, 8))),
    "columns": lambda bad: cpu.round_block(
        ones(4, 8), bad(ones(4, 8)), torch.eye(4), ones(1, 2, 8), torch.zeros(4, dtype=torch.int64), 1
    ),
    "signs": lambda bad: cpu.nearest_signs(
        ones(4, 8), bad(ones(4, 2, 8)), None, Signs(ones(4, 2, 8), None, 1, 0), torch.float32
    ),
    "gradients": lambda bad: cpu.nearest_signs_gradients(
        ones(4, 8), ones(4, 8), bad(ones(4, 8)), False, Signs(ones(4, 2, 8), None, 1, 0)
    ),
}
"""Calls of what is compiled with one tensor that is not what it should be."""


@needs_kernels
@pytest.mark.parametrize("bad", ["meta", torch.float64, "fewer"], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_address_is_taken_of_another_tensor_than_is_expected(entry, bad):
    if (entry, bad) == ("hadamard", "fewer"):
        pytest.skip("any shape will do")
    with pytest.raises(RuntimeError, match="a kernel of the CPU was given"):
        ENTRIES[entry](lambda tensor: tensor[..., :-1] if bad == "fewer" else tensor.to(bad))


@needs_kernels
def test_no_number_leads_past_the_end_of_a_tensor():
    with pytest.raises(RuntimeError, match=r"columns are of the groups \[0, 1\], of which there are 1"):
        cpu.round_block(ones(2, 8), ones(2, 8), torch.eye(2), ones(1, 2, 8), torch.tensor([0, 1]), 0)
    for block in (-2, 0, 3):
        with pytest.raises(RuntimeError, match=f"Hadamard matrix is {block}, expected a power of two"):
            cpu.block_hadamard(ones(1, 8), block)
