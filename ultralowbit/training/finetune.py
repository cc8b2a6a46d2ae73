"""Fine-tuning: a packed model is trained end to end, with the original as a frozen teacher or on the next token alone.

Teacher and student share everything but the packed Linears: the model is in memory once, in the dtype in which it is
stored, beside what is trained with its gradients and moments. Several processes share these (shards.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ultralowbit.format.weight import PackedWeight
from ultralowbit.nn.decoder import find_blocks
from ultralowbit.progress import Progress
from ultralowbit.training.blockwise import fake_quantized
from ultralowbit.training.fake_quant.linear import FakeQuantLinear, level_distances, parameter_groups, set_progress
from ultralowbit.training.loop import Fitted, fit
from ultralowbit.training.memory import checkpoint_blocks, compute_in_fp32
from ultralowbit.training.objectives import Outputs
from ultralowbit.training.plain import Own, make_trainable
from ultralowbit.training.shards import Shards, whole
from ultralowbit.training.specs import Finetune

SEEN = 8
"""Windows whose hidden states in the teacher an objective sees before training."""


def finetune(
    folder: Path,
    dtype: torch.dtype,
    change: Callable[[PreTrainedModel], object],
    weight: Callable[[str], Tensor],
    packed: Mapping[str, PackedWeight],
    outside: Mapping[str, PackedWeight],
    tokens: Tensor,
    spec: Finetune,
    state: Path,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
    shards: Shards,
) -> tuple[dict[str, PackedWeight], dict[str, Tensor], Fitted]:
    """Train the packed Linears of the model in `folder`, held in `dtype`, and its norms and biases where the spec says
    so, on tokens [windows, length]; return those that are better for it, by their names, with how the training went.

    change: done to that model once it is loaded; weight: reads what the latent weight of a Linear starts from; outside:
    the packed embedding and head that the student computes with, which stay as they are; state: the file that a killed
    run goes on from; shards: the ranks that train together and call this alike, which all get the result."""
    progress.start("models to fine-tune", len(packed))
    teacher, student = teacher_and_student(_original(folder, dtype, change, device, trust_remote_code), outside)
    if spec.is_checkpointed(sum(math.prod(p.shape) for p in packed.values())):
        checkpoint_blocks(student)
    training, held_out, notes = spec.windows(tokens, device)
    run = partial(_outputs, hidden=spec.objective.needs_hidden)

    @torch.no_grad()
    def teach(batch: Tensor) -> Outputs | None:
        return run(teacher, batch) if spec.objective.needs_teacher else None

    objective = spec.objective.preprocess(teach(training[:SEEN]) if spec.objective.needs_hidden else None)

    def loss(batch: Tensor) -> Tensor:
        return objective(run(student, batch), teach(batch), batch)

    @torch.no_grad()
    def evaluate() -> float:
        return sum(shards.map(lambda k: loss(held_out[[k]]).item(), range(len(held_out)))) / len(held_out)

    units, plain = _units(student, packed), make_trainable(student, spec.training.lr)
    last = {names[-1]: unit for unit, names in units.items() if unit}

    def ready(name: str) -> None:
        progress.step()
        if name in last:
            shards.shard(student.get_submodule(last[name]))

    with fake_quantized(student, packed, weight, spec, ready) as linears:
        shards.shard(student)
        fitted = fit(
            _groups(student, plain), lambda rows: loss(training[rows]), spec.training, len(training), evaluate,
            state=state, progress=progress, what="fine-tuning",
            on_progress=lambda share: set_progress(student, share), sizes=level_distances(student), shards=shards,
        )  # fmt: skip
        fitted = replace(fitted, notes=notes + fitted.notes)
        if not fitted.accepted:
            return {}, {}, fitted
        return _packed(student, units, linears), {name: own.stored for name, own in plain.items()}, fitted


def _outputs(model: PreTrainedModel, batch: Tensor, hidden: bool) -> Outputs:
    output = model(batch, use_cache=False, output_hidden_states=hidden)
    return Outputs(output.logits, output.hidden_states or ())


def _groups(student: PreTrainedModel, plain: Mapping[str, Own]) -> dict[str, list[nn.Parameter]]:
    """All parameters that are trained, by kind."""
    groups = parameter_groups(student)
    for own in plain.values():
        groups.setdefault(own.kind, []).append(own.parameter.requires_grad_())
    return groups


def _packed(
    student: PreTrainedModel, units: Mapping[str, list[str]], linears: Mapping[str, FakeQuantLinear]
) -> dict[str, PackedWeight]:
    """What was trained, on every rank; one unit's latent weights are whole at a time."""
    packed = {}
    for unit, names in units.items():
        with whole(student.get_submodule(unit)):
            packed |= {name: linears[name].pack() for name in names if name in linears}
    return packed


def _units(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """The name of each block -> the named Linears in it; those outside blocks under the model's own name, ""."""
    blocks_name, blocks = find_blocks(model, model.config)
    prefixes = [f"{blocks_name}.{i}" for i in range(len(blocks))]
    units: dict[str, list[str]] = {}
    for name in names:
        unit = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), "")
        units.setdefault(unit, []).append(name)
    return units


def teacher_and_student(
    original: PreTrainedModel, outside: Mapping[str, PackedWeight]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The original, and a model that shares its tensors but for the packed embedding and head; both compute in fp32."""
    student = deepcopy(original, memo={id(t): t for t in (*original.parameters(), *original.buffers())})
    for name, p in outside.items():
        _replace_weight(student, student.get_submodule(name).weight, p.dequantize)
    for model in (original, student):  # after that: from then on a weight is another tensor at every use
        compute_in_fp32(model)
    return original, student


def _replace_weight(model: PreTrainedModel, weight: nn.Parameter, dense: Callable[[torch.dtype], Tensor]) -> None:
    """Put what `dense` makes in the dtype of a weight into every module that has this very weight."""
    value = nn.Parameter(dense(weight.dtype).to(weight.device), requires_grad=False)
    for module in model.modules():
        if getattr(module, "weight", None) is weight:
            module.weight = value


def _original(
    folder: Path, dtype: torch.dtype, change: Callable[[PreTrainedModel], object], device: torch.device,
    trust_remote_code: bool,
) -> PreTrainedModel:  # fmt: skip
    """The changed model in `folder`, with its weights in a dtype."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    change(model)
    return model.to(device).eval().requires_grad_(False)
