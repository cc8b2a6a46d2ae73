"""Less memory, the same numbers: to the last bit."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from ultralowbit.format.ints import Ints
from ultralowbit.format.testing import random_packed
from ultralowbit.format.weight import Format
from ultralowbit.training import memory
from ultralowbit.training.finetune import teacher_and_student
from ultralowbit.training.memory import checkpoint_blocks, compute_in_fp32

TOKENS = torch.arange(24).reshape(2, 12)


def model(tied: bool = True, dtype: torch.dtype = torch.bfloat16):
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_computes_in_fp32_with_what_is_stored(tied, dtype):
    stored = model(tied, dtype)
    exact = deepcopy(stored).float()
    nbytes = sum(p.nbytes for p in stored.parameters())
    compute_in_fp32(stored)
    assert sum(p.nbytes for p in stored.parameters()) == nbytes
    logits = stored(TOKENS).logits
    assert logits.dtype == torch.float32 and torch.equal(logits, exact(TOKENS).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_student_computes_with_the_packed_embedding_and_shares_all_else(tied, dtype):
    stored, packed = model(tied, dtype), random_packed(Format((Ints(64, 4),)), 96)
    before, expected = deepcopy(stored).float(), deepcopy(stored)
    rows = packed.dequantize(dtype)
    expected.model.embed_tokens.weight = torch.nn.Parameter(rows)
    expected.tie_weights()
    teacher, student = teacher_and_student(stored, {"model.embed_tokens": packed})
    assert torch.equal(teacher(TOKENS).logits, before(TOKENS).logits)
    assert torch.equal(student(TOKENS).logits, expected.float()(TOKENS).logits)
    assert torch.equal(student.lm_head.weight, rows.float()) == tied
    shared = {p.data_ptr() for p in teacher.parameters()}
    assert [p.shape for p in student.parameters() if p.data_ptr() not in shared] == [rows.shape]


def test_autocast_multiplies_by_what_is_stored(monkeypatch):
    """To the bit as by what is made fp32 and then rounded again."""
    stored = model()
    compute_in_fp32(stored)
    with torch.autocast("cpu", torch.bfloat16):
        logits = stored(TOKENS).logits
        assert stored.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert stored.model.norm.weight.dtype == torch.float32
        monkeypatch.setattr(memory.InFp32, "forward", lambda _, p: p.float())
        assert torch.equal(stored(TOKENS).logits, logits)


def test_checkpointed_blocks_have_the_same_gradients(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "checkpoint", lambda f, *a, **k: calls.append(f) or checkpoint(f, *a, **k))
    plain, again = (model(dtype=torch.float32).requires_grad_(True) for _ in range(2))
    checkpoint_blocks(again)
    outputs = [m(TOKENS, output_hidden_states=True, use_cache=False) for m in (plain, again)]
    assert len(calls) == plain.config.num_hidden_layers
    assert len(outputs[1].hidden_states) == len(outputs[0].hidden_states)
    for output in outputs:
        (output.logits.logsumexp(-1).sum() + output.hidden_states[1].square().sum()).backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_checkpointed_blocks_draw_the_same_numbers_again():
    """Gradients where each block drops some of what enters it, with masks from a generator of its own."""

    def gradients(checkpointed: bool) -> tuple[list[Tensor], Tensor]:
        dropped, generator = model(dtype=torch.float32).requires_grad_(True), torch.Generator().manual_seed(3)
        if checkpointed:
            checkpoint_blocks(dropped, generator)
        for layer in dropped.model.layers:
            layer.mlp.register_forward_pre_hook(
                lambda _, x: (x[0] * (torch.rand(x[0].shape, generator=generator) > 0.3),)
            )
        dropped(TOKENS, use_cache=False).logits.logsumexp(-1).sum().backward()
        return [p.grad for p in dropped.parameters()], generator.get_state()

    (plain, state), (again, same_state) = gradients(False), gradients(True)
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))
    assert torch.equal(state, same_state)
