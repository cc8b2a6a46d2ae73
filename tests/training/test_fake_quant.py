"""Fake-quantized Linears: their values are the packed ones bit for bit, their gradients those of the formulas, and
training them helps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ultralowbit.errors import FormatError, InputError
from ultralowbit.format import testing
from ultralowbit.format.ints import Ints
from ultralowbit.format.outliers import IndexedOutliers, MaskedOutliers
from ultralowbit.format.planes import Planes
from ultralowbit.format.salient import SalientSplit
from ultralowbit.format.transform import InputTransform
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.methods.base import MIN_SCALE
from ultralowbit.methods.billm import BiLLM
from ultralowbit.methods.db_llm import DBLLM
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.pb_llm import PBLLM
from ultralowbit.methods.sign import Sign
from ultralowbit.methods.statistics import InputStats
from ultralowbit.training.estimators import STE, BiPer, Clip, ReSTE
from ultralowbit.training.fake_quant.linear import FakeQuantLinear, level_distances, parameter_groups, set_progress
from ultralowbit.training.loop import fit
from ultralowbit.training.objectives import MSE
from ultralowbit.training.specs import KINDS, TrainSpec


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups_of(segment) -> int:
    return 1 if segment.group is None else -(-segment.columns // segment.group)


def random_packed(format: Format, rows: int, seed: int = 0) -> PackedWeight:
    """Random codes under scales as methods leave them: falling from plane to plane, dual ones as DB-LLM starts them."""
    packed = testing.random_packed(format, rows, seed)
    generator = torch.Generator().manual_seed(seed)

    def size(*shape: int) -> Tensor:
        return 0.02 * (torch.rand(shape, generator=generator) + 0.5)

    for prefix, _, part in format.parts:
        if f"{prefix}_scale" in packed.tensors:
            scale = size(*packed.tensors[f"{prefix}_scale"].shape)
            if isinstance(part, Planes):
                scale *= 0.4 ** torch.arange(part.planes)[:, None, None]
                if part.alphabet == "01" and part.planes == 2:  # every third group is mirrored
                    sign = torch.where(torch.rand(scale.shape[1:], generator=generator) < 0.3, -1.0, 1.0)
                    scale = torch.stack([sign * scale[0], -sign * scale[1]])
            elif isinstance(part, Ints):
                scale *= torch.where(torch.rand(scale.shape, generator=generator) < 0.3, -1.0, 1.0)
            packed.tensors[f"{prefix}_scale"] = (50 * scale if isinstance(part, InputTransform) else scale).half()
        if f"{prefix}_offset" in packed.tensors:
            offset = torch.randn(packed.tensors[f"{prefix}_offset"].shape, generator=generator)
            packed.tensors[f"{prefix}_offset"] = (0.01 * offset).half()
    return packed


def disturb(linear: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """As after many steps: each parameter a good deal elsewhere, some scales through zero."""
    with torch.no_grad():
        for i, p in enumerate(linear.parameters()):
            p += size * (p.abs().mean() + 1e-3) * normal(*p.shape, seed=seed + i)


def bits_of(linear: FakeQuantLinear) -> list[Tensor]:
    """[out, groups, group] of each plane of the only segment."""
    planes = linear.parts[0]
    with torch.no_grad():
        return planes.codes({**dict(planes.named_parameters()), **dict(planes.named_buffers())}, 0)[0]


def agrees(linear: FakeQuantLinear) -> None:
    with torch.no_grad():
        dense = linear.dense()
    packed = linear.pack()
    assert packed.format == linear.packed.format
    assert torch.equal(dense, packed.dequantize())
    again = FakeQuantLinear(packed, set(linear.by_kind()) - {"latent"} or {"scale"})
    assert torch.equal(again.dense(), dense)


@st.composite
def formats(draw) -> Format:
    segments = []
    for _ in range(draw(st.integers(1, 2))):
        columns = draw(st.integers(1, 70) | st.sampled_from([1, 512, 513]))
        group = draw(st.none() | st.integers(1, columns + 8))
        if draw(st.integers(0, 3)):
            alphabet = draw(st.sampled_from(["pm1", "01"]))
            segments.append(Planes(columns, draw(st.integers(1, 3)), group, alphabet, draw(st.booleans())))
        else:
            segments.append(Ints(columns, draw(st.sampled_from([2, 3, 4, 8])), group, draw(st.booleans())))
    columns = sum(s.columns for s in segments)
    outliers = draw(
        st.sampled_from([None, None, IndexedOutliers(columns, 1, min(columns, 16)), MaskedOutliers(columns, 1, 0.1)])
    )
    transform = None
    if draw(st.booleans()):
        channel_order, scale, hadamard = draw(st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, 2, 16])))
        transform = (
            InputTransform(columns, channel_order, scale, hadamard) if channel_order or scale or hadamard else None
        )
    return Format(tuple(segments), outliers, transform)


# --- values ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    formats(),
    st.integers(1, 4),
    st.sets(st.sampled_from(KINDS), min_size=1),
    st.sampled_from([STE(), Clip(), ReSTE(), BiPer()]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**20),
)
def test_a_fake_quantized_linear_is_what_it_packs_to(format, rows, train, estimator, dtype, seed):
    """At the start the packed weight itself, and after any training the one that it packs to, bit for bit."""
    packed = random_packed(format, rows, seed)
    latent = packed.dequantize() + 0.003 * normal(*packed.shape, seed=seed)
    try:
        linear = FakeQuantLinear(
            packed, train, latent=latent if "latent" in train else None, estimator=estimator, dtype=dtype
        )
    except InputError as e:
        assert format.summary in str(e)
        return
    if "latent" not in train:
        assert torch.equal(linear.dense(), packed.dequantize())
        again = linear.pack()
        assert torch.equal(again.dequantize(), packed.dequantize())
        assert all(torch.equal(again.tensors[k], t) for k, t in packed.tensors.items() if t.is_floating_point())
    agrees(linear)
    for step in range(2):
        disturb(linear, seed + step)
        agrees(linear)


WEIGHTS = {
    "random": 0.02 * normal(9, 70),
    "one row": 0.02 * normal(1, 70, seed=1),
    "one column": 0.02 * normal(9, 1, seed=2),
    "one weight": torch.tensor([[0.3]]),
    "constant rows": torch.arange(5.0)[:, None].expand(5, 33) * 0.01,
    "zeros": torch.zeros(3, 40),
    "all positive": 0.02 * normal(6, 50, seed=3).abs() + 0.001,
    "large": 900 * normal(4, 40, seed=4),
}


def test_latent_weights_in_bf16():
    """Parameters and gradients are in bf16, all else as with fp32; next to no code is another one at the start."""
    weight, x = 0.02 * normal(64, 512), normal(8, 512, seed=1)
    for method in (Sign(planes=2), GPTQ(bits=2, group=32), DBLLM()):
        packed = method.quantize(weight, None)
        exact = FakeQuantLinear(packed, {"latent", "scale"}, latent=weight)
        linear = FakeQuantLinear(packed, {"latent", "scale"}, latent=weight, dtype=torch.bfloat16)
        (latent,), (scale,) = linear.by_kind()["latent"], linear.by_kind()["scale"]
        assert latent.dtype == torch.bfloat16 and scale.dtype == torch.float32
        assert (linear.dense() == packed.dequantize()).float().mean() > 0.999
        for module in (exact, linear):
            module(x).square().sum().backward()
        assert latent.grad.dtype == torch.bfloat16
        error = latent.grad.float() - exact.by_kind()["latent"][0].grad
        assert error.norm() < 0.05 * exact.by_kind()["latent"][0].grad.norm()


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(
    "method",
    [
        Sign(planes=1),
        Sign(planes=2, group=32),
        Sign(planes=3),
        Sign(planes=4, group=32),
        PBLLM(),
        PBLLM(selection="threshold", group=32, ratio=0.2),
        GPTQ(bits=2, group=32),
        GPTQ(bits=3, group=None, symmetric=True),
    ],
)
def test_training_a_latent_weight_starts_from_the_packed_one(method, weight):
    """Whatever the original weight is: its own code differs from that of a method that compensates."""
    packed = method.quantize(weight, None)
    for latent in (weight, weight.flip(0) * 0.7 + 1e-4 * normal(*weight.shape)):
        linear = FakeQuantLinear(packed, {"latent", "scale"}, latent=latent)
        assert torch.equal(linear.dense(), packed.dequantize())
        agrees(linear)
        disturb(linear)
        agrees(linear)
        with torch.no_grad():
            weight = linear.dense()
        assert weight.isfinite().all()


@pytest.mark.parametrize("method", [Sign(planes=1), Sign(planes=2), GPTQ(bits=2, group=32)])
def test_a_weight_with_another_code_starts_just_inside_the_packed_one(method):
    """Between its own value and the packed one, close to where the codes change; the others are as they were."""
    weight = 0.02 * normal(8, 96)
    packed = method.quantize(weight, None)
    value, other = packed.dequantize(), weight + 0.01 * normal(8, 96, seed=1)
    latent = FakeQuantLinear(packed, {"latent"}, latent=other).parts[0].latent.detach()
    moved = latent != other
    assert 0.05 < moved.float().mean() < 0.6
    assert ((latent - value).abs() <= (other - value).abs() + 1e-7).all()
    share = ((latent - value) / (other - value))[moved]
    assert ((share >= 0) & (share < 1)).all() and share.mean() > 0.3


@pytest.mark.parametrize("estimator", [STE(), Clip()], ids=["ste", "clip"])
@pytest.mark.parametrize("planes", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
def test_training_starts_from_whatever_scales_there_are(group, planes, estimator):
    """A refined weight can have its larger scale in a later plane, or a negative one, and levels of three planes that
    are not in the order of their first signs."""
    generator = torch.Generator().manual_seed(0)
    segment, groups = Planes(50, planes, group), 1 if group is None else 4
    scale = (0.05 * torch.randn(planes, 6, groups, generator=generator)).half().float()
    bits = torch.randint(2, (planes, 6, 50), generator=generator).bool()
    packed = PackedWeight.encode(Format((segment,)), {"bits": bits, "scale": scale})
    linear = FakeQuantLinear(packed, {"latent", "scale"}, latent=0.02 * normal(6, 50), estimator=estimator)
    torch.testing.assert_close(linear.dense(), packed.dequantize(), rtol=0, atol=2**-22)  # sums in another order
    scales = linear.parts[0].scale.detach()
    assert (scales.diff(dim=1) <= 0).all() and (scales >= 0).all()
    disturb(linear)
    agrees(linear)


def test_training_starts_from_four_planes_that_were_refined():
    weight, stats = 0.02 * normal(48, 64), InputStats(64)
    stats.add(normal(256, 64, seed=1))
    packed = Sign(planes=4, refine=2, act_order=True).quantize(weight, stats)
    scale = packed.tensors["weight_scale"].float()[:, 0].abs().sort(0, descending=True).values  # [planes, out]
    assert (scale[0] < scale[1:].sum(0)).float().mean() > 0.5
    linear = FakeQuantLinear(packed, {"latent", "scale"}, latent=weight)
    torch.testing.assert_close(linear.dense(), packed.dequantize(), rtol=0, atol=2**-22)


@pytest.mark.parametrize("method", [Sign(planes=1), Sign(planes=3), GPTQ(bits=3, group=None), DBLLM()], ids=str)
def test_the_distance_of_levels(method):
    """From the lowest to the highest level of a group, by the steps between; latent weights a tenth as large have a
    tenth of it."""
    weight = 0.02 * normal(40, 64)
    distances = []
    for factor in (1, 0.1):
        linear = FakeQuantLinear(method.quantize(factor * weight, None), {"latent"}, latent=factor * weight)
        ((latent, distance),) = level_distances(linear).items()
        assert latent is linear.parts[0].latent
        distances.append(distance)
    values = method.quantize(weight, None).dequantize().double()
    span = (values.amax(1) - values.amin(1)).mean().item()
    steps = {"sign": 2 ** getattr(method, "planes", 0) - 1, "gptq": 7, "db_llm": 3}[method.method]
    if method.method != "db_llm":  # whose groups are shorter than rows
        assert distances[0] == pytest.approx(span / steps, rel=0.01)
    assert distances[1] == pytest.approx(distances[0] / 10, rel=0.01)


def dual(weight: Tensor, group: int | None = None, mirror: bool = False) -> PackedWeight:
    """DB-LLM's start: a_1 = 2 s, a_2 = -s with s = max |w| / 2 of the group, and the nearest of the four levels."""
    out, columns = weight.shape
    segment = Planes(columns, 2, group, "01")
    part = F.pad(weight, (0, groups_of(segment) * (group or columns) - columns)).view(out, groups_of(segment), -1)
    s = (part.abs().amax(-1) / 2).half().float() * (-1 if mirror else 1)
    a = torch.stack([2 * s, -s])
    levels = torch.stack([a[1], torch.zeros_like(s), a[0] + a[1], a[0]])  # codes (0, 1), (0, 0), (1, 1), (1, 0)
    code = (part[None] - levels[..., None]).abs().argmin(0).flatten(1)[:, :columns]
    bits = torch.stack([code >= 2, (code == 0) | (code == 2)])
    return PackedWeight.encode(Format((segment,)), {"bits": bits, "scale": a})


