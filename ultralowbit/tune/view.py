"""A packed weight that can be trained: parameters in fp32 whose values are always those of the bytes they pack to.

    segment            parameters                                        the weight
    Planes -1, +1      scale a, offset c, row r, latent w                r (sum_p a_p b_p + c)
    Planes 0, 1        the same                                          r (sum_p a_p b_p + c)
    Ints               scale s, latent w, where no plane is beside       (code - zero) s

Scales and offsets are rounded to fp16 in the forward pass, with the gradient passed straight through: what is trained
is what is packed. Without a latent weight the codes are fixed, and unpacked once; with it they are its codes at every
step:

    -1, +1   b_1 = sign(w - c), and each further plane the sign of what the planes before it leave (BinaryDM, RaBiT);
             the gradient runs through the estimator and through that remainder, in which scales are constants
    0, 1     two planes b_1 = H(w - (a_1 + a_2) / 2), b_2 = H(-(w - a_1 b_1 - a_2 / 2)), H(x) = [x >= 0]: the flexible
             dual binarization of DB-LLM; gradients reach the scales through the sum and through the thresholds
    Ints     round(w / s) + zero, clamped; the gradients of w and s are those of LSQ (Esser et al. 2020)

Overlaid 8-bit weights, zones, and integer columns beside planes (PTQ1.61's salient ones) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultralowbit.format import Ints, PackedWeight, Planes, Segment, to_scale, unpack_fields
from ultralowbit.methods.base import MIN_SCALE
from ultralowbit.text import InputError
from ultralowbit.tune.estimators import STE, Estimator, binarize

KINDS = ("scale", "offset", "row", "latent")
"""What of a packed weight can be trained."""

Scales = Literal["free", "analytic"]


class TrainableLinear(nn.Module):
    """y = x @ dense().T + bias for x [..., in]: stands where a Linear, Conv1D or PackedLinear stood in a model.

    packed: where training starts, and the device it runs on.
    train: some of `KINDS`; what the format has none of is passed over.
    latent [out, in]: the original weight. Two 0/1 planes follow it also where "latent" is not trained; -1/+1 planes and
        Ints use it only where it is. A weight whose own code is not the packed one (the method has made up for the
        errors of other columns) starts at its packed value instead: training starts from `packed`.
    bias [out]: added as it is, not trained.
    scales: "free" trains them; "analytic" takes mean |w - c| of a group's binarised latent weights at every step,
        without a gradient (PB-LLM). That is for -1/+1 planes with a trained latent weight.

    Raises `InputError` where the format has nothing of what is to be trained.
    """

    def __init__(
        self,
        packed: PackedWeight,
        train: Collection[str],
        *,
        latent: Tensor | None = None,
        bias: Tensor | None = None,
        estimator: Estimator | None = None,
        scales: Scales = "free",
    ) -> None:
        super().__init__()
        if unknown := set(train) - set(KINDS):
            raise InputError(f"cannot train {', '.join(sorted(unknown))}, expected some of {', '.join(KINDS)}")
        if "latent" in train and latent is None:
            raise ValueError("to train the latent weight, the original weight is needed")
        if latent is not None and latent.shape != packed.shape:
            raise ValueError(f"the latent weight is {tuple(latent.shape)}, expected {packed.shape}")
        format = packed.format
        self.packed, self.progress = packed, 0.0
        self.out_features, self.in_features = packed.shape
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._overlay()
        planes = any(isinstance(segment, Planes) for segment in format.segments)
        self.views = nn.ModuleList()
        for (prefix, first, segment), _ in zip(format._parts(), format.segments, strict=False):
            parts = {suffix: packed.tensors[prefix + suffix] for suffix in segment.tensors(self.out_features)}
            columns = slice(first, first + segment.columns)
            own = None if latent is None else latent[:, columns].detach().float()
            keep = None if self.mask is None else ~self.mask[:, columns]
            if isinstance(segment, Planes):
                view = _planes_view(segment, parts, train, own, keep, estimator or STE(), scales)
            elif isinstance(segment, Ints) and not planes:
                view = _IntsView(segment, parts, train, own if "latent" in train else None)
            else:
                view = _FrozenView(_decoded(segment, parts))
            self.views.append(view)
        row = torch.ones(self.out_features, device=packed.tensors["weight"].device) if planes else None
        _learn(self, "row", row if "row" in train else None, True)
        if not self.by_kind():
            raise InputError(f"{format.summary} has none of what is to be trained: {', '.join(sorted(train))}")

    def _overlay(self) -> None:
        """`mask` of the overlaid weights and their `values`, both [out, in], or None."""
        overlay, tensors = self.packed.format.overlay, self.packed.tensors
        self.register_buffer("mask", None)
        self.register_buffer("values", None)
        if overlay is not None:
            values = torch.full(self.packed.shape, torch.nan, device=tensors["weight"].device)
            overlay.decode({suffix: tensors[f"weight_overlay{suffix}"] for suffix in overlay.tensors(1)}, values)
            self.mask, self.values = ~values.isnan(), values.nan_to_num_()

    def dense(self) -> Tensor:
        """The weight [out, in] fp32, equal to `pack().dequantize()` bit for bit."""
        parts = [view(self.row, self.progress) for view in self.views]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return weight if self.mask is None else torch.where(self.mask, self.values, weight)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense().to(x.dtype), bias)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        """The packed weight of the current parameters; raises `FormatError` where one left the range of fp16."""
        tensors = dict(self.packed.tensors)
        for (prefix, _, _), view in zip(self.packed.format._parts(), self.views, strict=False):
            tensors |= {prefix + suffix: part for suffix, part in view.encode(self.row, self.progress).items()}
        return PackedWeight(self.packed.format, self.packed.shape, tensors)

    @torch.no_grad()
    def sparsity(self) -> float | None:
        """The share of zeros among the bits of 0/1 planes; None where there are no such planes."""
        bits = [
            _ungrouped(plane, view.segment.columns)
            for view in self.views
            if isinstance(view, _PlanesView) and view.segment.alphabet == "01"
            for plane in view.codes(self.progress)[0]
        ]
        return sum((b == 0).sum().item() for b in bits) / sum(b.numel() for b in bits) if bits else None

    def by_kind(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each kind that there is."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            found.setdefault(name.rpartition(".")[2], []).append(parameter)
        return found

    def extra_repr(self) -> str:
        return f"{self.packed.format.summary}, trains {', '.join(self.by_kind())}"


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of all `TrainableLinear`s in a model by their kind, in the order of the modules."""
    found: dict[str, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, TrainableLinear):
            for kind, parameters in module.by_kind().items():
                found.setdefault(kind, []).extend(parameters)
    return found


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell the estimators of all `TrainableLinear`s in a model which share of the training, 0 to 1, is done."""
    for module in model.modules():
        if isinstance(module, TrainableLinear):
            module.progress = progress


class _Stored(torch.autograd.Function):
    """Rounding to fp16, and up to `low`, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: float | None) -> Tensor:
        stored = values.half().float()
        return stored if low is None else stored.clamp_min_(low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Round(torch.autograd.Function):
    """Rounding to whole numbers with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _decoded(segment: Segment, parts: Mapping[str, Tensor]) -> Tensor:
    weight = torch.empty(parts[""].shape[-2], segment.columns, device=parts[""].device)
    segment.decode(parts, weight)
    return weight


def _grouped(x: Tensor, group: int | None) -> Tensor:
    """x [rows, columns] -> [rows, groups, group], the last group filled up with zeros."""
    group = group or x.shape[1]
    rest = -x.shape[1] % group
    return (F.pad(x, (0, rest)) if rest else x).unflatten(1, (-1, group))


def _ungrouped(x: Tensor, columns: int) -> Tensor:
    return x.flatten(1)[:, :columns]


def _learn(module: nn.Module, name: str, value: Tensor | None, train: bool) -> None:
    """A parameter where it is trained, else a buffer."""
    if value is None or not train:
        module.register_buffer(name, value)
    else:
        module.register_parameter(name, nn.Parameter(value.clone(memory_format=torch.contiguous_format)))


class _FrozenView(nn.Module):
    """Columns [out, columns] that are not trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, row: Tensor | None, progress: float) -> Tensor:
        return self.weight

    def encode(self, row: Tensor | None, progress: float) -> dict[str, Tensor]:
        return {}


