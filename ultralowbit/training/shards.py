"""Training by several processes: FSDP2 shards the latent weights, and windows are dealt out.

Latent weights, their gradients and moments lie in shards of rows, one on each rank, and are gathered a block at a time
where the block runs. Scales, offsets and factors, a hundredth of them, are whole on every rank and their gradients are
summed, because FSDP2 wants one dtype in a shard. So is the original, which is never trained.

Gradients are sums over ranks, and rounded in another order than those of one process: what is trained by N ranks is the
same whenever N are, and differs in the last digits from what another number makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


class Shards:
    """The ranks of a mesh [ranks], which train one model together; without a mesh this process is alone."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.rank, self.size = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, module: nn.Module) -> None:
        """Keep a share of the trained latent weights of a module, but for those of its parts that have been sharded
        before; they are whole while the module runs."""
        if self.mesh is None:
            return
        latents = {p for n, p in module.named_parameters() if p.requires_grad and n.rpartition(".")[2] == "latent"}
        fully_shard(
            module,
            mesh=self.mesh,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            ignored_params={p for p in module.parameters() if p not in latents},
        )
        module.set_gradient_divide_factor(1.0)  # losses are shares of a mean already
        module.set_force_sum_reduction_for_comms(True)  # gloo knows nothing but sums

    # --- exchanges: every rank calls them in the same order ---

    def deal(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This rank's items, and whether each counts: every rank gets as many, because all of them run together."""
        for first in range(0, len(items), self.size):
            at = first + self.rank
            yield (items[at], True) if at < len(items) else (items[0], False)

    def map(self, f: Callable[[T], float], items: Sequence[T]) -> list[float]:
        """f of every item, in their order, for all ranks; each item is given to one of them."""
        own = torch.tensor([f(item) for item, _ in self.deal(items)], dtype=torch.float64)
        return self.gather(own).T.reshape(-1)[: len(items)].tolist()

    def gather(self, numbers: Tensor) -> Tensor:
        """Numbers [n] on the host, of which each rank has its own -> those of all [ranks, n]."""
        if self.mesh is None:
            return numbers[None]
        parts = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(parts, numbers)
        return torch.stack(parts)

    def agree(self, flag: bool) -> bool:
        """What rank 0 says."""
        return bool(self.gather(torch.tensor([flag], dtype=torch.uint8))[0].item())

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of parameters that are whole on every rank; FSDP2 has summed those of the others."""
        grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if self.mesh is None or not grads:
            return
        joined = torch.cat([grad.view(-1) for grad in grads])
        dist.all_reduce(joined)
        for grad, summed in zip(grads, joined.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def local(tensor: Tensor) -> Tensor:
    """This rank's rows, as a view; all of them where the tensor is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(p: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as `p` is and on its device; a number stays as it is, on the host."""
    if whole.ndim == 0:
        return whole
    if not isinstance(p, DTensor):
        return whole.to(p.device)
    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """While the context lasts, the parameters of a module are whole on every rank."""
    if isinstance(module, FSDPModule):
        module.unshard()
    yield
    if isinstance(module, FSDPModule):
        module.reshard()


def batches_of(rows: list[int], most: int, ranks: int) -> list[list[int]]:
    """The samples of a step in batches of at most so many, and of fewer where some ranks would have none."""
    size = min(most, math.ceil(len(rows) / ranks))
    return [rows[start : start + size] for start in range(0, len(rows), size)]
