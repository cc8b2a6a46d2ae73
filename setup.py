"""What pyproject.toml cannot say yet: the compiled CPU kernels."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCES = [
    f"kernels/cpu/{name}.cpp" for name in ("amx", "avx2", "avx512", "native", "neon", "neon_dotprod", "portable")
]
HEADERS = [f"kernels/cpu/{name}.h" for name in ("columns", "kernel", "native", "rows", "signs")]

root = Path(__file__).parent
digest = hashlib.sha256(b"".join((root / file).read_bytes() for file in sorted(SOURCES + HEADERS))).hexdigest()

# A plain library, loaded through ctypes: no header of Python or torch is needed. Optional: without a compiler the
# reference runs. Uncontracted, since a decoded weight has the bits that torch computes.
native = Extension(
    "ultralowbit.kernels.cpu.native",
    SOURCES,
    depends=HEADERS,
    define_macros=[("SOURCES", f'"{digest}"')],
    extra_compile_args=["-O3", "-std=c++17", "-pthread", "-ffp-contract=off"],
    language="c++",
    optional=True,
    py_limited_api=True,
)

setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp310"}})