@pytest.mark.parametrize("mirror", [False, True], ids=["plain", "mirrored"])
@pytest.mark.parametrize("group", [None, 16, 64])
@pytest.mark.parametrize("train", [{"scale"}, {"latent"}, {"scale", "latent"}])
def test_dual_planes_follow_the_latent_weight(group, mirror, train):
    weight = 0.02 * normal(6, 100)
    packed = dual(weight, group, mirror)
    linear = FakeQuantLinear(packed, train, latent=weight)
    assert torch.equal(linear.dense(), packed.dequantize())
    assert torch.equal(linear.pack().tensors["weight"], packed.tensors["weight"])
    disturb(linear, size=0.1)
    agrees(linear)
    # the bits are those of the paper's rule at the new scales
    planes = linear.parts[0]
    a1, a2 = (a.repeat_interleave(group or 100, 1)[:, :100] for a in planes.scale.detach().unbind(1))
    w, sign = planes.latent.detach(), -1 if mirror else 1
    b1 = (sign * (w - (a1 + a2) / 2) >= 0).float()
    b2 = (sign * -(w - a1 * b1 - a2 / 2) >= 0).float()
    bits = torch.stack([bits.flatten(1)[:, :100] for bits in bits_of(linear)])
    assert torch.equal(bits, torch.stack([b1, b2]))
    assert linear.pack().sparsity == pytest.approx((1 - bits.mean((1, 2))).tolist())


