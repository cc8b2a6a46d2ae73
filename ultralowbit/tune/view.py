"""A packed weight that can be trained: parameters in fp32 whose values are always those of the bytes they pack to.

    segment            parameters                                        the weight
    Planes -1, +1      scale a, offset c, row r, latent w                r (sum_p a_p b_p + c)
    Planes 0, 1        the same                                          r (sum_p a_p b_p + c)
    Ints               scale s, latent w, where no plane is beside       (code - zero) s
    InputTransform     column r2, of the columns that are trained        all of it times r2_j

Scales, offsets and factors are rounded to fp16 in the forward pass, with the gradient passed straight through: what is
trained is what is packed. Without a latent weight the codes are fixed, and unpacked once; with it they are its codes at
every step:

    -1, +1   b_1 = sign(w - c), and each further plane the sign of what the planes before it leave (BinaryDM, RaBiT);
             the gradient runs through the estimator and through that remainder, in which scales are constants
    0, 1     two planes b_1 = H(w - (a_1 + a_2) / 2), b_2 = H(-(w - a_1 b_1 - a_2 / 2)), H(x) = [x >= 0]: the flexible
             dual binarization of DB-LLM; gradients reach the scales through the sum and through the thresholds
    Ints     round(w / s) + zero, clamped; the gradients of w and s are those of LSQ (Esser et al. 2020)

Overlaid 8-bit weights, zones, and integer columns beside planes (PTQ1.61's salient ones) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultralowbit.format import Ints, PackedWeight, Planes, Segment, block_hadamard, to_scale, unpack_fields
from ultralowbit.methods.base import MIN_SCALE
from ultralowbit.text import InputError
from ultralowbit.tune.estimators import STE, Estimator, binarize, step

KINDS = ("scale", "offset", "row", "column", "latent")
"""What of a packed weight can be trained."""

Scales = Literal["free", "analytic"]

_TILE = 1 << 18  # weights made at a time on a CPU: what they pass through on the way stays in a core's L2


class TrainableLinear(nn.Module):
    """y = x @ dense().T + bias for x [..., in]: stands where a Linear, Conv1D or PackedLinear stood in a model.

    packed: where training starts, and the device it runs on.
    train: some of `KINDS`; what the format has none of is passed over.
    latent [out, in]: the original weight. Two 0/1 planes follow it also where "latent" is not trained; -1/+1 planes and
        Ints use it only where it is. A weight whose own code is not the packed one (the method has made up for the
        errors of other columns) is first moved to where it is: training starts from `packed`, unless that has three or
        more planes with levels that no serial code reaches.
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
        self.packed, self.progress, self.device = packed, 0.0, packed.tensors["weight"].device
        self.out_features, self.in_features = packed.shape
        self.bias = None if bias is None else bias.detach()
        self._overlay()
        self.input = _InputView(packed, "column" in train)
        planes = any(isinstance(segment, Planes) for segment in format.segments)
        follows = "latent" in train or any(_is_dual(segment) for segment in format.segments)
        latent = self.input.stored(latent.detach().float()) if latent is not None and follows else None
        self.views = nn.ModuleList()
        for (prefix, first, segment), _ in zip(format._parts(), format.segments, strict=False):
            parts = {suffix: packed.tensors[prefix + suffix] for suffix in segment.tensors(self.out_features)}
            columns = slice(first, first + segment.columns)
            own = None if latent is None else latent[:, columns]
            keep = None if self.keep is None else self.keep[:, columns].bool()
            if isinstance(segment, Planes):
                view = _planes_view(segment, parts, train, own, keep, estimator or STE(), scales)
            elif isinstance(segment, Ints) and not planes:
                view = _IntsView(segment, parts, train, own if "latent" in train else None)
            else:
                view = _FrozenView(_decoded(segment, parts))
            self.views.append(view)
        row = torch.ones(self.out_features, device=self.device) if planes else None
        _learn(self, "row", row if "row" in train else None, True)
        if not self.by_kind():
            raise InputError(f"{format.summary} has none of what is to be trained: {', '.join(sorted(train))}")

    def _overlay(self) -> None:
        """`keep` [out, in] uint8, 0 for overlaid weights, and their `values`, 0 elsewhere; None without an overlay."""
        overlay, tensors = self.packed.format.overlay, self.packed.tensors
        self.register_buffer("keep", None)
        self.register_buffer("values", None)
        if overlay is not None:
            values = torch.full(self.packed.shape, torch.nan, device=self.device)
            overlay.decode({suffix: tensors[f"weight_overlay{suffix}"] for suffix in overlay.tensors(1)}, values)
            self.keep, self.values = values.isnan().to(torch.uint8), values.nan_to_num_()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], equal to `pack().dequantize(dtype)` bit for bit."""
        tensors = self._tensors()
        return _Tiled.apply(self._weight, self.packed.shape, dtype, tuple(tensors), *tensors.values())

    def _tensors(self) -> dict[str, Tensor]:
        """All that the weight is made of, by name; with the rows first, but for the input's."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Some rows of the weight in fp32, from the same rows of the tensors."""
        parts = []
        for i, view in enumerate(self.views):
            parts.append(view.weight(_below(tensors, f"views.{i}."), tensors.get("row"), self.progress))
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.keep is not None:
            weight = (weight * tensors["keep"]).add_(tensors["values"])
        return self.input.weight(_below(tensors, "input."), weight)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dense(dtype), bias)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        """The packed weight of the current parameters; raises `FormatError` where one left the range of fp16."""
        tensors, stored = self._tensors(), dict(self.packed.tensors)
        tiles = [_rows(tensors, rows) for rows in _tiles(self.packed.shape, self.device)]
        for i, ((prefix, _, segment), view) in enumerate(zip(self.packed.format._parts(), self.views, strict=False)):
            # by the tiles of `dense`: a mean over a row can depend on how many rows are taken at a time
            parts = [view.parts(_below(t, f"views.{i}."), t.get("row"), self.progress) for t in tiles]
            if parts[0]:
                joined = {name: torch.cat([part[name] for part in parts], dim=-2) for name in parts[0]}
                stored |= {prefix + suffix: part for suffix, part in segment.encode(**joined).items()}
        stored |= {f"weight_input{suffix}": part for suffix, part in self.input.parts(_own(self.input)).items()}
        return PackedWeight(self.packed.format, self.packed.shape, stored)

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


