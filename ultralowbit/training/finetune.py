"""Fine-tuning: a packed model is trained end to end, with the original as a frozen teacher or on the next token alone.

Teacher and student share everything but the packed Linears: the whole model is in memory once, beside the gradients and
two moments of what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ultralowbit.format.weight import PackedWeight
from ultralowbit.progress import Progress
from ultralowbit.training.blockwise import fake_quantized
from ultralowbit.training.fake_quant.linear import parameter_groups, set_progress
from ultralowbit.training.loop import Fitted, fit
from ultralowbit.training.objectives import Outputs
from ultralowbit.training.specs import Finetune

SEEN = 8
"""Windows whose hidden states in the teacher an objective sees before training."""


def finetune(
    folder: Path,
    weights: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    tokens: Tensor,
    spec: Finetune,
    state: Path,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[dict[str, PackedWeight], Fitted]:
    """Train the packed Linears of the model in `folder` on tokens [windows, length] and return those that are better
    for it, with how the training went.

    weights: what latent weights start from, by Linear; state: the file that a killed run goes on from.
    """
    teacher = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    teacher.to(device).eval().requires_grad_(False)
    shared = {id(t): t for t in (*teacher.parameters(), *teacher.buffers())}
    student = deepcopy(teacher, memo=shared)
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

    with fake_quantized(student, packed, weights, spec) as linears:
        fitted = fit(
            parameter_groups(student), loss, spec.training, len(training), evaluate, state=state, progress=progress,
            what="fine-tuning", on_progress=lambda share: set_progress(student, share),
        )  # fmt: skip
        return {name: linear.pack() for name, linear in linears.items()} if fitted.accepted else {}, fitted
