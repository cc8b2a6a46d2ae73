"""One training loop, for blocks and whole models: AdamW on groups of parameters, each with its own learning rate.

The objective is judged on held-out samples, with the values that will be packed, before training and a few times during
it. The best parameters are kept, in a file; where nothing was better than the start, the start is. Killed at any moment
and run again, it ends with the same bytes.

Parameters in bf16 have an AdamW that takes six bytes for a number, its value and its gradient included; for those in
fp32 it is 16.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from ultralowbit.checkpoint.storage import tensor_bytes
from ultralowbit.errors import InputError
from ultralowbit.progress import Progress, Silent
from ultralowbit.training import saved
from ultralowbit.training.optimizer import AdamW8bit, mixed_seed
from ultralowbit.training.shards import Shards, batches_of, local, sharded_like
from ultralowbit.training.specs import TrainSpec

log = logging.getLogger(__name__)

LEAST_SIZE = 1e-3
"""Root mean square that a tensor is taken to have at least where rates are relative: biases may start from zero."""
SAVE_SECONDS = 60.0
"""Between two saved states; more where saving is slow, so that it takes 2 % of the time at most."""


@dataclass(frozen=True)
class Fitted:
    """What training came to: `before`, `after`: the held-out objective at the start and of the parameters kept, the
    same unless `accepted`; `best_step`: optimizer steps up to the parameters kept; `steps`: all that were made;
    `notes`: sentences for the report; `history`: {step, loss, objective} of each evaluation, where `loss` is the mean
    on the training samples since the evaluation before; `earlier_seconds`: that killed runs trained up to what this one
    went on from."""

    before: float
    after: float
    best_step: int
    steps: int
    notes: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    earlier_seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """What a manifest keeps: the same, killed or not."""
        return {name: value for name, value in asdict(self).items() if name != "earlier_seconds"}

    @property
    def accepted(self) -> bool:
        """Whether training has made anything better."""
        return self.best_step > 0


def fit(
    parameters: Mapping[str, Sequence[Parameter]],
    loss: Callable[[list[int]], Tensor],
    spec: TrainSpec,
    samples: int,
    evaluate: Callable[[], float],
    *,
    state: Path,
    progress: Progress | None = None,
    what: str = "training",
    on_progress: Callable[[float], object] | None = None,
    sizes: Mapping[Parameter, float] | None = None,
    save_seconds: float = SAVE_SECONDS,
    shards: Shards | None = None,
) -> Fitted:
    """Train parameters, by kind, and leave them at their best.

    loss: the mean over the samples with these numbers, below `samples`, to be lowered. evaluate: the objective that
    counts, on samples that are held out, lower is better; both are called under the spec's autocast. state: a file
    that a killed run goes on from; it is left behind when training has ended, so that the caller can remove it once
    the result is safe. The best parameters so far lie beside it. on_progress: told the share of the steps done, 0
    to below 1, before each step. sizes: what relative rates are multiples of, where it is not the root mean square.
    shards: the ranks that train together, which call this alike with the same `evaluate`; each gives the loss of
    its own samples, rank 0 writes, and another number of ranks can go on.

    A loss or gradient that is not finite brings back the best parameters and halves the learning rates once; the second
    time training ends there. `InputError` where a kind has no learning rate, or `state` is of another training.
    """
    training = _Fit(
        parameters, loss, spec, samples, evaluate, state, progress or Silent(), sizes or {}, save_seconds,
        shards or Shards(),
    )  # fmt: skip
    return training.run(what, on_progress or (lambda share: None))


class _NotFinite(ArithmeticError):
    """What is not finite, in words."""


@dataclass
class _State:
    """What, beside tensors, a run goes on from."""

    run: str
    step: int = 0
    before: float = math.nan
    best: float = math.inf
    best_step: int = 0
    failures: int = 0
    ended: bool = False  # before all steps are made
    finished: bool = False
    loss: float = 0.0  # sum since the last evaluation
    counted: int = 0
    seconds: float = 0.0  # of all runs, up to here
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


class _Fit:
    def __init__(
        self,
        parameters: Mapping[str, Sequence[Parameter]],
        loss: Callable[[list[int]], Tensor],
        spec: TrainSpec,
        samples: int,
        evaluate: Callable[[], float],
        file: Path,
        progress: Progress,
        sizes: Mapping[Parameter, float],
        save_seconds: float,
        shards: Shards,
    ) -> None:
        self.began, self.earlier_seconds = time.monotonic(), 0.0
        groups = {kind: list(ps) for kind, ps in parameters.items() if ps}
        if missing := sorted(set(groups) - set(spec.lr)):
            raise InputError(f"{', '.join(missing)} would be trained without a learning rate: give lr.{missing[0]}")
        if not groups or samples < 1:
            raise ValueError(f"there is nothing to train: {len(groups)} kinds of parameters, {samples} samples")
        self.loss, self.spec, self.samples, self.evaluate = loss, spec, samples, evaluate
        self.file, self.progress, self.save_seconds, self.shards = file, progress, save_seconds, shards
        self.named = {f"{kind}.{i}": p for kind, ps in groups.items() for i, p in enumerate(ps)}
        self.device = next(iter(self.named.values())).device
        rates = [
            {"params": [p], "largest": spec.lr[kind] * (_size(p, sizes) if spec.relative else 1.0)}
            for kind, ps in groups.items()
            for p in ps
        ]
        self.optimizers = [
            adamw(dtype, [group for group in rates if group["params"][0].dtype == dtype], spec)
            for dtype in dict.fromkeys(p.dtype for p in self.named.values())
        ]
        self.optimizer_of = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        self.total = spec.total_steps(samples)
        evaluations = min(spec.evaluations, self.total)
        self.judged = {round((k + 1) * self.total / evaluations) for k in range(evaluations)}
        self.state = _State(self._fingerprint())
        self.saved_at, self.wait = time.monotonic(), save_seconds

    def run(self, what: str, on_progress: Callable[[float], object]) -> Fitted:
        resumed = self._load()
        state = self.state
        self.progress.start(what, self.total)
        if resumed:
            self.progress.step(state.step)
        else:
            self._keep_best()
            state.before = self._objective()
            state.best = state.before if math.isfinite(state.before) else math.inf
        if self.shards.size > 1 and not state.finished and (note := _together(self.shards.size)) not in state.notes:
            state.notes.append(note)
        while state.step < self.total and not state.ended:
            step, state.step = state.step, state.step + 1
            on_progress(step / self.total)
            try:
                self._step(step)
                if state.step in self.judged:
                    self._judge()
            except _NotFinite as e:
                self._recover(what, e)
            self.progress.step()
            if self.shards.agree(time.monotonic() - self.saved_at >= self.wait):
                self._save()
        return self._finish()

    def _step(self, step: int) -> None:
        """Optimizer step number `step`; raises `_NotFinite` before any parameter has changed."""
        rows = self._rows(step)
        self._forget_gradients()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch, counts in self.shards.deal(batches_of(rows, self.spec.batch, self.shards.size)):
            with self._autocast():
                part = self.loss(batch)
            part = part.float() * (len(batch) / len(rows) * counts)
            part.backward()
            loss += part.detach()
        self.shards.add_gradients(self.named.values())
        mean_loss, size = self._measured(loss)
        if not math.isfinite(mean_loss):
            raise _NotFinite(f"the loss was {mean_loss}")
        if not math.isfinite(size):
            raise _NotFinite(f"the gradient's norm was {size}")
        if self.spec.clip_norm is not None and size > self.spec.clip_norm:
            shrink = self.spec.clip_norm / (torch.tensor(size, dtype=torch.float32) + 1e-6)  # as torch's own does
            for p in self.named.values():
                if p.grad is not None:
                    local(p.grad).mul_(shrink.item())
        factor = self.spec.factor(step, self.total) * 0.5**self.state.failures
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["largest"] * factor
            optimizer.step()
        self.state.loss += mean_loss
        self.state.counted += 1

    def _measured(self, loss: Tensor) -> tuple[float, float]:
        """The mean loss, from what this rank's samples add to it, and the norm of all gradients."""
        sharded, whole = [], []
        for grad in (p.grad for p in self.named.values() if p.grad is not None):
            norm = torch.linalg.vector_norm(local(grad), dtype=torch.float32)
            (sharded if isinstance(grad, DTensor) else whole).append(norm)
        measured = self.shards.gather(torch.stack([loss, *sharded]).cpu())  # [ranks, 1 + sharded]
        norms = torch.cat([measured[:, 1:].reshape(-1), torch.stack(whole).cpu() if whole else measured.new_empty(0)])
        return sum(measured[:, 0].tolist()), torch.linalg.vector_norm(norms).item()

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _rows(self, step: int) -> list[int]:
        """The samples of a step; every epoch has its own order."""
        size = self.spec.batch * self.spec.accumulation
        epoch, at = divmod(step, math.ceil(self.samples / size))
        generator = torch.Generator().manual_seed(mixed_seed(self.spec.seed, epoch))
        return torch.randperm(self.samples, generator=generator)[at * size : (at + 1) * size].tolist()

    def _autocast(self) -> torch.autocast:
        trained = sum(p.numel() for p in self.named.values())
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.autocasts(self.device, trained))

    def _objective(self) -> float:
        with torch.no_grad(), self._autocast():
            return float(self.evaluate())

    def _judge(self) -> None:
        """Keep the parameters if they are the best so far; end where patience is at its end."""
        state, objective = self.state, self._objective()
        loss = state.loss / max(1, state.counted)
        state.history.append({"step": state.step, "loss": loss, "objective": objective})
        state.loss, state.counted = 0.0, 0
        if not math.isfinite(objective):
            raise _NotFinite(f"the held-out objective was {objective}")
        if objective < state.best:
            state.best, state.best_step = objective, state.step
            self._keep_best()
        waited = sum(entry["step"] > state.best_step for entry in state.history)
        if self.spec.patience is not None and waited >= self.spec.patience and state.step < self.total:
            state.ended = True
            state.notes.append(f"training ended at step {state.step}: {waited} evaluations in a row were no better")

    def _recover(self, what: str, error: _NotFinite) -> None:
        """Back to the best parameters with half the learning rates; the second time, for good."""
        state = self.state
        self._restore()
        for optimizer in self.optimizers:
            optimizer.state.clear()  # moments of parameters that are gone
        state.failures += 1
        state.ended = state.failures > 1
        state.loss, state.counted = 0.0, 0
        then = "training ended with them" if state.ended else "training went on from them at half the learning rates"
        note = f"at step {state.step} {error}: the parameters of step {state.best_step} were restored and {then}"
        state.notes.append(note)
        log.warning("%s: %s", what, note)

    def _best_file(self) -> Path:
        """Of the best parameters; its name has their step, so that an older state still finds those that it means."""
        return self.file.with_name(f"{self.file.stem}.best-{self.state.best_step}{self.file.suffix}")

    def _keep_best(self) -> None:
        self._write(self._best_file(), {name: p.detach() for name, p in self.named.items()}, "")

    def _write(self, file: Path, tensors: Mapping[str, Tensor], text: str) -> None:
        if self.shards.is_first:
            saved.save(file, tensors, text)
        else:
            saved.accompany(tensors)
        self.shards.agree(True)  # nobody reads it before it is there

    @torch.no_grad()
    def _restore(self) -> None:
        with saved.opened(self._best_file()) as best:
            for name, p in self.named.items():
                p.copy_(sharded_like(p, best.tensor(name)))

    def _finish(self) -> Fitted:
        state = self.state
        if not state.finished:
            self._forget_gradients()
            self._restore()
            self._end()
        if self.shards.is_first:
            for file in self._best_files():
                file.unlink()  # they are the parameters of the state
        after = state.best if state.best_step else state.before
        return Fitted(
            state.before, after, state.best_step, state.step, tuple(state.notes), tuple(state.history),
            self.earlier_seconds,
        )  # fmt: skip

    def _end(self) -> None:
        state = self.state
        if state.best_step == 0:
            tried = min((entry["objective"] for entry in state.history), default=math.nan)
            state.notes.append(
                f"the start was kept: the held-out objective was {state.before:.4g} there and {tried:.4g} at best later"
            )
        state.finished = True
        self._save()

    def _best_files(self) -> list[Path]:
        return list(self.file.parent.glob(f"{glob.escape(self.file.stem)}.best-*{glob.escape(self.file.suffix)}"))

    def _fingerprint(self) -> str:
        """Of all that decides what training comes to, but for the data and the code."""
        digest = hashlib.sha256(json.dumps([asdict(self.spec), self.samples], sort_keys=True).encode())
        for name, p in self.named.items():
            digest.update(f"{name} {tuple(p.shape)}".encode())
            digest.update(tensor_bytes(p))
        return digest.hexdigest()

    def _save(self) -> None:
        started, tensors = time.monotonic(), {}
        self.state.seconds = self.earlier_seconds + started - self.began
        for name, p in self.named.items():
            tensors[f"parameter/{name}"] = p.detach()
            tensors |= {f"{what}/{name}": t for what, t in self.optimizer_of[p].state.get(p, {}).items()}
        self._write(self.file, tensors, json.dumps(asdict(self.state)))
        for file in self._best_files():
            if self.shards.is_first and file != self._best_file():
                file.unlink()
        self.saved_at = time.monotonic()
        if self.save_seconds:
            self.wait = max(self.save_seconds, 50 * (self.saved_at - started))

    def _load(self) -> bool:
        """Whether there was a saved state, which then is this run's."""
        if not self.file.exists():
            return False
        with saved.opened(self.file) as stored:
            state = _State(**json.loads(stored.text))
            if state.run != self.state.run:
                raise InputError(
                    f"{self.file} is the state of another training, or of other settings: remove it to start anew"
                )
            for key in stored.names:
                what, _, name = key.partition("/")
                p = self.named[name]
                value = sharded_like(p, stored.tensor(key))
                if what == "parameter":
                    local(p.data).copy_(local(value))
                else:
                    self.optimizer_of[p].state[p][what] = value
        self.state, self.earlier_seconds = state, state.seconds
        return True


def _together(ranks: int) -> str:
    """A sentence for the report."""
    return (
        f"trained by {ranks} processes together: the last digits differ from what another number of them makes, "
        "because sums are rounded in another order"
    )


def _size(p: Parameter, sizes: Mapping[Parameter, float]) -> float:
    """What a relative rate is a multiple of; parameters that are sharded, latent weights, have theirs in `sizes`."""
    if p in sizes:
        return sizes[p]
    return max(LEAST_SIZE, torch.linalg.vector_norm(p.detach(), dtype=torch.float32).item() / math.sqrt(p.numel()))


def adamw(dtype: torch.dtype, groups: list[dict[str, Any]], spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW for parameters of one dtype."""
    if dtype == torch.bfloat16:
        return AdamW8bit(groups, 0.0, spec.betas, spec.weight_decay, spec.seed)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, 0.0, spec.betas, weight_decay=spec.weight_decay, fused=fused)