class _Tiled(torch.autograd.Function):
    """weight(tensors) for some rows at a time: tensors have their rows first. The gradient computes each tile again, so
    that what a weight passes through never lies in memory as a whole."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Callable[[Mapping[str, Tensor]], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.shape, ctx.names = weight, shape, names
        ctx.save_for_backward(*tensors)
        dense = torch.empty(shape, dtype=dtype, device=tensors[0].device)
        for rows in _tiles(shape, dense.device):
            dense[rows] = weight(_rows(dict(zip(names, tensors, strict=True)), rows))
        return dense

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        trained = [name for name, t in tensors.items() if t.requires_grad]
        grads = {name: torch.zeros_like(tensors[name]) for name in trained}
        for rows in _tiles(ctx.shape, grad.device):
            part = {name: t.detach() for name, t in _rows(tensors, rows).items()}
            leaves = [part[name].requires_grad_() for name in trained]
            with torch.enable_grad():
                found = torch.autograd.grad(ctx.weight(part), leaves, grad[rows].float())
            for name, g in zip(trained, found, strict=True):
                _rows(grads, rows)[name].add_(g)
        return None, None, None, None, *(grads.get(name) for name in ctx.names)


def _tiles(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """The rows that are taken at a time: all of them where memory is fast and kernels are slow to start."""
    rows, columns = shape
    step = max(1, _TILE // columns) if device.type == "cpu" else rows
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def _rows(tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: t if name.startswith("input.") else t[rows] for name, t in tensors.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


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


class _Permute(torch.autograd.Function):
    """x [rows, columns] with its columns in another order; the gradient is ordered back, indexing would add it up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, *ctx.saved_tensors), None, None


