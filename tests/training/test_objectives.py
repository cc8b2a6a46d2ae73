"""Objectives: ten-line fp64 references, gradients, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ultralowbit.training import objectives
from ultralowbit.training.objectives import (
    BLOCK_OBJECTIVES,
    DAD,
    KL,
    MSE,
    MSENLC,
    OBJECTIVES,
    CrossEntropy,
    Direction,
    LowRank,
    Outputs,
)

B, L, V, D = 3, 7, 11, 8


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> tuple[Outputs, Outputs, Tensor]:
    """Student, teacher and tokens; two layers of hidden states."""
    student = Outputs(normal(B, L, V, seed=1, scale=2), (normal(B, L, D, seed=2), normal(B, L, D, seed=3)))
    teacher = Outputs(normal(B, L, V, seed=4, scale=2), (normal(B, L, D, seed=5), normal(B, L, D, seed=6)))
    return student, teacher, torch.randint(V, (B, L), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True, params=[1 << 24, V], ids=["whole", "position-by-position"])
def chunk(request, monkeypatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK", request.param)


def value(objective, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
    return objective.preprocess(teacher)(student, teacher, tokens)


def close(loss: Tensor, expected: Tensor) -> None:
    assert loss.dtype == torch.float32 and loss.ndim == 0
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-7)


# --- references in fp64 ---------------------------------------------------------------------------------------------


def kl_rows(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    q, p = ((x.double() / temperature).softmax(-1) for x in (student, teacher))
    return (p * (p.log() - q.log())).sum(-1)  # [B, L]


def ce_rows(student: Tensor, tokens: Tensor) -> Tensor:
    q = student.double().softmax(-1)[:, :-1]
    return -q.gather(2, tokens[:, 1:, None]).log()


def test_cross_entropy(pair):
    student, _, tokens = pair
    close(value(CrossEntropy(), student, None, tokens), ce_rows(student.logits, tokens).mean())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl(pair, temperature):
    student, teacher, tokens = pair
    expected = temperature**2 * kl_rows(student.logits, teacher.logits, temperature).mean()
    close(value(KL(temperature=temperature), student, teacher, tokens), expected)


@pytest.mark.parametrize("gamma", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("base", ["kl", "ce"])
@pytest.mark.parametrize("ambiguity", ["teacher", "cross"])
def test_dad(pair, gamma, base, ambiguity):
    student, teacher, tokens = pair
    rows = kl_rows(student.logits, teacher.logits)
    p = teacher.logits.double().softmax(-1)
    U = -(p * (p if ambiguity == "teacher" else student.logits.double().softmax(-1)).log()).sum(-1)
    expected = (rows if base == "kl" else ce_rows(student.logits, tokens)).mean()
    expected = expected + 0.3 * ((U / U.mean()) ** gamma * rows).mean()
    objective = DAD(gamma=gamma, base=base, ambiguity=ambiguity, weight=0.3)
    close(value(objective, student, teacher, tokens), expected)


def test_direction(pair):
    student, teacher, tokens = pair
    cosines = []
    for s, t in zip(student.hidden, teacher.hidden, strict=True):
        for i in range(B):
            a, b = (
                torch.stack([h[j] @ h[k] for j in range(1, 5) for k in range(1, j + 1)])
                for h in (s[i].double(), t[i].double())
            )  # fmt: skip
            cosines.append(a @ b / (a.norm() * b.norm()))
    expected = kl_rows(student.logits, teacher.logits).mean() + 0.5 * (1 - torch.stack(cosines)).mean()
    close(value(Direction(weight=0.5, window=4), student, teacher, tokens), expected)


def test_lowrank(pair):
    """Against an exact PCA of the clipped teacher tokens; three power iterations have converged on a clear gap."""
    student, teacher, tokens = pair
    spread = torch.tensor([5.0, 3, 0.3, 0.1, 0.1, 0.01, 0.01, 0.01])
    teacher = Outputs(teacher.logits, tuple(h * spread for h in teacher.hidden))
    terms = []
    for s, t in zip(student.hidden, teacher.hidden, strict=True):
        s, t = s[:, 1:].double().flatten(0, 1), t[:, 1:].double().flatten(0, 1)
        limit = t.norm(dim=1).sort().values[int(0.999 * len(t)) - 1]
        factor = (limit / t.norm(dim=1)).clamp(max=1)[:, None]
        s, t = s * factor, t * factor
        basis = torch.linalg.svd(t - t.mean(0)).Vh[:2].T
        terms.append(((s - t) @ basis).square().sum() / (t @ basis).square().sum())
    expected = kl_rows(student.logits, teacher.logits).mean() + 0.2 * torch.stack(terms).mean()
    loss = value(LowRank(rank=0.25, weight=0.2), student, teacher, tokens)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_block_objectives():
    yq, y1, y2 = (normal(B, L, D, seed=s) for s in (1, 2, 3))
    a, b, c = (y.double().flatten(0, 1) for y in (yq, y1, y2))

    def mse(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean()

    def nlc(x: Tensor, y: Tensor) -> Tensor:
        return -((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean().abs().log()

    close(MSE()(yq, y1, y2), mse(a, b) + mse(a, c))
    close(MSE()(yq, y1), mse(a, b))
    close(MSE(normalise=True)(yq, y1, y2), mse(a, b) / b.square().mean() + mse(a, c) / c.square().mean())
    close(MSENLC()(yq, y1, y2), mse(a, b) + mse(a, c) + nlc(a, b) + nlc(a, c))
    close(MSENLC()(yq, y1), mse(a, b) + nlc(a, b))
    close(MSENLC()(-y1, y1), 4 * b.square().mean())  # the logarithm is of the absolute mean


# --- what must hold whatever the values -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [KL(), KL(temperature=3), DAD(), DAD(ambiguity="cross"), Direction(), LowRank()])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(pair, objective):
    _, teacher, tokens = pair
    student = Outputs(*(t.clone().requires_grad_() for t in teacher[:1]), teacher.hidden)
    loss = value(objective, student, teacher, tokens)
    if isinstance(objective, Direction):
        assert abs(loss.item()) < 1e-6  # a cosine is rounded
    else:
        assert loss.item() == 0
    loss.backward()
    assert student.logits.grad.abs().max() < 1e-8  # p - q in fp32


def test_gamma_zero_is_plain_distillation(pair):
    plain = value(KL(), *pair)
    torch.testing.assert_close(value(DAD(gamma=0, weight=1), *pair), 2 * plain)
    torch.testing.assert_close(value(DAD(gamma=0.5, weight=0), *pair), plain)


def test_uncertain_positions_weigh_more():
    """A flat and a peaked teacher."""
    teacher = torch.zeros(1, 2, V)
    teacher[0, 1, 0] = 12
    student = torch.zeros(1, 2, V).index_put(
        (torch.tensor(0), torch.tensor([0, 1]), torch.tensor([1, 1])), torch.tensor(3.0)
    )
    student[0, 1, 0] = 12
    student.requires_grad_()
    weighted, plain = (
        torch.autograd.grad(value(o, Outputs(student), Outputs(teacher), torch.zeros(1, 2, dtype=torch.long)), student)[
            0
        ]
        for o in (DAD(gamma=1), DAD(gamma=0))
    )
    assert weighted[0, 0].norm() > plain[0, 0].norm() and weighted[0, 1].norm() < plain[0, 1].norm()


def test_a_certain_teacher_gives_no_nan(pair):
    """Entropy 0 everywhere: 0 / 0 in the weights."""
    student, _, tokens = pair
    teacher = Outputs(torch.full((B, L, V), -200.0).scatter(2, tokens[..., None], 200.0))
    for objective in (DAD(gamma=0.5), DAD(gamma=1, ambiguity="cross"), KL()):
        assert value(objective, student, teacher, tokens).isfinite()


def test_similarity_ignores_rotation_and_size(pair):
    student, teacher, _ = pair
    rotation = torch.linalg.qr(normal(D, D, seed=9)).Q
    turned = Outputs(student.logits, tuple(7 * (h @ rotation) for h in student.hidden))
    close(Direction().term(turned, teacher), Direction().term(student, teacher).double())
    same = Outputs(teacher.logits, tuple(1e-3 * (h @ rotation) for h in teacher.hidden))
    assert Direction().term(same, teacher).abs() < 1e-6
    assert Direction().term(student, teacher) > 1e-2


def test_similarity_leaves_the_first_token_and_the_far_ones_out(pair):
    student, teacher, _ = pair
    poisoned = tuple(h.clone() for h in student.hidden)
    for h in poisoned:
        h[:, 0] = 1e4
        h[:, 5:] = -1e4
    assert torch.equal(
        Direction(window=4).term(Outputs(student.logits, poisoned), teacher), Direction(window=4).term(student, teacher)
    )  # fmt: skip


def test_similarity_takes_heads(pair):
    """[batch, heads, length, d]: each head on its own."""
    _, teacher, _ = pair
    heads = [h.view(B, L, 2, D // 2).transpose(1, 2) for h in teacher.hidden]
    scaled = [h * torch.tensor([1.0, 50.0])[:, None, None] for h in heads]
    assert Direction().term(Outputs(teacher.logits, tuple(scaled)), Outputs(teacher.logits, tuple(heads))).abs() < 1e-6


def test_a_massive_token_does_not_take_the_directions():
    """One token a thousand times the others: without the limit it would be the first direction, and alone count."""
    teacher = normal(4, 300, D, seed=1) * torch.tensor([3.0, 2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    massive = teacher.clone()
    massive[0, 0] = massive[2, 10] = 1e4 * torch.eye(D)[7]
    plain, robust = (LowRank().preprocess(Outputs(torch.empty(0), (h,))).bases[0] for h in (teacher, massive))
    assert robust.V.shape == (D, 2)
    # cosines of the angles between the planes
    assert torch.linalg.svdvals(plain.V.T @ robust.V).min() > 0.99


def test_full_rank_is_the_relative_squared_error():
    s, t = normal(B, L, D, seed=1), normal(B, L, D, seed=2)
    t = t / t.norm(dim=-1, keepdim=True)  # no token above the limit
    loss = LowRank(rank=1).preprocess(Outputs(torch.empty(0), (t,)))
    error = (s - t)[:, 1:].double().square().sum() / t[:, 1:].double().square().sum()
    torch.testing.assert_close(loss.term(Outputs(s, (s,)), Outputs(t, (t,))).double(), error, rtol=1e-5, atol=0)


def test_the_directions_are_the_same_each_time_and_touch_no_global_state(pair):
    before = torch.random.get_rng_state()
    first, again = (LowRank().preprocess(pair[1]).bases for _ in range(2))
    assert all(torch.equal(a.V, b.V) for a, b in zip(first, again, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [CrossEntropy(), KL(), KL(temperature=2), DAD(), DAD(base="ce"), Direction(window=4), LowRank()],
)
def test_gradients_against_differences(pair, objective):
    """Along a random direction of everything that the objective looks at."""
    student, teacher, tokens = pair
    loss = objective.preprocess(teacher)
    points = [student.logits, *student.hidden] if objective.needs_hidden else [student.logits]
    directions = [normal(*t.shape, seed=20 + i) for i, t in enumerate(points)]

    def at(points: list[Tensor]) -> Tensor:
        return loss(Outputs(points[0], tuple(points[1:])), teacher, tokens)

    leaves = [t.clone().requires_grad_() for t in points]
    at(leaves).backward()
    slope = sum((leaf.grad * d).sum().item() for leaf, d in zip(leaves, directions, strict=True))
    step = 1e-2
    ahead, behind = (at([t + h * d for t, d in zip(points, directions, strict=True)]) for h in (step, -step))
    assert slope == pytest.approx((ahead - behind).item() / (2 * step), rel=1e-2, abs=1e-4)


def test_no_gradient_reaches_the_teacher_or_the_weights_of_positions(pair):
    student, teacher, tokens = pair
    leaf = student.logits.clone().requires_grad_()
    value(DAD(gamma=1, ambiguity="cross", weight=1, base="kl"), Outputs(leaf), teacher, tokens).backward()
    rows = kl_rows(student.logits, teacher.logits)
    p, q = teacher.logits.double().softmax(-1), student.logits.double().softmax(-1)
    U = -(p * q.log()).sum(-1)
    expected = (1 + U / U.mean())[..., None] * (q - p) / rows.numel()
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_half_precision_outputs_are_compared_in_fp32(pair):
    *both, tokens = pair
    student, teacher = (Outputs(x.logits.bfloat16(), tuple(h.bfloat16() for h in x.hidden)) for x in both)
    exact = [Outputs(x.logits.float(), tuple(h.float() for h in x.hidden)) for x in (student, teacher)]
    for objective in (CrossEntropy(), KL(), DAD(), Direction(), LowRank()):
        assert torch.equal(value(objective, student, teacher, tokens), value(objective, *exact, tokens))
    y = student.hidden[0], teacher.hidden[0]
    for objective in (MSE(), MSENLC()):
        assert torch.equal(objective(*y), objective(*(t.float() for t in y)))


# --- recipes --------------------------------------------------------------------------------------------------------


def test_recipes_name_objectives_by_kind():
    for kind, cls in {**OBJECTIVES, **BLOCK_OBJECTIVES}.items():
        assert cls().kind == kind
        assert TypeAdapter(cls).validate_python({"kind": kind}) == cls()
    assert TypeAdapter(DAD).validate_python({"kind": "dad", "gamma": 0.5}).gamma == 0.5
    for cls, wrong in (
        (KL, {"temperature": 0}),
        (DAD, {"gama": 1}),
        (LowRank, {"rank": 2}),
        (Direction, {"base": "x"}),
    ):
        with pytest.raises(ValidationError):
            TypeAdapter(cls).validate_python(wrong)


def test_what_an_objective_looks_at():
    assert {k: (c().needs_teacher, c().needs_hidden) for k, c in OBJECTIVES.items()} == {
        "ce": (False, False), "kl": (True, False), "dad": (True, False), "direction": (True, True),
        "lowrank": (True, True),
    }  # fmt: skip
    outputs = Outputs(torch.zeros(1, 2, V))
    with pytest.raises(ValueError, match="hidden states"):
        Direction().term(outputs, outputs)