def test_sparsity_is_of_bool_planes_only():
    assert random_packed(Format((Planes(40, 2),)), 3).sparsity == []
    bits = torch.rand(3, 5, 33, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = PackedWeight.encode(Format((Planes(33, 3, 16, "01"),)), {"bits": bits, "scale": torch.ones(3, 5, 3)})
    assert packed.sparsity == pytest.approx((~bits).float().mean((1, 2)).tolist())


def test_row_factors_scale_what_is_stored():
    """PTQ1.61: r (a sign(w - c) + c), stored as r a and r c."""
    packed = random_packed(Format((Planes(30, 1, None, offset=True), Ints(10, 4))), 4)
    linear = FakeQuantLinear(packed, {"row"})
    assert torch.equal(linear.dense(), packed.dequantize())
    with torch.no_grad():
        linear.row.copy_(torch.tensor([2.0, 0.5, -1.0, 4.0]))
    expected = packed.dequantize()
    expected[:, :30] *= linear.row.detach()[:, None]
    assert torch.equal(linear.dense(), expected)
    agrees(linear)


def ptq161(rows: int = 5, salient: int = 8, columns: int = 40, hadamard: int | None = None) -> PackedWeight:
    """PTQ1.61: salient columns first, as integers with the factor 1, and a plane with an offset for the others."""
    segments = (Ints(salient, 4), Planes(columns - salient, 1, None, offset=True))
    packed = random_packed(Format(segments, None, InputTransform(columns, True, True, hadamard)), rows)
    packed.tensors["weight_input_scale"][:salient] = 1
    return packed


def test_column_factors_are_those_of_the_planes():
    packed = ptq161()
    linear = FakeQuantLinear(packed, {"column", "row", "scale"})
    assert {kind: len(ps) for kind, ps in linear.by_kind().items()} == {"column": 1, "row": 1, "scale": 1}
    G = normal(5, 40)
    (G * linear.dense()).sum().backward()
    order = packed.format.transform.order({"_channel_order": packed.tensors["weight_input_channel_order"]})
    stored = packed.format.untransformed.decode(packed.tensors)
    grad = linear.input.column.grad
    assert (grad[:8] == 0).all()
    torch.testing.assert_close(grad[8:], (G[:, order] * stored).sum(0)[8:], rtol=1e-4, atol=1e-6)
    disturb(linear)  # also what is not trained, as a decay of weights would
    agrees(linear)
    assert (linear.pack().tensors["weight_input_scale"][:8] == 1).all()
    assert torch.equal(linear.dense()[:, order[:8]], packed.dequantize()[:, order[:8]])


@pytest.mark.parametrize("hadamard", [None, 16])
@pytest.mark.parametrize("train", [{"latent", "scale"}, {"latent", "column", "row"}])
def test_the_latent_weight_is_in_the_stored_columns(hadamard, train):
    """A weight near the packed one in x's basis has its bits in the stored one."""
    packed = ptq161(hadamard=hadamard)
    near = packed.dequantize() + 1e-5 * normal(5, 40)
    linear = FakeQuantLinear(packed, train, latent=near)
    assert torch.equal(linear.dense(), packed.dequantize())
    far = (linear.parts[1].latent - packed.format.untransformed.decode(packed.tensors)[:, 8:]).abs().max()
    assert 0 < far < 1e-4
    disturb(linear)
    agrees(linear)


def test_gradients_of_a_rotated_weight():
    """Against the same product with rotated inputs, which autograd goes through by itself."""
    packed, x, target = ptq161(hadamard=16), normal(30, 40), normal(30, 5)
    linear = FakeQuantLinear(packed, {"scale", "column"})
    F.mse_loss(linear(x), target).backward()
    scale = packed.tensors["weight_1_scale"].float()[0, 0, :, None].requires_grad_()
    offset, bits = packed.tensors["weight_1_offset"].float().T, linear.parts[1].bits[:, 0, 0].float()
    column = packed.tensors["weight_input_scale"].float().requires_grad_()
    stored = torch.cat([packed.format.untransformed.decode(packed.tensors)[:, :8], bits * scale + offset], dim=1)
    moved = packed.format.transform.apply(
        {"_channel_order": packed.tensors["weight_input_channel_order"], "_scale": torch.ones(40)}, x
    )
    F.mse_loss((moved * column) @ stored.T, target).backward()
    torch.testing.assert_close(linear.parts[1].scale.grad[..., 0], scale.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(linear.input.column.grad[8:], column.grad[8:], rtol=1e-4, atol=1e-6)


def test_analytic_scales_are_those_of_the_latent_weight():
    """PB-LLM: mean |w - c| over the binarised weights of the group, whatever the packed scale was."""
    weight = 0.02 * normal(8, 100)
    packed = PBLLM(group=32, ratio=0.1).quantize(weight, None)
    linear = FakeQuantLinear(packed, {"latent"}, latent=weight, scales="analytic")
    assert linear.by_kind().keys() == {"latent"}
    disturb(linear)
    agrees(linear)
    c, latent = packed.tensors["weight_offset"].float(), linear.parts[0].latent.detach()
    for g in range(4):
        columns = slice(32 * g, min(100, 32 * g + 32))
        low = linear.keep[:, columns].bool()
        size = (latent[:, columns] - c[g][:, None]).abs()
        expected = torch.stack([s[k].double().mean() for s, k in zip(size, low, strict=True)])
        torch.testing.assert_close(linear.pack().tensors["weight_scale"][0, g].double(), expected, rtol=1e-3, atol=0)
    with pytest.raises(InputError, match="analytic scales"):
        FakeQuantLinear(packed, {"scale"}, latent=weight, scales="analytic")


def test_replaced_weights_stay():
    weight = 0.02 * normal(8, 300)
    packed = PBLLM(ratio=0.2).quantize(weight, None)
    linear = FakeQuantLinear(packed, {"scale", "offset", "row", "latent"}, latent=weight)
    linear.dense().square().sum().backward()
    replaced, grad = linear.keep == 0, linear.parts[0].latent.grad
    assert (grad[replaced] == 0).all() and (grad[~replaced] != 0).all()
    disturb(linear)
    assert torch.equal(linear.dense()[replaced], packed.dequantize()[replaced])
    after = linear.pack().tensors
    assert all(torch.equal(after[n], t) for n, t in packed.tensors.items() if n.startswith("weight_outliers"))


def test_scales_of_integers_keep_their_sign_and_stay_off_zero():
    """A negative one turns a symmetric grid over; weights are divided by all of them."""
    packed = random_packed(Format((Ints(20, 4, 8),)), 3)
    linear = FakeQuantLinear(packed, {"scale"})
    stored = torch.tensor([[-1.0, 0.0, -1e-9], [1e-9, 0.5, -0.0]])
    with torch.no_grad():
        linear.parts[0].scale[:2] = stored
    expected = torch.tensor([[-1.0, MIN_SCALE, -MIN_SCALE], [MIN_SCALE, 0.5, -MIN_SCALE]])
    assert torch.equal(linear.pack().tensors["weight_scale"][:, :2].T.float(), expected)
    agrees(linear)
    linear.dense().sum().backward()  # the gradient still reaches it
    assert linear.parts[0].scale.grad.isfinite().all()


def test_a_scale_beyond_fp16_is_an_error_and_not_a_packed_infinity():
    linear = FakeQuantLinear(random_packed(Format((Planes(20, 1),)), 3), {"scale"})
    with torch.no_grad():
        linear.parts[0].scale[0, 0] = 1e5
    with pytest.raises(FormatError, match="65504"):
        linear.pack()


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("scales", ["free", "analytic"])
def test_a_few_rows_at_a_time_change_nothing(rows, scales, monkeypatch):
    """Values and gradients, of the latent weight, scales and the rows' factors."""
    weight = 0.02 * normal(10, 300)
    runs = []
    for tile in (1 << 20, rows * 300):
        monkeypatch.setattr("ultralowbit.training.fake_quant.tiles._TILE", tile)
        linear = FakeQuantLinear(
            PBLLM(group=128).quantize(weight, None), {"scale", "latent", "row"}, latent=weight, scales=scales
        )
        disturb(linear)
        agrees(linear)
        linear.dense().square().sum().backward()
        runs.append([linear.dense().detach(), *(p.grad for p in linear.parameters())])
    assert len(runs[0]) == (4 if scales == "free" else 3)
    for whole, tiled in zip(*runs, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-7)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_the_gradients_of_scales_and_offsets_are_the_exact_ones():
    """d sum(G W) / da of the packed weight in fp64, groups that do not divide, two planes."""
    segment = Planes(50, 2, 16, offset=True)
    packed, G = random_packed(Format((segment,)), 4), normal(4, 50)
    linear = FakeQuantLinear(packed, {"scale", "offset"})
    (G * linear.dense()).sum().backward()
    bits = linear.parts[0].bits.flatten(2)[..., :50].double()  # [4, planes, 50]
    for g in range(4):
        columns = slice(16 * g, 16 * g + 16)
        part = G[:, columns].double()
        close = {"rtol": 1e-5, "atol": 1e-6}
        grad = linear.parts[0].scale.grad[..., g].double()
        torch.testing.assert_close(grad, (bits[..., columns] * part[:, None]).sum(-1), **close)
        torch.testing.assert_close(linear.parts[0].offset.grad[:, g].double(), part.sum(-1), **close)


def test_the_latent_gradient_is_nearly_the_identity_with_any_number_of_planes():
    """Scales are close to the units, so dw^/dw is close to f' of the first plane, plus what it leaves to the next."""
    weight = 0.02 * normal(6, 200)
    for planes in (1, 2, 3):
        packed = Sign(planes=planes, iterations=0).quantize(weight, None)
        linear = FakeQuantLinear(packed, {"latent"}, latent=weight)
        linear.dense().sum().backward()
        torch.testing.assert_close(linear.parts[0].latent.grad, torch.ones(6, 200), rtol=0, atol=2e-3)


def test_serial_planes_pass_the_gradient_that_the_clip_stops_to_the_next_plane():
    weight = torch.tensor([[0.5, -1.0, 1.2, -3.0, 2.0, -0.1]]) * 0.02
    packed = Sign(planes=2, iterations=0).quantize(weight, None)
    linear = FakeQuantLinear(packed, {"latent"}, latent=weight, estimator=Clip())
    linear.dense().sum().backward()
    (u1, u2), x = linear.parts[0].units[..., 0].unbind(1), weight
    a1, a2 = packed.tensors["weight_scale"].float()[:, 0]
    d1 = (x.abs() <= u1).float() / u1
    rest = x - a1[:, None] * torch.where(x >= 0, 1.0, -1.0)
    d2 = (rest.abs() <= u2).float() / u2
    expected = a1 * d1 + a2 * d2 * (1 - a1 * d1)
    torch.testing.assert_close(linear.parts[0].latent.grad, expected)


def test_the_gradients_of_dual_scales_are_the_papers_with_one_unit_of_slope():
    """H straight-through in units of the range of the levels, dH(x)/dx = 1 / 2 |a_1 - a_2|, in sum and thresholds."""
    weight = 0.02 * normal(3, 64)
    packed, G = dual(weight), normal(3, 64)
    linear = FakeQuantLinear(packed, {"scale", "latent"}, latent=weight)
    (G * linear.dense()).sum().backward()
    a1, a2 = (a.double() for a in packed.tensors["weight_scale"].float()[:, 0, :, None])
    b1, b2 = (b.flatten(1).double() for b in bits_of(linear))
    h = 0.5 / (a1 - a2)
    # x2 = a1 b1 + a2 / 2 - w
    for parameter, db1, dx2, direct in (
        ("a1", -h / 2, b1 + a1 * (-h / 2), b1),
        ("a2", -h / 2, a1 * (-h / 2) + 0.5, b2),
        ("w", h, a1 * h - 1, 0.0),
    ):
        expected = G.double() * (direct + a1 * db1 + a2 * h * dx2)
        part = linear.parts[0]
        grad = part.latent.grad if parameter == "w" else part.scale.grad[:, int(parameter == "a2")]
        expected = expected if parameter == "w" else expected.sum(1, keepdim=True)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_integers_are_lsq():
    """dw^/dw = 1 inside the range and 0 outside; dw^/ds = q - w/s inside and q outside."""
    packed = random_packed(Format((Ints(40, 3, 16),)), 5)
    weight = packed.dequantize() * 1.3 + 0.004 * normal(5, 40)
    linear = FakeQuantLinear(packed, {"scale", "latent"}, latent=weight)
    G = normal(5, 40)
    (G * linear.dense()).sum().backward()
    scale = packed.tensors["weight_scale"].float().T.repeat_interleave(16, 1)[:, :40]
    zero = linear.parts[0].zero.repeat_interleave(16, 1)[:, :40]
    v = linear.parts[0].latent.detach() / scale
    inside = (v.round() >= -zero) & (v.round() <= 7 - zero)
    q = v.round().maximum(-zero).minimum(7 - zero)
    torch.testing.assert_close(linear.parts[0].latent.grad, torch.where(inside, G, 0))
    expected = G * torch.where(inside, q - v, q)
    expected = torch.stack([expected[:, s : s + 16].sum(1) for s in (0, 16, 32)], dim=1)
    torch.testing.assert_close(linear.parts[0].scale.grad, expected, rtol=1e-4, atol=1e-4)


# --- what is trained ------------------------------------------------------------------------------------------------


def test_what_there_is_to_train():
    def kinds(format: Format, train: set[str], latent: bool = False) -> set[str]:
        packed = random_packed(format, 3)
        return set(FakeQuantLinear(packed, train, latent=packed.dequantize() if latent else None).by_kind())

    everything = set(KINDS) - {"latent"}
    scaled = InputTransform(20, column_scale=True)
    assert kinds(Format((Planes(20, 2),), None, scaled), everything) == {"scale", "row", "column"}
    assert kinds(Format((Ints(20, 2),), None, scaled), everything) == {"scale", "column"}
    assert kinds(Format((Planes(20, 2),), None, InputTransform(20, hadamard=4)), everything) == {"scale", "row"}
    assert kinds(Format((Planes(20, 2),)), everything) == {"scale", "row"}
    assert kinds(Format((Planes(20, 1, 8, offset=True),)), everything) == {"scale", "offset", "row"}
    assert kinds(Format((Ints(20, 2, 8),)), everything) == {"scale"}
    assert kinds(Format((Ints(20, 2, 8),)), {"latent"}, latent=True) == {"latent"}
    assert kinds(Format((Planes(20, 2), Planes(4, 3))), {"latent"}, latent=True) == {"latent"}
    # PTQ1.61: salient columns keep their integers as they are
    mixed = FakeQuantLinear(random_packed(Format((Ints(8, 4), Planes(20, 1, offset=True))), 3), {"scale"})
    assert [p.shape for p in mixed.parameters()] == [(3, 1, 1)]


def test_nothing_to_train_is_an_error_that_names_the_format():
    split = BiLLM().quantize(normal(4, 200), None)
    assert isinstance(split.format.segments[0], SalientSplit)
    with pytest.raises(InputError, match=r"200xsalient.* none of what is to be trained: offset, scale"):
        FakeQuantLinear(split, {"scale", "offset"})
    with pytest.raises(InputError, match=r"20xint2/row .*: row"):
        FakeQuantLinear(random_packed(Format((Ints(20, 2),)), 2), {"row"})
    with pytest.raises(InputError, match="cannot train gain, scales"):
        FakeQuantLinear(split, {"scales", "gain"})
    planes = random_packed(Format((Planes(20, 1),)), 2)
    with pytest.raises(ValueError, match="original weight"):
        FakeQuantLinear(planes, {"latent"})
    with pytest.raises(ValueError, match=r"\(20, 2\), expected \(2, 20\)"):
        FakeQuantLinear(planes, {"latent"}, latent=torch.zeros(20, 2))


def scaled(weight: Tensor) -> PackedWeight:
    """A sign plane, a scale a row and a factor 1 for every column."""
    segment, columns = Planes(weight.shape[1], 1), weight.shape[1]
    parts = {"bits": (weight >= 0)[None], "scale": weight.abs().mean(1).half().float()[None, :, None]}
    transform = InputTransform(columns, column_scale=True)
    return PackedWeight.encode(Format((segment,), None, transform), parts, {"scale": torch.ones(columns)})


def block() -> tuple[nn.Module, nn.Module, Tensor]:
    """A block of two Linears with biases, the same with its weights fake-quantized, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)).requires_grad_(False)
    return teacher, nn.Sequential(*teacher), normal(256, 48)


def tuned(method, train: set[str], lr: float, steps: int = 100, **options) -> tuple[float, float]:
    """MSE of the block's output before and after a few steps of AdamW, the latter from the packed weights."""
    teacher, student, x = block()
    for i in (0, 2):
        packed = method.quantize(teacher[i].weight, None) if hasattr(method, "quantize") else method(teacher[i].weight)
        student[i] = FakeQuantLinear(
            packed, train, latent=teacher[i].weight, bias=lambda i=i: teacher[i].bias, **options
        )
    target = teacher(x)
    groups = parameter_groups(student)
    assert set(groups) == train and all(len(parameters) == 2 for parameters in groups.values())
    optimizer = torch.optim.AdamW([p for ps in groups.values() for p in ps], lr, weight_decay=0)
    before = F.mse_loss(student(x), target).item()
    for step in range(steps):
        set_progress(student, step / steps)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        F.mse_loss(student(x), target).backward()
        optimizer.step()
    for i in (0, 2):
        student[i] = FakeQuantLinear(student[i].pack(), {"scale"}, bias=lambda i=i: teacher[i].bias)
    return before, F.mse_loss(student(x), target).item()


@pytest.mark.parametrize(
    ("method", "train", "lr", "gain"),
    [
        (Sign(planes=1), {"scale"}, 1e-3, 0.96),
        (Sign(planes=1), {"row"}, 1e-2, 0.96),
        (scaled, {"column"}, 1e-2, 0.96),
        (scaled, {"scale", "row", "column"}, 3e-3, 0.92),
        (PBLLM(), {"scale", "offset", "row"}, 1e-3, 0.96),
        (GPTQ(bits=2, group=32), {"scale"}, 1e-3, 0.8),
        (GPTQ(bits=2, group=32), {"scale", "latent"}, 1e-3, 0.5),
        (dual, {"scale"}, 1e-3, 0.65),
        (dual, {"scale", "latent"}, 1e-3, 0.4),
        *((Sign(planes=planes), {"scale", "latent"}, 1e-3, 0.75) for planes in (1, 2, 3)),
    ],
)
def test_training_lowers_the_error_of_the_packed_block(method, train, lr, gain):
    before, after = tuned(method, train, lr)
    assert after < gain * before


def test_the_loop_fits_what_is_packed(tmp_path):
    """A fake-quantized block through `fit`: the objective it reports is that of the packed block, to the last digit."""
    teacher, student, x = block()
    for i in (0, 2):
        packed = Sign(planes=2).quantize(teacher[i].weight, None)
        student[i] = FakeQuantLinear(
            packed, {"scale", "latent"}, latent=teacher[i].weight, bias=lambda i=i: teacher[i].bias
        )
    target = teacher(x)

    def loss(rows: list[int]) -> Tensor:
        return MSE()(student(x[rows]), target[rows])

    spec = TrainSpec(lr={"scale": 3e-4, "latent": 3e-4}, epochs=10, batch=32, clip_norm=None)
    fitted = fit(
        parameter_groups(student), loss, spec, 192, lambda: loss(list(range(192, 256))).item(),
        state=tmp_path / "state", on_progress=lambda share: set_progress(student, share),
    )  # fmt: skip
    assert fitted.accepted and fitted.after < 0.8 * fitted.before
    weights = [student[i].pack().dequantize() for i in (0, 2)]
    hidden = F.gelu(F.linear(x[192:], weights[0], teacher[0].bias))
    assert F.mse_loss(F.linear(hidden, weights[1], teacher[2].bias), target[192:]).item() == fitted.after


@pytest.mark.parametrize("estimator", [STE(), Clip(), ReSTE(), BiPer()])
def test_every_estimator_trains(estimator):
    before, after = tuned(Sign(planes=1), {"scale", "latent"}, 1e-3, estimator=estimator)
    assert after < 0.6 * before


def test_analytic_scales_train():
    before, after = tuned(PBLLM(), {"latent"}, 1e-3, scales="analytic")
    assert after < 0.7 * before


def test_forward_follows_the_inputs_dtype_and_leads():
    weight, bias = 0.1 * normal(6, 40), normal(6)
    linear = FakeQuantLinear(Sign(planes=2).quantize(weight, None), {"scale"}, bias=lambda: bias)
    x = normal(2, 3, 40)
    for dtype in (torch.float32, torch.bfloat16):
        y = linear(x.to(dtype))
        assert torch.equal(y, F.linear(x.to(dtype), linear.dense().to(dtype), bias.to(dtype)))
    assert torch.equal(linear.dense().bfloat16(), linear.pack().dequantize(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