def _decoded(segment: Segment, parts: Mapping[str, Tensor]) -> Tensor:
    weight = torch.empty(parts[""].shape[-2], segment.columns, device=parts[""].device)
    segment.decode(parts, weight)
    return weight


def _moved(latent: Tensor, value: Tensor, coded: Callable[[Tensor], Tensor], near: bool = True) -> Tensor:
    """The latent weight where `coded` says that it has the packed code. Elsewhere it is moved towards the packed value,
    whose code that is: `near` its own, so that training can soon take it back, or all the way."""
    low, high = torch.zeros_like(latent), torch.ones_like(latent)  # shares of the way from the value to the latent
    kept = coded(latent)
    for _ in range(4 if near else 0):
        middle = (low + high) / 2
        inside = coded(value.lerp(latent, middle))
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    moved = value.lerp(latent, 0.9 * low)
    return torch.where(kept, latent, torch.where(coded(moved), moved, value))


def _grouped(x: Tensor, group: int | None) -> Tensor:
    """x [rows, columns] -> [rows, groups, group], the last group filled up with zeros."""
    group = group or x.shape[1]
    rest = -x.shape[1] % group
    return (F.pad(x, (0, rest)) if rest else x).unflatten(1, (-1, group))


def _ungrouped(x: Tensor, columns: int) -> Tensor:
    return x.flatten(1)[:, :columns]


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _learn(module: nn.Module, name: str, value: Tensor | None, train: bool) -> None:
    """A parameter where it is trained, else a buffer."""
    if value is None or not train:
        module.register_buffer(name, value)
    else:
        module.register_parameter(name, nn.Parameter(value.clone(memory_format=torch.contiguous_format)))


class _InputView(nn.Module):
    """What the input transform makes of a weight; all rows share its tensors, each None where the transform has no such
    part: `column` [in] factors as they are stored or trained, `fixed` and `trained` what those are that are not trained
    and which are, `order` and `inverse` of the columns."""

    def __init__(self, packed: PackedWeight, train: bool) -> None:
        super().__init__()
        self.transform = transform = packed.format.transform
        parts = {s: packed.tensors[f"weight_input{s}"] for s in (transform.tensors(1) if transform else ())}
        order = transform.order(parts) if "_partition" in parts else None
        self.register_buffer("order", order)
        self.register_buffer("inverse", None if order is None else order.argsort())
        segments = packed.format.segments
        # Ints beside planes are not trained, so neither are the factors of their columns
        kind = next((kind for kind in (Planes, Ints) if any(isinstance(s, kind) for s in segments)), ())
        trained = torch.cat([torch.full((s.columns,), isinstance(s, kind)) for s in segments])
        column = parts["_scale"].float() if "_scale" in parts else None
        train = train and column is not None and bool(trained.any())
        _learn(self, "column", column, train)
        self.register_buffer("fixed", column if train else None)
        self.register_buffer("trained", trained.to(column.device) if train else None)

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [out, in] that multiplies x, in the columns that are stored."""
        if self.transform is not None and self.transform.hadamard:
            weight = block_hadamard(weight, self.transform.hadamard)
        if self.order is not None:
            weight = weight[:, self.order]
        if self.column is not None:
            weight = weight / self.column.detach().where(self.column != 0, 1)
        return weight

    def weight(self, own: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """The inverse: some rows of what is stored, as they multiply x."""
        if "column" in own:
            weight = weight * self._column(own)
        if "order" in own:
            weight = _Permute.apply(weight, own["inverse"], own["order"])
        if self.transform is not None and self.transform.hadamard:
            weight = block_hadamard(weight, self.transform.hadamard)
        return weight

    def _column(self, own: Mapping[str, Tensor]) -> Tensor:
        column = _Stored.apply(own["column"], None)
        return torch.where(own["trained"], column, own["fixed"]) if "trained" in own else column

    def parts(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored otherwise than before."""
        return {"_scale": to_scale(self._column(own)).half()} if "trained" in own else {}


