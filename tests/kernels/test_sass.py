"""What the shipped kernels become, read from the machine code that they are compiled to for two GPUs; none is needed.

Speed cannot be seen here, but what has cost it before can: spilled registers, loads that lost their width, shuffles in
the loop, dots without tensor cores, instructions by the packed bit.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.kernels.gpu.columns import compensation, search
from ultralowbit.kernels.gpu.dequantize import dequantize
from ultralowbit.kernels.gpu.dispatch import lies_on_planes, product, read_tuning, unpacking
from ultralowbit.kernels.gpu.fields import multiply
from ultralowbit.kernels.gpu.launch import NARROWEST_DOT, Launch
from ultralowbit.kernels.gpu.matrix import matrices

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.slow

if NARROWEST_DOT > 8:
    pytest.skip("the budget is that of tiles of 8 tokens", allow_module_level=True)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED = {80: 99 * 1024, 90: 227 * 1024}
"""Compute capability -> bytes of shared memory that a program may use: on sm_80 those of sm_89, which has the same
instructions for what is done here, and less of it."""
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int16: "*i16", torch.uint8: "*u8",
    torch.int32: "*i32",
}  # fmt: skip

BUDGET = {
    (Planes(4096, 1), 1): 0.90,
    (Planes(4096, 1, 128), 1): 1.10,
    (Planes(11008, 1, None, offset=True), 1): 0.90,  # with a tail, whose loads have a mask
    (TiedPlanes(4096, 2, 128), 1): 0.61,
    (Ints(4096, 2, 128), 1): 0.70,
    (Ints(4096, 4), 1): 0.30,
    (Planes(4096, 1), 16): 1.15,
    (Planes(4096, 1, 128), 16): 1.55,
}
"""Segment, tokens -> instructions of the loop for each packed bit, at most. At 4.3 TB/s an H200 has 0.86 to 0.97."""


ROWS = 1 << 15
"""Of the weights: so many that tiles are as large as tuning.json has them."""


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel: registers, bytes of stack and of shared memory, its instructions as (operation,
    text), and those of the loop that does the most with tensor cores."""

    registers: int
    stack: int
    shared: int
    instructions: list[tuple[str, str]]
    loop: list[tuple[str, str]]

    def count(self, pattern: str) -> int:
        """Of the loop's operations those that match from their beginning."""
        return sum(bool(re.match(pattern, name)) for name, _ in self.loop)


def compiled(launch: Launch, capability: int, folder: Path) -> Code:
    """The launch as the just-in-time compiler would specialise it: on divisibility by 16, and on ints that are 1."""
    names, parameters = launch.kernel.arg_names, {p.name: p for p in launch.kernel.params}
    signature, constants, hints = dict.fromkeys(names, "constexpr"), dict(launch.constants), {}
    for name, arg in zip([n for n in names if n not in constants], launch.args, strict=True):
        if isinstance(arg, Tensor):
            signature[name] = TYPES[arg.dtype]
            even = arg.storage_offset() * arg.itemsize % 16 == 0
        elif arg == 1 and not parameters[name].do_not_specialize:
            constants[name] = 1
            continue
        else:
            free = parameters[name].do_not_specialize or parameters[name].do_not_specialize_on_alignment
            signature[name], even = "i32", arg % 16 == 0 and not free
        if even:
            hints[names.index(name),] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = folder / f"{compiled.hash}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", cubin)))
    instructions, loop = _read(_tool("nvdisasm", "-c", cubin))
    return Code(int(usage["REG"]), int(usage["STACK"]), compiled.metadata.shared, instructions, loop)


