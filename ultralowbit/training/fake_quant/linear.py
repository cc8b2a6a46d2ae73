"""A packed weight that can be trained: parameters whose values are always those of the bytes they pack to.

    segment            parameters                                        the weight
    Planes -1, +1      scale a, offset c, row r, latent w                r (sum_p a_p b_p + c)
    Planes 0, 1        the same                                          r (sum_p a_p b_p + c)
    Ints               scale s, latent w, where no plane is beside       (code - zero) s
    InputTransform     column r2, of the columns that are trained        all of it times r2_j

Scales, offsets and factors are rounded to fp16 in the forward pass, with the gradient passed straight through: what is
trained is what is packed. Without a latent weight the codes are fixed, and unpacked once; with it they are its codes at
every step:

    -1, +1   the level nearest to w; with analytic scales b_1 = sign(w - c), and each further plane the sign of what the
             planes before it leave (BinaryDM, RaBiT). The gradient runs through the estimator and through that
             remainder, in which scales are constants
    0, 1     two planes b_1 = H(w - (a_1 + a_2) / 2), b_2 = H(-(w - a_1 b_1 - a_2 / 2)), H(x) = [x >= 0]: the flexible
             dual binarization of DB-LLM; gradients reach the scales through the sum and through the thresholds
    Ints     round(w / s) + zero, clamped; the gradients of w and s are those of LSQ (Esser et al. 2020)

Outliers, segments without a line in `FAKE_QUANT`, and integer columns beside planes (PTQ1.61's salient ones) stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultralowbit.errors import InputError
from ultralowbit.format.planes import Planes
from ultralowbit.format.weight import PackedWeight
from ultralowbit.training.estimators import STE, Estimator
from ultralowbit.training.fake_quant.latent import LatentSigns, is_dual
from ultralowbit.training.fake_quant.rounding import own_tensors, register
from ultralowbit.training.fake_quant.segments import Scales, Start, fake_quant
from ultralowbit.training.fake_quant.tiles import Tiled, row_tiles, take_rows, under
from ultralowbit.training.fake_quant.transform import FakeQuantTransform
from ultralowbit.training.specs import KINDS


class FakeQuantLinear(nn.Module):
    """y = x @ dense().T + bias for x [..., in]: stands where a Linear, Conv1D or PackedLinear stood in a model.

    packed: where training starts, and the device it runs on.
    train: some of `KINDS`; what the format has none of is passed over.
    latent [out, in]: the original weight. Two 0/1 planes follow it also where "latent" is not trained; -1/+1 planes and
        Ints use it only where it is. A weight whose own code is not the packed one (the method has made up for the
        errors of other columns) is first moved to where it is: training starts from `packed`.
    bias: gives what is added [out], at every use; None for nothing.
    scales: "free" trains them; "analytic" takes mean |w - c| of a group's binarised latent weights at every step,
        without a gradient (PB-LLM). That is for -1/+1 planes with a trained latent weight.
    dtype: of the latent weight; all is computed in fp32.

    Raises `InputError` where the format has nothing of what is to be trained.
    """

    def __init__(
        self,
        packed: PackedWeight,
        train: Collection[str],
        *,
        latent: Tensor | None = None,
        bias: Callable[[], Tensor] | None = None,
        estimator: Estimator | None = None,
        scales: Scales = "free",
        dtype: torch.dtype = torch.float32,
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
        self.bias = bias
        self._outliers()
        self.input = FakeQuantTransform(packed, "column" in train)
        planes = any(isinstance(segment, Planes) for segment in format.segments)
        follows = "latent" in train or any(is_dual(segment) for segment in format.segments)
        latent = self.input.stored(latent.detach().float()) if latent is not None and follows else None
        self.parts = nn.ModuleList()
        for (prefix, first, segment), _ in zip(format.parts, format.segments, strict=False):
            parts = {suffix: packed.tensors[prefix + suffix] for suffix in segment.tensors(self.out_features)}
            columns = slice(first, first + segment.columns)
            own = None if latent is None else latent[:, columns]
            keep = None if self.keep is None else self.keep[:, columns].bool()
            start = Start(train, own, keep, estimator or STE(), scales, planes, dtype)
            self.parts.append(fake_quant(segment, parts, start))
        row = torch.ones(self.out_features, dtype=torch.float32, device=self.device) if planes else None
        register(self, "row", row if "row" in train else None, True)
        alone = self.keep is None and self.input.only_turns and len(self.parts) == 1
        self.has_kernels = alone and isinstance(self.parts[0], LatentSigns) and self.parts[0].has_kernels
        if not self.by_kind():
            raise InputError(f"{format.summary} has none of what is to be trained: {', '.join(sorted(train))}")

    def _outliers(self) -> None:
        """`keep` [out, in] uint8, 0 for replaced weights, and their `values`, 0 elsewhere; None without outliers."""
        outliers, tensors = self.packed.format.outliers, self.packed.tensors
        self.register_buffer("keep", None)
        self.register_buffer("values", None)
        if outliers is not None:
            values = torch.full(self.packed.shape, torch.nan, dtype=torch.float32, device=self.device)
            outliers.decode({suffix: tensors[f"weight_outliers{suffix}"] for suffix in outliers.tensors(1)}, values)
            self.keep, self.values = values.isnan().to(torch.uint8), values.nan_to_num_()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], equal to `pack().dequantize(dtype)` bit for bit."""
        if self.has_kernels:
            return self.parts[0].dense(self.row, self.input.block, dtype)
        tensors = self._tensors()
        return Tiled.apply(self._weight, self.input.turned, self.packed.shape, dtype, tuple(tensors), *tensors.values())

    def _tensors(self) -> dict[str, Tensor]:
        """All that the weight is made of, by name; with the rows first, but for the input's."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Some rows of the weight in fp32, before they are turned, from the same rows of the tensors."""
        parts = []
        for i, part in enumerate(self.parts):
            parts.append(part.weight(under(tensors, f"parts.{i}."), tensors.get("row"), self.progress))
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.keep is not None:
            weight = (weight * tensors["keep"]).add_(tensors["values"])
        return self.input.weight(under(tensors, "input."), weight)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias().to(dtype)
        return F.linear(x.to(dtype), self.dense(dtype), bias)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        """The packed weight of the current parameters; raises `FormatError` where one left the range of fp16."""
        tensors, stored = self._tensors(), dict(self.packed.tensors)
        tiles = [take_rows(tensors, rows) for rows in row_tiles(self.packed.shape, self.device)]
        for i, ((prefix, _, segment), own) in enumerate(zip(self.packed.format.parts, self.parts, strict=False)):
            # by the tiles of `dense`: a mean over a row can depend on how many rows are taken at a time
            parts = [own.parts(under(t, f"parts.{i}."), t.get("row"), self.progress) for t in tiles]
            if parts[0]:
                joined = {name: torch.cat([part[name] for part in parts], dim=-2) for name in parts[0]}
                stored |= {prefix + suffix: part for suffix, part in segment.encode(**joined).items()}
        stored |= {f"weight_input{suffix}": part for suffix, part in self.input.parts(own_tensors(self.input)).items()}
        return PackedWeight(self.packed.format, self.packed.shape, stored)

    def by_kind(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each kind that there is."""
        by_kind: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            by_kind.setdefault(name.rpartition(".")[2], []).append(parameter)
        return by_kind

    def extra_repr(self) -> str:
        return f"{self.packed.format.summary}, trains {', '.join(self.by_kind())}"


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of all `FakeQuantLinear`s in a model by their kind, in the order of the modules."""
    by_kind: dict[str, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            for kind, parameters in module.by_kind().items():
                by_kind.setdefault(kind, []).extend(parameters)
    return by_kind


def level_distances(model: nn.Module) -> dict[nn.Parameter, float]:
    """How far apart the levels of each trained latent weight in a model are, in the mean."""
    linears = (module for module in model.modules() if isinstance(module, FakeQuantLinear))
    parts = (part for linear in linears for part in linear.parts)
    return {p: part.distance for part in parts for name, p in part.named_parameters() if name == "latent"}


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell the estimators of all `FakeQuantLinear`s in a model which share of the training, 0 to 1, is done."""
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            module.progress = progress
