"""Sign planes whose scales halve from one to the next: what their bytes mean."""

from __future__ import annotations

import json

import pytest
import torch

from ultralowbit.errors import FormatError
from ultralowbit.format.planes import Planes, TiedPlanes
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.kernels.packed_matmul import packed_matmul


def random_tied(columns: int, planes: int, group: int | None, out: int = 5) -> tuple[torch.Tensor, ...]:
    """(codes [out, columns], scale [out, groups])"""
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(2**planes, (out, columns), generator=generator, dtype=torch.uint8)
    return codes, torch.randn(out, -(-columns // (group or columns)), generator=generator).half().float()


@pytest.mark.parametrize("group", [None, 32, 48], ids=str)
@pytest.mark.parametrize("planes", [2, 4])
@pytest.mark.parametrize("columns", [1, 33, 172, 700])
def test_they_are_planes_whose_scales_halve(columns, planes, group, device):
    codes, scale = random_tied(columns, planes, group)
    tied = PackedWeight.encode(
        Format((TiedPlanes(columns, planes, group),)), {"codes": codes.to(device), "scale": scale.to(device)}
    )
    bits = torch.stack([codes >> planes - 1 - p & 1 for p in range(planes)]).bool()
    scales = torch.stack([scale * 2 ** (planes - 1 - p) for p in range(planes)])
    free = PackedWeight.encode(Format((Planes(columns, planes, group),)), {"bits": bits, "scale": scales})
    assert torch.equal(tied.dequantize().cpu(), free.dequantize())
    assert tied.nbytes < free.nbytes


def test_golden_bytes():
    codes = torch.tensor([[0, 1, 2, 3, 2, 1, 0, 3, 3, 0], [3, 3, 3, 0, 0, 0, 1, 2, 1, 2]], dtype=torch.uint8)
    tied = PackedWeight.encode(
        Format((TiedPlanes(10, 2, 8),)), {"codes": codes, "scale": torch.tensor([[0.5, 1], [-2, 0.25]])}
    )
    # two lanes: columns 0, 2, 4, 6, 8 in word 0 and 1, 3, 5, 7, 9 in word 1, two bits each from the lowest up
    assert tied.tensors["weight"].tolist() == [
        [0b11_00_10_10_00, 0b00_11_01_11_01],
        [0b01_01_00_11_11, 0b10_10_00_00_11],
    ]
    assert tied.tensors["weight_scale"].tolist() == [[0.5, -2], [1, 0.25]]
    assert Format.from_dict(tied.format.to_dict()) == tied.format


def test_three_planes_have_no_field_of_their_width():
    with pytest.raises(FormatError, match=r"tied\.planes is 3"):
        TiedPlanes(8, 3)


@pytest.mark.parametrize("tokens", [1, 5, 80])
@pytest.mark.parametrize("planes", [2, 4])
def test_products(planes, tokens, device):
    codes, scale = random_tied(700, planes, 128)
    tied = PackedWeight.encode(Format((TiedPlanes(700, planes, 128),)), {"codes": codes, "scale": scale})
    x = torch.randn(tokens, 700, generator=torch.Generator().manual_seed(0))
    tensors = [tensor.to(device) for tensor in tied.tensors.values()]
    y = packed_matmul(x.to(device), tensors, json.dumps(tied.format.to_dict())).cpu()
    torch.testing.assert_close(y, x @ tied.dequantize().T, rtol=1e-4, atol=1e-3)