class _FrozenView(nn.Module):
    """Columns [out, columns] that are not trained."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def weight(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> Tensor:
        return own["values"]

    def parts(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> dict[str, Tensor]:
        return {}


class _PlanesView(nn.Module):
    """Sign planes with fixed bits: `bits` [out, planes, groups, group] int8 as their values; `scale` [out, planes,
    groups] and `offset` [out, groups], without the factor of the row.

    All methods take some rows of the view's own tensors by name, and of the rows' factor.
    """

    def __init__(self, segment: Planes, parts: Mapping[str, Tensor], train: Collection[str]) -> None:
        super().__init__()
        self.segment = segment
        _learn(self, "scale", parts["_scale"].float().permute(2, 0, 1), "scale" in train)
        _learn(self, "offset", parts["_offset"].float().T if segment.offset else None, "offset" in train)
        bits = [_grouped(self._unpack(words), segment.group) for words in parts[""]]
        self.register_buffer("bits", torch.stack(bits, dim=1))

    def _unpack(self, words: Tensor) -> Tensor:
        bits = unpack_fields(words, 1, self.segment.columns).to(torch.int8)
        return bits if self.segment.alphabet == "01" else bits.mul_(2).sub_(1)

    def codes(self, own: Mapping[str, Tensor], progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of each plane the bits [rows, groups, group] as their values, and the scale [rows, groups]."""
        return own["bits"].unbind(1), own["scale"].unbind(1)

    def weight(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> Tensor:
        """[rows, columns]"""
        weight = None
        for bits, scale in zip(*self.codes(own, progress), strict=True):
            plane = bits * _scaled(scale, row)[..., None]
            weight = plane if weight is None else weight.add_(plane)
        if self.segment.offset:
            weight = weight.add_(_scaled(own["offset"], row)[..., None])
        return _ungrouped(weight, self.segment.columns)

    def parts(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> dict[str, Tensor]:
        """What `Planes.encode` takes, of these rows."""
        bits, scales = self.codes(own, progress)
        parts = {
            "bits": torch.stack([self._set(b, own) for b in bits]),
            "scale": torch.stack([to_scale(_scaled(s, row)) for s in scales]),
        }
        return parts | ({"offset": to_scale(_scaled(own["offset"], row))} if self.segment.offset else {})

    def _set(self, bits: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Which bits [rows, columns] are stored as 1."""
        return _ungrouped(bits > 0, self.segment.columns)


def _scaled(values: Tensor, row: Tensor | None) -> Tensor:
    """Scales or offsets [rows, groups] as they are stored."""
    return _Stored.apply(values if row is None else values * row[:, None], None)


class _FollowingView(_PlanesView):
    """Planes whose bits are the code of a latent weight [out, columns]; `keep` marks what is not overlaid."""

    low: ClassVar[float]  # the value of a bit that is not set

    def __init__(
        self,
        segment: Planes,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        keep: Tensor | None,
        estimator: Estimator,
    ) -> None:
        super().__init__(segment, parts, train)
        self.estimator = estimator
        rows = parts[""].shape[-2]
        if keep is None and segment.columns % (segment.group or segment.columns):
            # tells the weights from what fills up the last group
            keep = torch.ones(rows, segment.columns, dtype=torch.bool, device=parts[""].device)
        self.register_buffer("keep", None if keep is None else _grouped(keep.to(torch.uint8), segment.group))

    def _follow(self, latent: Tensor, parts: Mapping[str, Tensor], train: bool, near: bool = True) -> None:
        """Take the latent weight in the place of the fixed bits, changed where those are not its own."""
        packed, self.bits = self.bits.unbind(1), None

        def coded(latent: Tensor) -> Tensor:
            bits, _ = self._derive({**_own(self), "latent": latent}, self._hard)
            same = torch.stack([a == b for a, b in zip(bits, packed, strict=True)]).all(0)
            return _ungrouped(same, self.segment.columns)

        _learn(self, "latent", _moved(latent, _decoded(self.segment, parts), coded, near), train)

    def _derive(
        self, own: Mapping[str, Tensor], sign: Callable[[int, Tensor], Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What `codes` returns; sign(p, x) is the bits of plane p."""
        raise NotImplementedError

    def _unit(self, own: Mapping[str, Tensor], p: int) -> Tensor:
        """What the estimator measures the argument of plane p's sign in [rows, groups or 1, 1]."""
        raise NotImplementedError

    def codes(self, own: Mapping[str, Tensor], progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self._derive(own, lambda p, x: binarize(x, self._unit(own, p), self.estimator, progress, self.low))

    def _hard(self, p: int, x: Tensor) -> Tensor:
        return step(x, self.low)

    def _centred(self, own: Mapping[str, Tensor]) -> Tensor:
        """The latent weight less the offset [rows, groups, group]."""
        x = _grouped(own["latent"], self.segment.group)
        return x - own["offset"].detach()[..., None] if self.segment.offset else x

    def _set(self, bits: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return super()._set(bits * own["keep"] if "keep" in own else bits, own)


class _SignsView(_FollowingView):
    """-1/+1 planes of a trained latent weight, each the signs of what the ones before it leave. The estimator's `units`
    [out, planes, 1, 1] are those of the start."""

    low = -1.0

    def __init__(
        self,
        segment: Planes,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        latent: Tensor,
        keep: Tensor | None,
        estimator: Estimator,
        analytic: bool,
    ) -> None:
        super().__init__(segment, parts, {*train} - {"scale"} if analytic else train, keep, estimator)
        self.analytic = False  # which bits the packed scales give is what counts at first
        units: list[Tensor] = []

        def measure(p: int, x: Tensor) -> Tensor:
            units.append(estimator.unit(x.flatten(1), None if self.keep is None else self.keep.flatten(1).bool()))
            return self._hard(p, x)

        with torch.no_grad():
            self._order()
            # many weights close to zero would make the mean of all too small
            self._follow(latent, parts, True, near=not analytic)
            self.analytic = analytic
            self._derive(_own(self), measure)
        self.register_buffer("units", torch.stack(units, dim=1)[..., None])

    def _order(self) -> None:
        """Make the scales positive and falling from plane to plane, without another meaning: a plane has what the ones
        before it leave."""
        negative = (self.scale < 0)[..., None]
        self.bits = self.bits * torch.where(negative, -1, 1).to(torch.int8)
        scale, order = self.scale.abs().sort(dim=1, descending=True, stable=True)
        self.scale.copy_(scale)
        self.bits = self.bits.gather(1, order[..., None].expand_as(self.bits))

    def _unit(self, own: Mapping[str, Tensor], p: int) -> Tensor:
        return own["units"][:, p]

    def _derive(
        self, own: Mapping[str, Tensor], sign: Callable[[int, Tensor], Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        x, bits, scales = self._centred(own), [], []
        for p in range(self.segment.planes):
            if p:
                x = x - bits[-1] * scales[-1].detach()[..., None]
            bits.append(sign(p, x))
            scales.append(self._mean(x, own.get("keep")) if self.analytic else own["scale"][:, p])
        return bits, scales

    @staticmethod
    def _mean(x: Tensor, keep: Tensor | None) -> Tensor:
        """Mean |x| of each group over the weights that are binarised."""
        size = x.detach().abs()
        return size.mean(-1) if keep is None else size.mul_(keep).sum(-1) / keep.sum(-1).clamp_min(1)


class _DualView(_FollowingView):
    """Two 0/1 planes whose four levels the latent weight is cut into: between a_2 and 0, 0 and a_1 + a_2, a_1 + a_2 and
    a_1. Groups with a_1 < a_2, whose longer tail is the negative one, follow the rule's mirror image."""

    low = 0.0

    def __init__(
        self,
        segment: Planes,
        parts: Mapping[str, Tensor],
        train: Collection[str],
        latent: Tensor,
        keep: Tensor | None,
        estimator: Estimator,
    ) -> None:
        super().__init__(segment, parts, train, keep, estimator)
        mirrored = (self.scale[:, 0] < self.scale[:, 1])[..., None]  # [out, groups, 1]
        self.register_buffer("mirror", torch.where(mirrored, -1.0, 1.0) if mirrored.any() else None)
        with torch.no_grad():
            self._follow(latent, parts, "latent" in train)

    def _unit(self, own: Mapping[str, Tensor], p: int) -> Tensor:
        # the range of the levels; with a steeper surrogate the thresholds outweigh the sum, and scales diverge
        a1, a2 = own["scale"].detach()[..., None].unbind(1)
        return (a1 - a2).abs_().clamp_min_(MIN_SCALE)

    def _derive(
        self, own: Mapping[str, Tensor], sign: Callable[[int, Tensor], Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        def H(p: int, x: Tensor) -> Tensor:
            return sign(p, x * own["mirror"] if "mirror" in own else x)

        w = self._centred(own)
        a1, a2 = own["scale"][..., None].unbind(1)
        b1 = H(0, w - (a1 + a2) / 2)
        return [b1, H(1, a1 * b1 + a2 / 2 - w)], own["scale"].unbind(1)


def _is_dual(segment: Segment) -> bool:
    return isinstance(segment, Planes) and segment.alphabet == "01" and segment.planes == 2


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
    if scales == "analytic" and not signs:
        raise InputError(f"analytic scales need -1/+1 planes with a trained latent weight, found {segment.summary}")
    if signs:
        return _SignsView(segment, parts, train, latent, keep, estimator, scales == "analytic")
    if latent is not None and _is_dual(segment):
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
        centred = _grouped(_decoded(segment, unscaled), segment.group)  # code - zero [out, groups, group]
        self.register_buffer("centred", centred.to(torch.int16) if latent is None else None)
        if latent is not None:

            def coded(latent: Tensor) -> Tensor:
                same = self._nearest(_own(self), latent, self.scale.detach()) == centred
                return _ungrouped(same, segment.columns)

            _learn(self, "latent", _moved(latent, _decoded(segment, parts), coded), True)

    def _nearest(self, own: Mapping[str, Tensor], latent: Tensor, scale: Tensor) -> Tensor:
        """code - zero of the nearest code [rows, groups, group]."""
        code = _Round.apply(_grouped(latent, self.segment.group) / scale[..., None])
        low = -own["zero"][..., None]
        return code.clamp(low, low + (2**self.segment.bits - 1))

    def _current(self, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """code - zero [rows, groups, group], and the scale [rows, groups] as it is stored."""
        scale = _Stored.apply(own["scale"], MIN_SCALE)
        return own["centred"] if "centred" in own else self._nearest(own, own["latent"], scale), scale

    def weight(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> Tensor:
        centred, scale = self._current(own)
        return _ungrouped(centred * scale[..., None], self.segment.columns)

    def parts(self, own: Mapping[str, Tensor], row: Tensor | None, progress: float) -> dict[str, Tensor]:
        centred, scale = self._current(own)
        codes = _ungrouped(centred + own["zero"][..., None], self.segment.columns).to(torch.uint8)
        zero = {} if self.segment.symmetric else {"zero": own["zero"]}
        return {"codes": codes, "scale": to_scale(scale), **zero}
