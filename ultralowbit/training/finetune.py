"""Fine-tuning: a packed model is trained end to end, with the original as a frozen teacher or on the next token alone.

Teacher and student share everything but the packed Linears: the model is in memory once, in the dtype in which it is
stored, beside what is trained with its gradients and moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ultralowbit.checkpoint.files import Source
from ultralowbit.format.weight import PackedWeight
from ultralowbit.progress import Progress
from ultralowbit.training.blockwise import fake_quantized
from ultralowbit.training.fake_quant.linear import parameter_groups, set_progress
from ultralowbit.training.loop import Fitted, fit
from ultralowbit.training.memory import checkpoint_blocks, compute_in_fp32
from ultralowbit.training.objectives import Outputs
from ultralowbit.training.specs import Finetune

SEEN = 8
"""Windows whose hidden states in the teacher an objective sees before training."""


def finetune(
    folder: Path,
    weight: Callable[[str], Tensor],
    packed: Mapping[str, PackedWeight],
    outside: Mapping[str, PackedWeight],
    tokens: Tensor,
    spec: Finetune,
    state: Path,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[dict[str, PackedWeight], Fitted]:
    """Train the packed Linears of the model in `folder` on tokens [windows, length] and return those that are better
    for it, with how the training went.

    weight: reads what the latent weight of a Linear starts from; outside: the packed embedding and head, with which the
    student computes and which stay as they are; state: the file that a killed run goes on from.
    """
    teacher = _teacher(folder, device, trust_remote_code)
    shared = {id(t): t for t in (*teacher.parameters(), *teacher.buffers())}
    student = deepcopy(teacher, memo=shared)
    for name, p in outside.items():
        _replace_weight(student, student.get_submodule(name).weight, p.dequantize)
    if spec.is_checkpointed(sum(math.prod(p.shape) for p in packed.values())):
        checkpoint_blocks(student)
    training, held_out = spec.split(range(len(tokens)))

    def run(model: PreTrainedModel, batch: Tensor) -> Outputs:
        output = model(batch, use_cache=False, output_hidden_states=spec.objective.needs_hidden)
        return Outputs(output.logits, output.hidden_states or ())

    @torch.no_grad()
    def teach(batch: Tensor) -> Outputs | None:
        return run(teacher, batch) if spec.objective.needs_teacher else None

    tokens = tokens.to(device)
    objective = spec.objective.preprocess(teach(tokens[:SEEN]) if spec.objective.needs_hidden else None)

    def loss(indices: Sequence[int]) -> Tensor:
        batch = tokens[list(indices)]
        return objective(run(student, batch), teach(batch), batch)

    @torch.no_grad()
    def evaluate() -> float:
        return sum(loss([k]).item() for k in held_out) / len(held_out)

    with fake_quantized(student, packed, weight, spec) as linears:
        fitted = fit(
            parameter_groups(student), loss, spec.training, len(training), evaluate, state=state, progress=progress,
            what="fine-tuning", on_progress=lambda share: set_progress(student, share),
        )  # fmt: skip
        return {name: linear.pack() for name, linear in linears.items()} if fitted.accepted else {}, fitted


def _replace_weight(model: PreTrainedModel, weight: nn.Parameter, dense: Callable[[torch.dtype], Tensor]) -> None:
    """Put what `dense` makes in the dtype of a weight into every module that has this very weight."""
    value = nn.Parameter(dense(weight.dtype).to(weight.device), requires_grad=False)
    for module in model.modules():
        if getattr(module, "weight", None) is weight:
            module.weight = value


def _teacher(folder: Path, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    """The model in `folder`, with its weights in the dtype of the files; it computes in fp32."""
    dtypes = {spec.dtype for spec in Source(folder).specs.values() if spec.dtype and spec.dtype.is_floating_point}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    compute_in_fp32(teacher)
    return teacher.to(device).eval().requires_grad_(False)
