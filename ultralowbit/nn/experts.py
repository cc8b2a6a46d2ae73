"""Experts: the fused experts of transformers' mixtures, with a Linear for each expert and projection.

transformers keeps the weights of all experts of a layer in one tensor [experts, out, in] for each projection. Here an
expert's weight is a Linear of its own: a view of that tensor, or packed. What packs, stores, counts and loads Linears
then needs to know of no experts, and a token is multiplied by the bytes of those that it is routed to, and no others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultralowbit.checkpoint.names import expert_linear
from ultralowbit.errors import CheckpointError
from ultralowbit.nn.hf_names import experts_layout, onloaded
from ultralowbit.nn.linear import PackedLinear, swap


class ExpertLinear(nn.Module):
    """One expert's weight [out, in] as a view of the tensor of all; what is written to it is written there."""

    bias = None  # the experts' biases stay with `Experts`

    def __init__(self, experts: Experts, expert: int, projection: str) -> None:
        super().__init__()
        self._place = (experts, expert, projection)  # in a tuple `experts` is no submodule
        self.out_features, self.in_features = experts.linear_shape(projection)

    @property
    def experts(self) -> Experts:
        return self._place[0]

    @property
    def projection(self) -> str:
        return self._place[2]

    @property
    def weight(self) -> Tensor:
        experts, expert, projection = self._place
        weight = getattr(experts, projection)[expert]
        return weight.T if experts.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Experts(nn.Module):
    """Stands for a module of fused experts: hidden [tokens, d], the experts of each token [tokens, k] and their weights
    [tokens, k] -> [tokens, d].

    Takes over the parameters of `original` under their names; the experts' Linears have those of `expert_linear`. They
    are made when one is asked for: a large model has tens of thousands, and is planned without them.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        layout = experts_layout(original)
        self.projections, self.transposed, self._has_bias = layout.projections, layout.transposed, layout.has_bias
        self._original, self._activation = (original,), layout.activation
        for name in list(original._parameters):
            self.register_parameter(name, original._parameters.pop(name))
        self.count = len(self.down_proj)

    def make_linears(self) -> None:
        """Make the experts' Linears, where they are not there: they are then submodules."""
        for expert in range(0 if self._modules else self.count):
            self.add_module(str(expert), nn.ModuleDict())
            for projection in self.projections:
                swap(self, expert_linear(expert, projection), ExpertLinear(self, expert, projection))

    def drop_linears(self) -> None:
        """Undo `make_linears`, where nothing is packed."""
        self._modules.clear()

    def linear(self, expert: int, projection: str) -> ExpertLinear | PackedLinear:
        self.make_linears()
        return self.get_submodule(expert_linear(expert, projection))

    def linear_shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of a projection of each expert, of which not all are packed yet."""
        _, *shape = getattr(self, projection).shape
        out, width = reversed(shape) if self.transposed else shape
        return out, width

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name of each expert's Linear within this module -> (out, in)."""
        shapes = {projection: self.linear_shape(projection) for projection in self.projections}
        return {expert_linear(e, p): shape for e in range(self.count) for p, shape in shapes.items()}

    def entering(self, expert: int, projection: str, x: Tensor) -> Tensor:
        """What a projection of an expert is given, for x [tokens, d] that the expert is given."""
        first, _ = self.projections
        if projection == first:
            return x
        activation = getattr(self._original[0], self._activation)
        return activation(self._project(expert, first, x))

    def forward(self, hidden: Tensor, routed: Tensor, weights: Tensor) -> Tensor:
        k = routed.shape[-1]
        pairs = routed.reshape(-1)
        order = pairs.argsort(stable=True)
        outputs = hidden.new_zeros(len(pairs), hidden.shape[-1])
        # an index past the last expert means none
        for expert, rows in enumerate(order.split(pairs.bincount(minlength=self.count).tolist())[: self.count]):
            if len(rows):
                outputs[rows] = self._run(expert, hidden[rows // k]).to(outputs.dtype)  # autocast gives another
        return (outputs.view(*routed.shape, -1) * weights[..., None]).sum(-2).to(hidden.dtype)

    def drop_dense(self) -> None:
        """Leave nothing of the tensors whose experts are all packed but an empty one under each name: it stands in
        checkpoints too, where transformers without this package then stops at its shape, instead of making up the
        experts' weights. `CheckpointError` where only some are packed."""
        for projection in self.projections:
            packed = [isinstance(self.linear(e, projection), PackedLinear) for e in range(self.count)]
            if any(packed) and not all(packed):
                raise CheckpointError(
                    f"expert {packed.index(False)} of {self.count} is not packed in {projection}, others are: the "
                    "config.json was edited, copy it again"
                )
            if all(packed):
                dense = self._parameters.pop(projection)
                self.register_buffer(projection, torch.empty(0, dtype=torch.uint8, device=dense.device))

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The module that this one stands for, with the weights that the packed bytes mean."""
        (original,) = self._original
        with onloaded(self):
            for name, p in self._parameters.items():
                original.register_parameter(name, nn.Parameter(p.to(dtype), requires_grad=False))
        for projection in self.projections:
            if projection not in self._parameters:
                weights = [self.linear(e, projection).dense(dtype).weight for e in range(self.count)]
                stacked = torch.stack([w.T if self.transposed else w for w in weights])
                original.register_parameter(projection, nn.Parameter(stacked, requires_grad=False))
        return original

    def _run(self, expert: int, x: Tensor) -> Tensor:
        """x [tokens, d] through one expert."""
        last = self.projections[1]
        return self._project(expert, last, self.entering(expert, last, x))

    def _project(self, expert: int, projection: str, x: Tensor) -> Tensor:
        y = self.linear(expert, projection)(x)
        return y + getattr(self, f"{projection}_bias")[expert] if self._has_bias else y


def separate_experts(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Experts]:
    """Put `Experts` in the place of the fused experts of a model whose name is `wanted`; returns them by name."""
    fused = {name: m for name, m in model.named_modules() if experts_layout(m) is not None and wanted(name)}
    separate = {}
    for name, module in fused.items():
        separate[name] = Experts(module).train(module.training)
        swap(model, name, separate[name])
    return separate


def routing_linears(block: nn.Module) -> set[str]:
    """The names of a block's Linears that choose experts or weigh what experts give: those named so, outside the
    experts themselves, in a module that has `experts`."""
    mixtures = [name.removesuffix("experts") for name, _ in block.named_modules() if name.split(".")[-1] == "experts"]
    return {
        name
        for name, module in block.named_modules()
        for mixture in mixtures
        if isinstance(module, nn.Linear) and name.startswith(mixture)
        if any(part == "router" or part.endswith("gate") for part in name.removeprefix(mixture).split("."))
    }
