"""One training loop, for blocks and whole models: AdamW on groups of parameters, each with its own learning rate.

The objective is judged on held-out samples, with the values that will be packed, before training and a few times during
it. The best parameters are kept; where nothing was better than the start, the start is. Killed at any moment and run
again, it ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ultralowbit.checkpoint.storage import write_tensors
from ultralowbit.errors import InputError, reason
from ultralowbit.progress import Progress, Silent
from ultralowbit.training.specs import TrainSpec

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0
"""Between two saved states; more where saving is slow, so that it takes 2 % of the time at most."""


@dataclass(frozen=True)
class Fitted:
    """What training came to: `before`, `after`: the held-out objective at the start and of the parameters kept, the
    same unless `accepted`; `best_step`: optimizer steps up to the parameters kept; `steps`: all that were made;
    `notes`: sentences for the report; `history`: {step, loss, objective} of each evaluation, where `loss` is the mean
    on the training samples since the evaluation before."""

    before: float
    after: float
    best_step: int
    steps: int
    notes: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = ()

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
    state: Path | None = None,
    progress: Progress | None = None,
    what: str = "training",
    on_progress: Callable[[float], object] | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Fitted:
    """Train parameters, by kind, and leave them at their best.

    loss: the mean over the samples with these numbers, below `samples`, to be lowered. evaluate: the objective that
    counts, on samples that are held out, lower is better; both are called under the spec's autocast. state: a file that
    a killed run goes on from; it is left behind when training has ended, so that the caller can remove it once the
    result is safe. on_progress: told the share of the steps done, 0 to below 1, before each step.

    A loss or gradient that is not finite brings back the best parameters and halves the learning rates once; the second
    time training ends there. `InputError` where a kind has no learning rate, or `state` is of another training.
    """
    return _Fit(parameters, loss, spec, samples, evaluate, state, progress or Silent(), save_seconds).run(
        what, on_progress or (lambda share: None)
    )


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
        file: Path | None,
        progress: Progress,
        save_seconds: float,
    ) -> None:
        groups = {kind: list(ps) for kind, ps in parameters.items() if ps}
        if missing := sorted(set(groups) - set(spec.lr)):
            raise InputError(f"{', '.join(missing)} would be trained without a learning rate: give lr.{missing[0]}")
        if not groups or samples < 1:
            raise ValueError(f"there is nothing to train: {len(groups)} kinds of parameters, {samples} samples")
        self.loss, self.spec, self.samples, self.evaluate = loss, spec, samples, evaluate
        self.file, self.progress, self.save_seconds = file, progress, save_seconds
        self.named = {f"{kind}.{i}": p for kind, ps in groups.items() for i, p in enumerate(ps)}
        self.kinds, self.device = list(groups), next(iter(self.named.values())).device
        self.optimizer = torch.optim.AdamW(
            [{"params": ps} for ps in groups.values()],
            lr=0.0,
            betas=spec.betas,
            weight_decay=spec.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.total = spec.total_steps(samples)
        evaluations = min(spec.evaluations, self.total)
        self.judged = {round((k + 1) * self.total / evaluations) for k in range(evaluations)}
        self.best = {name: p.detach().clone() for name, p in self.named.items()}
        self.state = _State(self._fingerprint())
        self.saved, self.wait = time.monotonic(), save_seconds

    def run(self, what: str, on_progress: Callable[[float], object]) -> Fitted:
        resumed = self._load()
        state = self.state
        self.progress.start(what, self.total)
        if resumed:
            self.progress.step(state.step)
        else:
            state.before = self._objective()
            state.best = state.before if math.isfinite(state.before) else math.inf
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
            if time.monotonic() - self.saved >= self.wait:
                self._save()
        return self._finish()

    def _step(self, step: int) -> None:
        """Optimizer step number `step`; raises `_NotFinite` before any parameter has changed."""
        rows = self._rows(step)
        self.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for start in range(0, len(rows), self.spec.batch):
            batch = rows[start : start + self.spec.batch]
            with self._autocast():
                part = self.loss(batch)
            part = part.float() * (len(batch) / len(rows))
            part.backward()
            loss += part.detach()
        norm = get_total_norm([p.grad for p in self.named.values() if p.grad is not None])
        mean_loss, size = torch.stack([loss, norm]).tolist()
        if not math.isfinite(mean_loss):
            raise _NotFinite(f"the loss was {mean_loss}")
        if not math.isfinite(size):
            raise _NotFinite(f"the gradient's norm was {size}")
        if self.spec.clip_norm is not None and size > self.spec.clip_norm:
            clip_grads_with_norm_(self.named.values(), self.spec.clip_norm, norm)
        factor = self.spec.factor(step, self.total) * 0.5**self.state.failures
        for kind, group in zip(self.kinds, self.optimizer.param_groups, strict=True):
            group["lr"] = self.spec.lr[kind] * factor
        self.optimizer.step()
        self.state.loss += mean_loss
        self.state.counted += 1

    def _rows(self, step: int) -> list[int]:
        """The samples of a step; every epoch has its own order."""
        size = self.spec.batch * self.spec.accumulation
        epoch, at = divmod(step, math.ceil(self.samples / size))
        mixed = hashlib.sha256(f"{self.spec.seed} {epoch}".encode()).digest()[:4]  # the generator takes 32 bits
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
        return torch.randperm(self.samples, generator=generator)[at * size : (at + 1) * size].tolist()

    def _autocast(self) -> torch.autocast:
        wanted = self.spec.autocast == "on" or (self.spec.autocast == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

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
            for name, p in self.named.items():
                self.best[name].copy_(p.detach())
        waited = sum(entry["step"] > state.best_step for entry in state.history)
        if self.spec.patience is not None and waited >= self.spec.patience and state.step < self.total:
            state.ended = True
            state.notes.append(f"training ended at step {state.step}: {waited} evaluations in a row were no better")

    def _recover(self, what: str, error: _NotFinite) -> None:
        """Back to the best parameters with half the learning rates; the second time, for good."""
        state = self.state
        self._restore()
        self.optimizer.state.clear()  # moments of parameters that are gone
        state.failures += 1
        state.ended = state.failures > 1
        state.loss, state.counted = 0.0, 0
        then = "training ended with them" if state.ended else "training went on from them at half the learning rates"
        note = f"at step {state.step} {error}: the parameters of step {state.best_step} were restored and {then}"
        state.notes.append(note)
        log.warning("%s: %s", what, note)

    def _restore(self) -> None:
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(self.best[name])

    def _finish(self) -> Fitted:
        state = self.state
        self._restore()
        self.optimizer.zero_grad()
        if not state.finished and state.best_step == 0:
            tried = min((entry["objective"] for entry in state.history), default=math.nan)
            state.notes.append(
                f"the start was kept: the held-out objective was {state.before:.4g} there and {tried:.4g} at best later"
            )
        state.finished = True
        self._save()
        after = state.best if state.best_step else state.before
        return Fitted(state.before, after, state.best_step, state.step, tuple(state.notes), tuple(state.history))

    def _fingerprint(self) -> str:
        """Of all that decides what training comes to, but for the data and the code."""
        digest = hashlib.sha256(json.dumps([asdict(self.spec), self.samples], sort_keys=True).encode())
        for name, p in self.named.items():
            digest.update(f"{name} {tuple(p.shape)}".encode())
            digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _save(self) -> None:
        if self.file is None:
            return
        started = time.monotonic()
        tensors = {f"best/{name}": t for name, t in self.best.items()}
        for name, p in self.named.items():
            tensors[f"parameter/{name}"] = p.detach()
            tensors |= {f"{moment}/{name}": t for moment, t in self.optimizer.state.get(p, {}).items()}
        tensors = {name: t.cpu() for name, t in tensors.items()}
        state = json.dumps(asdict(self.state))
        write_tensors(self.file, tensors, {"state": state, "sha256": _digest(state, tensors, tensors.get)})
        self.saved = time.monotonic()
        if self.save_seconds:
            self.wait = max(self.save_seconds, 50 * (self.saved - started))

    def _load(self) -> bool:
        """Whether there was a saved state, which then is this run's."""
        if self.file is None or not self.file.exists():
            return False
        try:
            with safe_open(self.file, framework="pt") as stored:
                names, metadata = list(stored.keys()), stored.metadata()
                if metadata["sha256"] != _digest(metadata["state"], names, stored.get_tensor):
                    raise ValueError("its bytes have changed since they were written")
                state = _State(**json.loads(metadata["state"]))
                if state.run != self.state.run:
                    raise InputError(
                        f"{self.file} is the state of another training, or of other settings: remove it to start anew"
                    )
                for key in names:
                    what, _, name = key.partition("/")
                    p, value = self.named[name], stored.get_tensor(key)
                    if what == "best":
                        self.best[name].copy_(value)
                    elif what == "parameter":
                        p.data.copy_(value)
                    else:
                        self.optimizer.state[p][what] = value.to(p.device)
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"{self.file} is no state of a training ({reason(e)}): remove it to start anew") from e
        self.state = state
        return True


def _digest(state: str, names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """Hex digest of what a saved state holds; its tensors are asked for one at a time."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(names):
        tensor = tensor_of(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
