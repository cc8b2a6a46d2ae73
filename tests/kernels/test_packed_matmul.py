"""The operation itself: shapes of x, which path is chosen, what the compiler sees."""

from __future__ import annotations

import json

import pytest
import torch

from ultralowbit.format import Format, Ints, PackedWeight, Planes
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
