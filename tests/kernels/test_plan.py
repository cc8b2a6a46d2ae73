"""What a plan hands to Triton, without a GPU: kernels are compiled for one, and a driver that launches nothing notes
what it is given."""

from __future__ import annotations

import json
import os

import pytest
import torch

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.testing import random_packed
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format
from ultralowbit.kernels import packed_matmul as op
from ultralowbit.kernels.packed_matmul import packed_matmul

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") or torch.cuda.is_available():
    pytest.skip("kernels that a driver without a GPU has loaded stay in Triton's caches", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from ultralowbit.kernels.gpu import dispatch, plan  # noqa: E402

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


class NoGpu:
    """Triton's driver of an H100 that is not there; `launched` holds (grid, stream, arguments)."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], int, tuple]] = []
        self.stream = 7
        self.utils = self

    def launcher_cls(self, source, metadata):
        return lambda *call: self.launched.append((call[:3], call[3], call[9:]))

    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 64, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return self.stream


NO_GPU = NoGpu()  # one for all tests: what was compiled keeps the launcher of its first


@pytest.fixture
def no_gpu(monkeypatch):
    tuning = dispatch.read_tuning("", 132)
    monkeypatch.setattr(dispatch, "tuning_of", lambda device: tuning)
    monkeypatch.setattr(dispatch, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(dispatch, "subnormals_are_exact", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(op, "KERNELS", {"cpu": dispatch.choose})
    monkeypatch.setattr(plan, "_OF_STREAM", {})
    monkeypatch.setattr(plan, "_OF_GRAPHS", {})
    monkeypatch.setattr(driver, "_active", NO_GPU)
    NO_GPU.launched.clear()
    dispatch.plan_of.cache_clear()
    yield NO_GPU
    dispatch.plan_of.cache_clear()


FORMATS = [
    Format((Planes(1024, 1),)),
    Format((TiedPlanes(600, 2, 128),)),
    Format((Planes(512, 1),), IndexedOutliers(512, 8)),
    Format((Ints(640, 3, 128),), None, InputTransform(640, hadamard=128)),
    Format((Planes(1024, 1),), None, InputTransform(1024, hadamard=512, column_scale=True)),
]


@pytest.mark.parametrize("tokens", [1, 20, 100])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.summary)
def test_a_call_hands_over_what_the_launches_say(no_gpu, format, tokens):
    """Addresses of x, y and all that is stored, numbers, grids; and room that nobody else has."""
    if tokens > 8 and format.outliers is not None:
        pytest.skip("no plan")
    packed = random_packed(format, 64)
    x = torch.zeros(tokens, format.in_features, dtype=torch.bfloat16)
    made, call = (dispatch.unpacking, dispatch.unpacked) if tokens == 100 else (dispatch.product, dispatch.gemv)
    launches, y0 = made(x, packed.tensors, format, dispatch.tuning_of(CPU))
    for _ in range(2):
        no_gpu.launched.clear()
        y = call(x, packed.tensors, format)
        assert y.shape == (tokens, 64) and y.dtype == x.dtype and len(no_gpu.launched) == len(launches)
        known = {t.data_ptr(): t.data_ptr() for t in (x, *packed.tensors.values())} | {y0.data_ptr(): y.data_ptr()}
        rooms = {}
        for launch, (grid, stream, args) in zip(launches, no_gpu.launched, strict=True):
            assert grid == (*launch.grid, 1, 1)[:3] and stream == 7
            assert args[len(launch.args) :] == tuple(
                launch.constants[name] for name in launch.kernel.arg_names[len(launch.args) :]
            )
            for name, meant, given in zip(launch.kernel.arg_names, launch.args, args, strict=False):
                if not isinstance(meant, torch.Tensor):
                    assert given == meant, name
                    continue
                start, inside = meant.untyped_storage().data_ptr(), meant.storage_offset() * meant.itemsize
                if name == "arrived":  # the same for all launches, one after the other
                    assert given == plan.counters_of(CPU, 7, 1).data_ptr()
                elif start in known:
                    assert given == known[start] + inside, name
                else:
                    assert given % 16 == 0 and rooms.setdefault(start, given) == given, name
        assert len(set(rooms.values())) == len(rooms)


def test_nothing_is_worked_out_twice(no_gpu, monkeypatch):
    format = FORMATS[0]
    packed = random_packed(format, 64)
    x = torch.zeros(1, 1, 1024, dtype=torch.bfloat16)
    args = list(packed.tensors.values()), json.dumps(format.to_dict())
    assert packed_matmul(x, *args).shape == (1, 1, 64)
    monkeypatch.setattr(dispatch, "product", None)
    monkeypatch.setattr(torch.ops.ultralowbit, "packed_matmul", None)
    assert packed_matmul(x.clone(), *args).shape == (1, 1, 64)
    assert len(no_gpu.launched) == 2


def test_unaligned_tensors_are_copied(no_gpu):
    format = FORMATS[0]
    packed = random_packed(format, 65)
    tensors = {name: tensor[..., 1:, :] for name, tensor in packed.tensors.items() if name == "weight"}
    tensors |= {name: tensor[..., 1:] for name, tensor in packed.tensors.items() if name != "weight"}
    x = torch.zeros(1025, dtype=torch.bfloat16)[1:].view(1, 1024)
    assert x.data_ptr() % 16 and dispatch.gemv(x, tensors, format).shape == (1, 64)
    (_, _, args) = no_gpu.launched[0]
    assert args[0] % 16 == 0 and args[0] != x.data_ptr()


def test_counters_are_of_a_stream_or_of_a_captured_launch(no_gpu, monkeypatch):
    first, again, other = (plan.counters_of(CPU, stream, 5) for stream in (1, 1, 2))
    assert first.data_ptr() == again.data_ptr() != other.data_ptr() and not first.any()
    assert len(plan.counters_of(CPU, 1, 5000)) >= 5000
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [plan.counters_of(CPU, 1, 100) for _ in range(3)]
    places = {tensor.data_ptr() for tensor in captured}
    assert len(places) == 3 and not places & {first.data_ptr(), other.data_ptr()}
    assert {b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)} == {400}
    assert len(plan.counters_of(CPU, 1, plan._RESERVE)) == plan._RESERVE  # where the reserve is used up
