"""The loop: it finds minima, keeps the best, survives infinities, and a killed run ends with the same bytes."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import Parameter

from ultralowbit.checkpoint.storage import tensor_bytes
from ultralowbit.errors import InputError
from ultralowbit.progress import Silent
from ultralowbit.training import saved
from ultralowbit.training.loop import Fitted, fit
from ultralowbit.training.specs import TrainSpec

SAMPLES = 13


class Problem:
    """A two-layer regression from a random start; sample i is `x[i]`, the last four are held out. Parameters of `dtype`
    are computed with in fp32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES + 4, 6, generator=generator)
        self.y = torch.tanh(self.x @ torch.randn(6, 5, generator=generator)) @ torch.randn(5, 2, generator=generator)
        self.hidden = Parameter((0.3 * torch.randn(6, 8, generator=generator)).to(dtype))
        self.out = Parameter((0.3 * torch.randn(8, 2, generator=generator)).to(dtype))
        self.seen: list[list[int]] = []

    @property
    def parameters(self) -> dict[str, list[Parameter]]:
        return {"scale": [self.hidden], "row": [self.out], "offset": []}

    @property
    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in (self.hidden, self.out)]

    def error(self, rows) -> Tensor:
        return F.mse_loss(torch.tanh(self.x[rows] @ self.hidden.float()) @ self.out.float(), self.y[rows])

    def loss(self, rows: list[int]) -> Tensor:
        self.seen.append(rows)
        return self.error(rows)

    def evaluate(self) -> float:
        return self.error(slice(SAMPLES, None)).item()

    def fit(self, spec: TrainSpec, **options) -> Fitted:
        options = {"loss": self.loss, "evaluate": self.evaluate} | options
        loss, evaluate = options.pop("loss"), options.pop("evaluate")
        with tempfile.TemporaryDirectory() as folder:
            options = {"state": Path(folder) / "state.safetensors"} | options
            return fit(self.parameters, loss, spec, SAMPLES, evaluate, **options)


def spec(**changes) -> TrainSpec:
    return TrainSpec(**{"lr": {"scale": 0.02, "row": 0.02}, "epochs": 6, "batch": 2, "evaluations": 6} | changes)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_lowers_the_objective_and_says_so():
    problem = Problem()
    start, before = problem.values, problem.evaluate()
    fitted = problem.fit(spec())
    assert fitted.before == before and fitted.accepted and not fitted.notes
    assert fitted.after < 0.7 * before and fitted.after == problem.evaluate()
    assert fitted.steps == 6 * 7 and [entry["step"] for entry in fitted.history] == [7, 14, 21, 28, 35, 42]
    assert fitted.after == min(entry["objective"] for entry in fitted.history)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    assert not same(start, problem.values) and problem.hidden.grad is None