def _tool(name: str, *args: str | Path) -> str:
    done = subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read(text: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    instructions, labels, loops = [], {}, [(0, 0)]
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((\S+).*?);", line):
            target = re.search(r"\((\.L_\w+)\)", match[1])
            if match[2].startswith("BRA") and target and labels.get(target[1], len(instructions)) < len(instructions):
                loops.append((labels[target[1]], len(instructions) + 1))
            instructions.append((match[2], match[1]))
    products = lambda loop: sum(name[:5] in ("HMMA.", "HGMMA") for name, _ in instructions[slice(*loop)])  # noqa: E731
    return instructions, instructions[slice(*max(loops, key=products))]


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """code(launch, capability): compiled once in a run."""
    folder = tmp_path_factory.mktemp("cubin")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        yield lambda launch, capability: compiled(launch, capability, folder)


@cache
def stored(format: Format, out: int) -> dict[str, Tensor]:
    specs = format.tensors(out, format.in_features).items()
    return {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs}


@pytest.mark.parametrize("capability", SHARED, ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize(("segment", "tokens"), BUDGET, ids=lambda v: getattr(v, "summary", f"M{v}"))
def test_fields(code, segment, tokens, capability):
    format = Format((segment,))
    x = torch.empty(tokens, segment.columns, dtype=torch.bfloat16, device="meta")
    launches, _ = product(x, stored(format, ROWS), format, read_tuning("", 132))
    launch = next(launch for launch in launches if launch.kernel is multiply)
    compiled = code(launch, capability)
    assert compiled.stack <= 8 and compiled.count("LDL|STL") <= 2  # two registers of a thread at most
    assert compiled.shared <= SHARED[capability]
    assert compiled.count("HMMA.16816.F32") and not compiled.count("SHFL")
    assert compiled.count(r"LDGSTS\S*\.128") >= 2, "the loads are narrow"  # of words, and of inputs
    per_dot = 8 * launch.constants["width"] * 8 / launch.constants["BM"]  # packed bits of a thread in one HMMA
    bits = compiled.count("HMMA") * per_dot
    each = len(compiled.loop) / bits
    print(f"sm_{capability} {segment.summary} M{tokens}: {each:.3f} a bit, {compiled.registers} registers")
    names = Counter(name.partition(".")[0] for name, _ in compiled.loop).most_common(8)
    assert each <= BUDGET[segment, tokens], f"{each:.3f} instructions a packed bit: {names}"


@pytest.mark.parametrize("capability", SHARED, ids=lambda c: f"sm_{c}")
def test_fields_without_subnormals(code, capability):
    """The way around tensor cores that round subnormals: one fp16 subtraction more for two weights, and no spills."""
    format = Format((Planes(4096, 1),))
    x = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    launches, _ = product(x, stored(format, ROWS), format, read_tuning("", 132), subnormal=False)
    compiled = code(next(launch for launch in launches if launch.kernel is multiply), capability)
    assert (
        compiled.stack == 0 and compiled.count("HMMA") and compiled.count("HADD2|HFMA2") == 4 * compiled.count("HMMA")
    )
    assert len(compiled.loop) <= 1.45 * 8 * compiled.count("HMMA")


@pytest.mark.parametrize("capability", SHARED, ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("block", [64, 512, 4096])
def test_programs_that_transform_their_inputs(code, block, capability):
    """On tensor cores, before the loop, with next to no spills."""
    format = Format((Planes(8192, 1),), None, InputTransform(8192, hadamard=block))
    x = torch.empty(1, 8192, dtype=torch.bfloat16, device="meta")
    (launch,), _ = product(x, stored(format, ROWS), format, read_tuning("", 132))
    compiled = code(launch, capability)
    assert compiled.stack <= 24 and compiled.shared <= SHARED[capability]
    products = sum(name.startswith("HMMA") for name, _ in compiled.instructions)
    assert products > compiled.count("HMMA") > 0


@pytest.mark.parametrize("capability", SHARED, ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("segment", [Planes(4096, 1), TiedPlanes(4096, 2, 128)], ids=lambda s: s.summary)
def test_tiles_of_32_tokens(code, segment, capability):
    format = Format((segment,))
    x = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
    launches, _ = product(x, stored(format, ROWS), format, read_tuning("", 132))
    compiled = code(next(launch for launch in launches if launch.kernel is multiply), capability)
    assert compiled.stack == 0 and compiled.shared <= SHARED[capability] // 2  # two programs fit
    assert any(re.match("HMMA|HGMMA", name) for name, _ in compiled.instructions)


UNPACKED = {
    Planes(4096, 1): 7.0,
    Planes(4096, 2, 128): 10.5,
    Planes(11008, 2, 64, offset=True): 14.5,  # with a tail
    TiedPlanes(4096, 2, 128): 10.5,
    Ints(4096, 2, 128): 10.5,
    Ints(4096, 3, 128): 14.0,
    Ints(4096, 4, 64): 13.0,
    Ints(4096, 8, None, True): 10.5,
}
"""Segment -> instructions of a thread for each weight that it unpacks on sm_90, at most. A tile of 128 tokens takes an
H200's tensor cores as long as 8 of them take to be issued."""


@pytest.mark.parametrize(
    ("segment", "capability"),
    [(segment, 90) for segment in UNPACKED] + [(Planes(4096, 2, 128), 80), (Ints(4096, 4, 64), 80)],
    ids=lambda v: getattr(v, "summary", f"sm_{v}"),
)
def test_programs_that_unpack_weights(code, segment, capability):
    """In registers, on tensor cores; on sm_90 with wgmma whose left side are registers, without a barrier between."""
    format = Format((segment,))
    x = torch.empty(256, segment.columns, dtype=torch.bfloat16, device="meta")
    (launch,), _ = unpacking(x, stored(format, ROWS), format, read_tuning("", 132, capability // 10))
    compiled = code(launch, capability)
    assert compiled.count("LDL|STL") <= 8 and compiled.shared <= SHARED[capability]
    assert compiled.count(r"LDGSTS\S*\.128") >= 2, "the loads are narrow"
    each = len(compiled.loop) * launch.warps * 32 / (launch.constants["fields"] * 32 * launch.constants["BN"])
    print(f"sm_{capability} {segment.summary}: {each:.2f} a weight, {compiled.registers} registers")
    if capability == 90:
        assert compiled.count("HGMMA") and not compiled.count("LDL|STL") and each <= UNPACKED[segment]
    else:
        assert compiled.count("HMMA")


TRANSFORM = InputTransform(11008, channel_order=True, column_scale=True, hadamard=4096)
OTHERS = [
    Format((Planes(11008, 2, 128, offset=True),), IndexedOutliers(11008, 26), TRANSFORM),
    Format((Ints(4096, 3, 128),), MaskedOutliers(4096, 600, 0.1)),
    Format((SalientSplit(4096, 200, third=True, column_scale=True, offset=True),)),
]


def launches_of(format: Format) -> list[Launch]:
    """All but the products of fields."""
    x, tensors = torch.empty(1, format.in_features, dtype=torch.bfloat16, device="meta"), stored(format, 4096)
    weight = torch.empty(4096, format.in_features, dtype=torch.bfloat16, device="meta")
    launches = list(dequantize(tensors, format, 0, weight))
    if matrices(format) is not None and (format.outliers is None or lies_on_planes(format)):
        launches += product(x, tensors, format, read_tuning("", 132))[0]
    return list({launch.kernel: launch for launch in launches if launch.kernel is not multiply}.values())


@pytest.mark.parametrize("capability", SHARED, ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("format", OTHERS, ids=lambda f: f.kinds)
def test_other_kernels_keep_to_registers(code, format, capability):
    codes = {launch.kernel.__name__: code(launch, capability) for launch in launches_of(format)}
    print(f"sm_{capability}", {name: f"{each.registers} registers" for name, each in codes.items()})
    assert len(codes) >= format.kinds.count("+") + 1
    for name, each in codes.items():
        assert each.stack == 0, name
        assert each.shared <= SHARED[capability], name
        if name in ("planes", "ints", "salient_split"):
            assert any(re.match(r"STG\S*\.128", operation) for operation, _ in each.instructions), (
                f"{name} stores narrow"
            )


@pytest.mark.parametrize("capability", SHARED)
def test_a_block_of_columns_is_rounded_in_registers(capability, tmp_path):
    """What the loops over columns change is never spilled; 20 warps fit a multiprocessor."""
    empty = {"dtype": torch.float32, "device": "meta"}
    R, block = torch.empty(256, 256, **empty), torch.empty(256, 4096, **empty)
    tables, which = torch.empty(1, 4, 4096, **empty), torch.empty(256, dtype=torch.int32, device="meta")
    for launch in (compensation(block, R, tables, which, block, block), search(R, tables, which, block, block, 8)):
        code = compiled(launch, capability, tmp_path)
        assert code.stack == 0 and code.registers <= 65536 // (20 * 32) and code.shared <= SHARED[capability] // 5
        assert launch.grid == (512,)