class _PlanesView(nn.Module):
    """Sign planes with fixed bits; `scale` [planes, out, groups] and `offset` [out, groups] lack the row's factor."""

    def __init__(self, segment: Planes, parts: Mapping[str, Tensor], train: Collection[str]) -> None:
        super().__init__()
        self.segment = segment
        _learn(self, "scale", parts["_scale"].float().transpose(1, 2), "scale" in train)
        _learn(self, "offset", parts["_offset"].float().T if segment.offset else None, "offset" in train)
        bits = torch.stack([_grouped(self._unpack(words), segment.group) for words in parts[""]])
        self.register_buffer("bits", bits)  # [planes, out, groups, group], as their values

    def _unpack(self, words: Tensor) -> Tensor:
        bits = unpack_fields(words, 1, self.segment.columns).float()
        return bits if self.segment.alphabet == "01" else bits.mul_(2).sub_(1)

    def codes(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of each plane the bits [out, groups, group] as their values, and the scale [out, groups]."""
        return self.bits, self.scale

    def _stored(self, values: Tensor, row: Tensor | None) -> Tensor:
        """Scales or offsets [out, groups] as they will be stored."""
        return _Stored.apply(values if row is None else values * row[:, None], None)

    def forward(self, row: Tensor | None, progress: float) -> Tensor:
        weight = None
        for bits, scale in zip(*self.codes(progress), strict=True):
            plane = bits * self._stored(scale, row)[..., None]
            weight = plane if weight is None else weight.add_(plane)
        if self.offset is not None:
            weight = weight.add_(self._stored(self.offset, row)[..., None])
        return _ungrouped(weight, self.segment.columns)

    def encode(self, row: Tensor | None, progress: float) -> dict[str, Tensor]:
        bits, scales = self.codes(progress)
        scale = torch.stack([to_scale(self._stored(s, row)) for s in scales])
        offset = None if self.offset is None else to_scale(self._stored(self.offset, row))
        return self.segment.encode(torch.stack([self._kept(b) for b in bits]), scale, offset)

    def _kept(self, bits: Tensor) -> Tensor:
        return _ungrouped(bits > 0, self.segment.columns)


class _FollowingView(_PlanesView):
    """Planes whose bits are the code of a latent weight [out, columns]; `keep` [out, columns] marks what is not
    overlaid."""

    def __init__(
        self,
        segment: Planes,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        latent: Tensor,
        keep: Tensor | None,
        estimator: Estimator,
    ) -> None:
        super().__init__(segment, parts, train)
        self.estimator = estimator
        packed, self.bits = self.bits, None
        if keep is None and segment.columns % (segment.group or segment.columns):
            keep = torch.ones_like(latent, dtype=torch.bool)  # tells the weights from what fills up the last group
        self.register_buffer("keep", None if keep is None else _grouped(keep, segment.group))
        with torch.no_grad():
            bits, _ = self._derive(latent, _hard)
        differs = _ungrouped(torch.stack([a != b for a, b in zip(bits, packed, strict=True)]).any(0), segment.columns)
        _learn(self, "latent", torch.where(differs, _decoded(segment, parts), latent), "latent" in train)

    def _derive(self, latent: Tensor, sign: Callable[[int, Tensor], Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Bits and scales as in `codes`; sign(p, x) is that of plane p."""
        raise NotImplementedError

    def _unit(self, p: int) -> Tensor:
        """What the estimator measures the argument of plane p's sign in, broadcastable to it."""
        raise NotImplementedError

    def codes(self, progress: float) -> tuple[list[Tensor], Sequence[Tensor]]:
        return self._derive(self.latent, lambda p, x: binarize(x, self._unit(p), self.estimator, progress))

    def _centred(self, latent: Tensor) -> Tensor:
        """The latent weight less the offset [out, groups, group]."""
        x = _grouped(latent, self.segment.group)
        return x if self.offset is None else x - self.offset.detach()[..., None]

    def _kept(self, bits: Tensor) -> Tensor:
        return super()._kept(bits if self.keep is None else bits * self.keep)


def _hard(p: int, x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


class _SignsView(_FollowingView):
    """-1/+1 planes, each the signs of what the ones before it leave."""

    def __init__(self, *args: Any, analytic: bool) -> None:
        self.analytic = False  # which codes are the packed ones is seen with the packed scales
        super().__init__(*args)
        self.analytic = analytic
        self.units: list[Tensor] = []  # of each plane [out, 1, 1], when training starts
        with torch.no_grad():
            self._derive(self.latent, self._measure)

    def _measure(self, p: int, x: Tensor) -> Tensor:
        keep = None if self.keep is None else self.keep.flatten(1)
        self.units.append(self.estimator.unit(x.flatten(1), keep)[..., None])
        return _hard(p, x)

    def _unit(self, p: int) -> Tensor:
        return self.units[p]

    def _derive(self, latent: Tensor, sign: Callable[[int, Tensor], Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        x, bits, scales = self._centred(latent), [], []
        for p in range(self.segment.planes):
            if p:
                x = x - bits[-1] * scales[-1].detach()[..., None]
            bits.append(sign(p, x))
            scales.append(self._mean(x) if self.analytic else self.scale[p])
        return bits, scales

    def _mean(self, x: Tensor) -> Tensor:
        """Mean |x| of each group over the weights that are binarised."""
        size = x.detach().abs()
        if self.keep is None:
            return size.mean(-1)
        return size.mul_(self.keep).sum(-1) / self.keep.sum(-1).clamp_min(1)


class _DualView(_FollowingView):
    """Two 0/1 planes whose four levels the latent weight is cut into: between a_2 and 0, 0 and a_1 + a_2, a_1 + a_2 and
    a_1. Groups with a_1 < a_2, whose longer tail is the negative one, follow the rule's mirror image."""

    def __init__(self, segment: Planes, parts: Mapping[str, Tensor], *args: Any) -> None:
        mirrored = (parts["_scale"][0] < parts["_scale"][1]).T[..., None]  # [out, groups, 1]
        self.mirror = torch.where(mirrored, -1.0, 1.0) if mirrored.any() else None
        super().__init__(segment, parts, *args)

    def _unit(self, p: int) -> Tensor:
        # the range of the levels; with a steeper surrogate thresholds outweigh the sum, and scales diverge
        a1, a2 = self.scale.detach()[..., None]
        return (a1 - a2).abs_().clamp_min_(MIN_SCALE)

    def _derive(self, latent: Tensor, sign: Callable[[int, Tensor], Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        def H(p: int, x: Tensor) -> Tensor:
            return sign(p, x if self.mirror is None else x * self.mirror).add_(1).mul_(0.5)

        w = self._centred(latent)
        a1, a2 = self.scale[..., None]
        b1 = H(0, w - (a1 + a2) / 2)
        return [b1, H(1, a1 * b1 + a2 / 2 - w)], self.scale


def _planes_view(
    segment: Planes,
    parts: Mapping[str, Tensor],
    train: Collection[str],
    latent: Tensor | None,
    keep: Tensor | None,
    estimator: Estimator,
    scales: Scales,
) -> _PlanesView:
    signs = segment.alphabet == "pm1" and latent is not None and "latent" in train
    if scales == "analytic":
        if not signs:
            raise InputError(
                f"analytic scales are for -1/+1 planes with a trained latent weight, not {segment.summary}"
            )
        train = {*train} - {"scale"}
    if signs:
        return _SignsView(segment, parts, train, latent, keep, estimator, analytic=scales == "analytic")
    if latent is not None and segment.alphabet == "01" and segment.planes == 2:
        return _DualView(segment, parts, train, latent, keep, estimator)
    return _PlanesView(segment, parts, train)


class _IntsView(nn.Module):
    """Integer codes on a trained grid: `scale` [out, groups]; the codes are fixed, or those of the latent weight."""

    def __init__(
        self, segment: Ints, parts: Mapping[str, Tensor], train: Collection[str], latent: Tensor | None
    ) -> None:
        super().__init__()
        self.segment = segment
        _learn(self, "scale", parts["_scale"].float().T, "scale" in train)
        middle = torch.full_like(self.scale.detach(), 2 ** (segment.bits - 1))
        self.register_buffer("zero", middle if segment.symmetric else segment._unpack_zero(parts["_zero"]).T.float())
        unscaled = {**parts, "_scale": torch.ones_like(parts["_scale"])}
        centred = _grouped(_decoded(segment, unscaled), segment.group)
        self.register_buffer("centred", centred)  # code - zero [out, groups, group]
        self.register_buffer("latent", None)
        if latent is not None:
            with torch.no_grad():
                differs = self._codes(latent, self.scale) != centred
            latent = torch.where(_ungrouped(differs, segment.columns), _decoded(segment, parts), latent)
            del self.latent, self.centred
            _learn(self, "latent", latent, True)

    def _codes(self, latent: Tensor, scale: Tensor) -> Tensor:
        """code - zero of the nearest code [out, groups, group]."""
        nearest = _Round.apply(_grouped(latent, self.segment.group) / scale[..., None])
        low = -self.zero[..., None]
        return nearest.clamp(low, low + (2**self.segment.bits - 1))

    def _current(self) -> tuple[Tensor, Tensor]:
        """code - zero [out, groups, group], and the scale [out, groups] as it will be stored."""
        scale = _Stored.apply(self.scale, MIN_SCALE)
        return self.centred if self.latent is None else self._codes(self.latent, scale), scale

    def forward(self, row: Tensor | None, progress: float) -> Tensor:
        centred, scale = self._current()
        return _ungrouped(centred * scale[..., None], self.segment.columns)

    def encode(self, row: Tensor | None, progress: float) -> dict[str, Tensor]:
        centred, scale = self._current()
        codes = _ungrouped(centred + self.zero[..., None], self.segment.columns).to(torch.uint8)
        return self.segment.encode(codes, to_scale(scale), None if self.segment.symmetric else self.zero)