@pytest.mark.parametrize("relative", [False, True])
def test_it_is_adamw_with_a_rate_for_each_kind(relative):
    """The same steps written down once more."""
    problem, again = Problem(), Problem()
    rates = [
        lr * (p.square().mean().sqrt().item() if relative else 1)
        for p, lr in zip(again.values, (0.02, 0.003), strict=True)
    ]
    settings = spec(
        lr={"scale": 0.02, "row": 0.003}, relative=relative, warmup=0.2, clip_norm=2.5, weight_decay=0.01,
        betas=(0.8, 0.9), accumulation=2, epochs=3, evaluations=1,
    )  # fmt: skip
    fitted = problem.fit(settings)
    optimizer = torch.optim.AdamW(
        [{"params": [again.hidden]}, {"params": [again.out]}], 0, (0.8, 0.9), weight_decay=0.01
    )
    norms = []
    for step in range(12):  # 4 steps an epoch: 4, 4, 4 and 1 samples
        first = step // 4 * 7 + step % 4 * 2
        rows = list(chain(*problem.seen[first : first + (2 if step % 4 < 3 else 1)]))
        assert len(rows) == (4, 4, 4, 1)[step % 4]
        factor = (step + 1) / 2 if step < 2 else 0.05 + 0.95 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        again.error(rows).backward()
        norms.append(torch.nn.utils.clip_grad_norm_([again.hidden, again.out], 2.5).item())
        optimizer.step()
    assert fitted.steps == 12 and min(norms) < 2.5 < max(norms)
    for a, b in zip(problem.values, again.values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_relative_rate_moves_what_starts_from_zero():
    problem = Problem()
    problem.out.data.zero_()
    problem.fit(spec(relative=True, steps=1, final_lr=1.0, evaluations=1))
    assert problem.values[1].abs().max() <= 0.02 * 1e-3 * 1.01 and problem.values[1].abs().max() > 0


def test_relative_rates_are_multiples_of_sizes_that_are_given():
    problem, again = Problem(), Problem()
    problem.fit(spec(relative=True, lr={"scale": 0.02, "row": 0.02}), sizes={problem.hidden: 0.5, problem.out: 2.0})
    again.fit(spec(lr={"scale": 0.01, "row": 0.04}))
    assert same(problem.values, again.values)


def test_every_epoch_sees_every_sample_once_in_its_own_order():
    orders = []
    for seed in (0, 0, 1):
        problem = Problem()
        before = torch.random.get_rng_state()
        problem.fit(spec(seed=seed, epochs=3))
        assert torch.equal(before, torch.random.get_rng_state())
        epochs = [list(chain(*problem.seen[7 * e : 7 * e + 7])) for e in range(3)]
        assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
        orders.append(epochs)
    assert orders[0] == orders[1] != orders[2]


def test_the_schedule():
    rates = [spec(warmup=0.1, final_lr=0.1).factor(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)]) and rates[10] == 1
    assert all(a > b for a, b in pairwise(rates[10:])) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert spec(final_lr=1).factor(99, 100) == 1 and spec(warmup=1).factor(99, 100) == 1
    assert [
        spec(epochs=e, batch=b, accumulation=a).total_steps(SAMPLES)
        for e, b, a in ((1, 2, 1), (0.01, 2, 1), (1.5, 4, 2), (2, 100, 1))
    ] == [7, 1, 3, 2]  # fmt: skip
    assert spec(steps=5).total_steps(SAMPLES) == 5


def test_progress_is_told():
    watch, shares = Watch(), []
    Problem().fit(spec(epochs=2), progress=watch, what="tuning block 3", on_progress=shares.append)
    assert (watch.stages, watch.steps, watch.said) == ([("tuning block 3", 14)], 14, [])
    assert shares == [k / 14 for k in range(14)]


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_the_start_is_kept_where_nothing_was_better():
    """An absurd rate, and a held-out objective that has nothing to do with what is trained."""
    problem = Problem()
    start = problem.values
    fitted = problem.fit(spec(lr={"scale": 1e3, "row": 1e3}))
    assert same(start, problem.values)
    assert not fitted.accepted and fitted.after == fitted.before == problem.evaluate() and fitted.best_step == 0
    assert fitted.notes[-1].startswith("the start was kept: the held-out objective was ")
    problem = Problem()
    objectives = iter([1.0, *[1.0 + k for k in range(6)]])
    fitted = problem.fit(spec(), evaluate=lambda: next(objectives))
    assert same(start, problem.values) and not fitted.accepted and fitted.steps == 42  # a tie is no gain


def test_the_best_parameters_are_kept_and_not_the_last():
    problem, kept = Problem(), []
    objectives = iter([5.0, 4.0, 2.0, 3.0, 2.5, 9.0, 8.0])

    def evaluate() -> float:
        kept.append(problem.values)
        return next(objectives)

    fitted = problem.fit(spec(), evaluate=evaluate)
    assert (fitted.before, fitted.after, fitted.best_step, fitted.accepted) == (5.0, 2.0, 14, True)
    assert same(problem.values, kept[2]) and not same(problem.values, kept[-1])
    assert [entry["objective"] for entry in fitted.history] == [4.0, 2.0, 3.0, 2.5, 9.0, 8.0]


def test_patience():
    problem = Problem()
    objectives = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 1.0])
    fitted = problem.fit(spec(patience=2), evaluate=lambda: next(objectives))
    assert (fitted.steps, fitted.best_step, fitted.after) == (35, 21, 3.0)
    assert fitted.notes == ("training ended at step 35: 2 evaluations in a row were no better",)


# --- what is not finite ---------------------------------------------------------------------------------------------


