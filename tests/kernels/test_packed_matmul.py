"""The operation itself: shapes of x, which path is chosen, what the compiler sees."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func
from torch.autograd import forward_ad

from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels import packed_matmul as op
from ultralowbit.kernels.packed_matmul import kernel_for, packed_matmul, packed_matmul_ref

FORMAT = Format((Ints(40, 4, None, True), Planes(23, 1)))


def weight(out: int = 5) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (out, 40), generator=generator, dtype=torch.uint8)
    bits = torch.randint(2, (1, out, 23), generator=generator).bool()
    scale = torch.rand(1, out, 1, generator=generator).half().float()
    return PackedWeight.encode(FORMAT, {"codes": codes, "scale": scale[0]}, {"bits": bits, "scale": scale})


def multiply(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    return packed_matmul(x, list(packed.tensors.values()), json.dumps(packed.format.to_dict()))


@pytest.mark.parametrize("shape", [(63,), (1, 63), (0, 63), (2, 0, 63), (2, 3, 63)], ids=str)
def test_any_leading_shape(shape, device):
    packed = weight()
    packed = PackedWeight(packed.format, packed.shape, {k: v.to(device) for k, v in packed.tensors.items()})
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    y = multiply(x, packed)
    assert y.shape == (*shape[:-1], 5) and y.is_contiguous()
    torch.testing.assert_close(y, x @ packed.dequantize().T)


def test_strided_x():
    packed = weight()
    x = torch.randn(63, 4, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(multiply(x.permute(2, 1, 0), packed), x.permute(2, 1, 0) @ packed.dequantize().T)
    one = torch.randn(1, 63, generator=torch.Generator().manual_seed(1)).expand(3, 63)
    torch.testing.assert_close(multiply(one, packed), one @ packed.dequantize().T)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("columns", "device", "stored", "said"),
    [
        (63, "cpu", {"device": "meta"}, "x is on cpu, weight_scale of the packed weight on meta"),
        (63, "meta", {}, "x is on meta, weight of the packed weight on cpu"),
        (126, "cpu", {}, r"x is \[2, 126\], expected \[..., 63\]"),
        (63, "cpu", {"dtype": torch.float32}, "weight_scale of the packed weight is float32"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(columns, device, stored, said, gradient):
    """By kernels, which are given addresses, it would be read past its end."""
    packed = weight()
    packed.tensors["weight_scale"] = packed.tensors["weight_scale"].to(**stored)
    with pytest.raises(RuntimeError, match=said):
        multiply(torch.zeros(2, columns, dtype=torch.float32, device=device).requires_grad_(gradient), packed)
    with pytest.raises(RuntimeError, match=r"x is torch.int16, expected floating point"):
        multiply(torch.zeros(2, 63, dtype=torch.int16), weight())


@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_autocast_is_that_of_a_linear(path, dtype, tokens, monkeypatch):
    """Whichever path is taken, and whatever it computes in."""
    if path == "reference":
        monkeypatch.setattr(op, "KERNELS", {})
    packed = weight()
    x = torch.randn(tokens, 63, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, packed.dequantize(dtype))
        y = multiply(x, packed)
    assert y.dtype == expected.dtype
    assert torch.equal(y, multiply(x.to(y.dtype), packed))
    gradient, wanted = (torch.autograd.grad(z.sum(), x)[0] for z in (y, expected))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted, rtol=2**-6, atol=2**-6)


def energy(multiply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: multiply(x).square().sum()


DERIVATIVES = {
    "forward mode": lambda f, x, v: dual(f, x, v),
    "jvp": lambda f, x, v: func.jvp(f, (x,), (v,))[1],
    "grad": lambda f, x, v: func.grad(energy(f))(x),
    "vmap": lambda f, x, v: func.vmap(f, in_dims=1)(x.T),
    "gradients of a batch": lambda f, x, v: func.vmap(func.grad(energy(f)))(x),
    "jacrev": lambda f, x, v: func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: func.jacfwd(f)(x),
    "hessian": lambda f, x, v: func.hessian(energy(f))(x[0]),
    "forward over reverse": lambda f, x, v: func.jvp(func.grad(energy(f)), (x,), (v,))[1],
}


def dual(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize("transform", [None, InputTransform(63, hadamard=16)], ids=str)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_are_those_of_the_linear_map(derivative, transform, device):
    plain = weight()
    packed = PackedWeight(replace(FORMAT, transform=transform), plain.shape, plain.tensors)
    packed = PackedWeight(packed.format, packed.shape, {k: v.to(device) for k, v in packed.tensors.items()})
    x, v = torch.randn(2, 3, 63, generator=torch.Generator().manual_seed(1)).to(device).unbind(0)
    matrix = packed.dequantize().T
    ours, expected = (DERIVATIVES[derivative](f, x, v) for f in (lambda x: multiply(x, packed), lambda x: x @ matrix))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_weights_of_a_batch_are_multiplied_one_by_one():
    packed, x = weight(), torch.randn(3, 63, generator=torch.Generator().manual_seed(1))
    flipped = {
        name: tensor.flip(-2 if name in ("weight", "weight_1") else -1) for name, tensor in packed.tensors.items()
    }
    tensors = [torch.stack([packed.tensors[name], flipped[name]]) for name in packed.tensors]
    layout = json.dumps(FORMAT.to_dict())
    both = func.vmap(lambda *tensors: packed_matmul(x, tensors, layout))(*tensors)
    assert torch.equal(both, torch.stack([multiply(x, packed), multiply(x, packed).flip(-1)]))


def test_the_compiler_sees_shape_dtype_and_no_alias():
    packed = weight()
    args = (torch.randn(2, 3, 63), list(packed.tensors.values()), json.dumps(packed.format.to_dict()))
    torch.library.opcheck(torch.ops.ultralowbit.packed_matmul.default, args)


def test_the_chooser_is_told_what_there_is(monkeypatch):
    seen = []
    monkeypatch.setattr(op, "KERNELS", {"cpu": lambda *case: seen.append(case)})
    packed = weight()
    multiply(torch.zeros(2, 3, 63, dtype=torch.bfloat16), packed)
    assert seen == [(FORMAT, torch.device("cpu"), torch.bfloat16, 6)]
    assert kernel_for(FORMAT, "meta") is packed_matmul_ref


PLANES = Format((Planes(512, 2, 128),))
ON_CUDA = [
    (PLANES, torch.bfloat16, 1, "gemv"),
    (PLANES, torch.float32, 8, "gemv"),
    (PLANES, torch.float16, 9, "gemm"),
    (PLANES, torch.float16, 64, "gemm"),
    (PLANES, torch.float16, 65, "unpacked"),
    (PLANES, torch.float16, 513, "dequantized"),
    (PLANES, torch.float32, 65, "dequantized"),
    (PLANES, torch.float64, 1, "packed_matmul_ref"),
    (FORMAT, torch.bfloat16, 1, "gemv"),
    (
        Format((Planes(512, 1),), None, InputTransform(512, channel_order=True, hadamard=32768)),
        torch.bfloat16,
        1,
        "gemv",
    ),
    (Format((Planes(512, 1),), None, InputTransform(512, hadamard=65536)), torch.bfloat16, 1, "packed_matmul_ref"),
    (Format((Planes(512, 1),), IndexedOutliers(512, 8)), torch.bfloat16, 8, "gemv"),
    (Format((Planes(512, 1),), IndexedOutliers(512, 8)), torch.bfloat16, 9, "dequantized"),
    (Format((Ints(512, 4),), IndexedOutliers(512, 8)), torch.bfloat16, 1, "dequantized"),
    (Format((Planes(512, 1),), MaskedOutliers(512, 8, 0.01)), torch.bfloat16, 1, "dequantized"),
    (Format((Planes(512, 1, 96),)), torch.bfloat16, 1, "unpacked"),
    (Format((Planes(512, 1, 96),)), torch.float32, 1, "dequantized"),
    (Format((SalientSplit(512, 8),)), torch.bfloat16, 1, "dequantized"),
]


@pytest.mark.parametrize(("format", "dtype", "tokens", "name"), ON_CUDA, ids=lambda v: getattr(v, "summary", str(v)))
def test_the_path_on_cuda(monkeypatch, format, dtype, tokens, name):
    triton_matmul = pytest.importorskip("ultralowbit.kernels.gpu.dispatch")
    monkeypatch.setattr(triton_matmul, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(triton_matmul, "tuning_of", lambda device: triton_matmul.read_tuning("", 132))
    assert kernel_for(format, "cuda", dtype, tokens).__name__ == name


def test_old_gpus_have_the_reference(monkeypatch):
    triton_matmul = pytest.importorskip("ultralowbit.kernels.gpu.dispatch")
    monkeypatch.setattr(triton_matmul, "has_tensor_cores", lambda device: False)
    assert kernel_for(PLANES, "cuda") is packed_matmul_ref


def test_without_triton_there_is_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralowbit.kernels.gpu.dispatch", None)
    op.triton_products.cache_clear()
    try:
        assert kernel_for(PLANES, "cuda") is packed_matmul_ref
    finally:
        op.triton_products.cache_clear()


def test_a_triton_that_cannot_run_is_said_and_left(monkeypatch):
    pytest.importorskip("ultralowbit.kernels.gpu.dispatch")
    from triton.runtime import driver

    class Broken:
        @property
        def utils(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(driver), "active", property(lambda self: Broken()))
    op.triton_products.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"cannot run here \(RuntimeError: Failed to find C compiler\.\), so"):
            assert kernel_for(PLANES, "cuda") is packed_matmul_ref
    finally:
        op.triton_products.cache_clear()


def test_tuning_is_by_name_with_the_rest_from_the_default():
    triton_matmul = pytest.importorskip("ultralowbit.kernels.gpu.dispatch")
    tuning = triton_matmul.read_tuning("no such GPU", 7)
    assert tuning.processors == 7 and tuning.gemv_tokens <= max(tuning.tiles)
    narrow = triton_matmul.NARROWEST_DOT
    assert [tuning.tile(n)[0] for n in (1, 8, 9, 16, 17, 99)] == [narrow, narrow, 16, 16, 32, 32]
    assert [tuning.unpacked_tile(n, 8192)[0] for n in (1, 64, 65, 999)] == [64, 64, 128, 128]
    assert [*triton_matmul.read_tuning("no such GPU", 7, major=8).unpacked_tiles] == [64]
    # half the rows, where whole tiles are too few for all multiprocessors
    assert [tuning.unpacked_tile(128, out)[1].rows for out in (6 * 128, 7 * 128)] == [64, 128]