class Watch(Silent):
    def __init__(self) -> None:
        self.stages, self.steps, self.said = [], 0, []

    def start(self, what: str, total: int) -> None:
        self.stages.append((what, total))

    def step(self, n: int = 1) -> None:
        self.steps += n

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["loss", "gradient", "objective"])
def test_one_infinity_costs_half_the_rate_and_a_second_ends_it(caplog, where, bad, times):
    problem, kept = Problem(), {}
    bad_steps, bad_evaluations = {"objective": ([], [3, 5])}.get(where, ([17, 30], []))

    def loss(rows: list[int]) -> Tensor:
        value = problem.loss(rows)
        if len(problem.seen) in bad_steps[:times]:
            if where == "loss":
                return value * bad
            value.register_hook(lambda grad: grad * bad)
        return value

    def evaluate() -> float:
        kept[len(problem.seen)] = problem.values
        return bad if len(kept) - 1 in bad_evaluations[:times] else problem.evaluate()

    fitted = problem.fit(spec(), loss=loss, evaluate=evaluate)
    assert all(v.isfinite().all() for v in problem.values) and math.isfinite(fitted.after)
    assert same(problem.values, kept[fitted.best_step]) and fitted.accepted
    first, second = (17, 30) if where != "objective" else (21, 35)
    what = {"loss": "the loss was", "gradient": "the gradient's norm was", "objective": "the held-out objective was"}
    assert re.match(
        rf"at step {first} {what[where]} (inf|nan): the parameters of step 14 were restored and training went on from "
        "them at half the learning rates$",
        fitted.notes[0],
    )
    assert caplog.messages == [f"training: {note}" for note in fitted.notes]
    if times == 1:
        assert len(fitted.notes) == 1 and fitted.steps == 42 and fitted.best_step > 14
    else:
        assert len(fitted.notes) == 2 and fitted.steps == second
        assert fitted.notes[1].endswith("were restored and training ended with them")


def test_rates_are_halved_once_and_moments_start_anew(tmp_path):
    """A constant gradient: Adam's first step is the rate itself."""
    p, values, calls = Parameter(torch.zeros(1)), [], Counter()

    def loss(rows: list[int]) -> Tensor:
        calls["loss"] += 1
        values.append(p.item())
        return p.sum() * (math.inf if calls["loss"] == 4 else 1)

    settings = TrainSpec(lr={"scale": 0.1}, steps=8, batch=1, final_lr=1, evaluations=8, clip_norm=None)
    fitted = fit({"scale": [p]}, loss, settings, 1, lambda: p.item(), state=tmp_path / "state")
    assert values == pytest.approx([0, -0.1, -0.2, -0.3, -0.3, -0.35, -0.4, -0.45], abs=1e-5)
    assert fitted.after == pytest.approx(-0.5) and len(fitted.notes) == 1


def test_a_start_that_cannot_be_judged_is_left_for_one_that_can():
    problem = Problem()
    objectives = iter([math.nan, *[float(k) for k in range(6)]])
    fitted = problem.fit(spec(), evaluate=lambda: next(objectives))
    assert math.isnan(fitted.before) and fitted.after == 0.0 and fitted.best_step == 7


# --- going on after a kill --------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def content(file: Path) -> tuple[dict, dict[str, bytes]]:
    """What a saved state says and holds, but how long it took."""
    with saved.opened(file) as stored:
        state = json.loads(stored.text)
        assert state.pop("seconds") > 0
        return state, {name: tensor_bytes(stored.tensor(name)).tobytes() for name in stored.names}


RUNS = {
    "plain": {},
    "accumulation": {"accumulation": 3, "epochs": 14},
    "patience": {"patience": 1, "lr": {"scale": 0.3, "row": 0.3}},
    "infinity": {},
    "bf16": {},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("save_seconds", [0, 1e9], ids=["saving every step", "never"])
def test_a_killed_run_ends_with_the_same_bytes(name, save_seconds, tmp_path, monkeypatch):
    """Killed in the loss of each step in turn, at each evaluation, and while its state is written."""

    settings = spec(**({"epochs": 3, "evaluations": 3} | RUNS[name]))

    def run(problem: Problem, die: tuple[str, int] | None, file) -> Fitted:
        calls: Counter[str] = Counter()

        def count(what: str) -> None:
            calls[what] += 1
            if die == (what, calls[what]):
                raise Killed

        def loss(rows: list[int]) -> Tensor:
            count("loss")
            return problem.loss(rows) * (math.nan if name == "infinity" and rows[0] == 7 else 1)

        def evaluate() -> float:
            count("evaluate")
            return problem.evaluate()

        def replace(self, target, real=Path.replace):
            count("write")
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            return problem.fit(settings, loss=loss, evaluate=evaluate, state=file, save_seconds=save_seconds)

    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    problem = Problem(dtype)
    whole = run(problem, None, tmp_path / "whole")
    assert whole.notes or name in ("plain", "accumulation", "bf16")
    deaths = {"loss": (1, 2, 5, 9, 16, 21), "evaluate": (1, 2, 3), "write": (1, 2, 4, 5)}
    for die in ((what, k) for what, times in deaths.items() for k in times):
        file = tmp_path / f"{die[0]}-{die[1]}"
        for attempt in (die, ("loss", 2), None):  # killed, killed again soon after, then left alone
            again = Problem(dtype)
            try:
                fitted = run(again, attempt, file)
            except Killed:
                continue
        assert fitted == whole and same(again.values, problem.values)
        assert content(file) == content(tmp_path / "whole")
    assert not list(tmp_path.glob("*.best-*"))


def test_a_finished_run_is_not_made_again(tmp_path):
    problem, again = Problem(), Problem()
    fitted = problem.fit(spec(), state=tmp_path / "state")
    assert again.fit(spec(), state=tmp_path / "state", evaluate=None) == fitted
    assert not again.seen and same(again.values, problem.values)


def test_states_of_something_else_are_refused(tmp_path):
    file = tmp_path / "state"
    Problem().fit(spec(), state=file)
    other = Problem()
    with torch.no_grad():
        other.out[0, 0] += 1e-7
    for problem, settings in ((other, spec()), (Problem(), spec(seed=1)), (Problem(), spec(lr={"scale": 1, "row": 1}))):
        with pytest.raises(InputError, match=r"state of another training.*remove it"):
            problem.fit(settings, state=file)
    for content in (b"", b"{}", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"is no state of a training .*remove it"):
            Problem().fit(spec(), state=file)


SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_loop import Problem, spec
problem = Problem()

def loss(rows):
    time.sleep(0.02)
    return problem.loss(rows)

problem.fit(spec(epochs=20), loss=loss, state=Path({file!r}), save_seconds=0)
"""


def test_kill_9(tmp_path):
    """A process that ends in the middle of whatever it does leaves a state that another can go on from."""
    file = tmp_path / "state"
    script = SCRIPT.format(folder=str(Path(__file__).parent), file=str(file))
    killed = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    problem, again = Problem(), Problem()
    assert again.fit(spec(epochs=20), state=file) == problem.fit(spec(epochs=20))
    assert same(again.values, problem.values) and 0 < len(again.seen) < len(problem.seen)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained(tmp_path):
    problem = Problem()
    with pytest.raises(InputError, match=r"row would be trained without a learning rate: give lr\.row"):
        problem.fit(spec(lr={"scale": 1e-3}))
    with pytest.raises(ValueError, match="nothing to train"):
        fit({"scale": []}, problem.loss, spec(), SAMPLES, problem.evaluate, state=tmp_path / "state")
    with pytest.raises(ValueError, match="nothing to train"):
        fit(problem.parameters, problem.loss, spec(), 0, problem.evaluate, state=tmp_path / "state")


def test_recipes_spell_the_settings():
    adapter = TypeAdapter(TrainSpec)
    assert adapter.validate_python({"lr": {"scale": 1e-3}, "epochs": 1.5, "clip_norm": None}).clip_norm is None
    for wrong in (
        {},
        {"lr": {"scale": 0}},
        {"lr": {}, "epochs": 0},
        {"lr": {}, "epoch": 1},
        {"lr": {}, "betas": [0.9]},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_autocast(tmp_path):
    seen = []

    def loss(rows: list[int]) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return Problem().out.sum() + p.sum()

    for setting in ("auto", "on", "off"):
        p = Parameter(torch.zeros(1))
        settings, state = TrainSpec(lr={"scale": 1e-3}, steps=1, autocast=setting), tmp_path / setting
        fit({"scale": [p]}, loss, settings, 1, lambda: loss([]).item(), state=state)
    assert seen == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("amx", [False, True])
def test_autocast_where_products_in_bfloat16_are_fast_and_many(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu, cuda, many = torch.device("cpu"), torch.device("cuda"), 1 << 25
    for setting in ("on", "off"):
        spec = TrainSpec(lr={"scale": 1e-3}, autocast=setting)
        assert {spec.autocasts(d, n) for d in (cpu, cuda) for n in (1, many)} == {setting == "on"}
    spec = TrainSpec(lr={"scale": 1e-3})
    assert spec.autocasts(cuda, 1) and not spec.autocasts(cpu, 1 << 20)
    assert spec.autocasts(cpu, many) == amx
