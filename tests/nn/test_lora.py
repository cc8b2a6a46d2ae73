"""Adapters of peft on packed models: they train, the packed weights stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import ultralowbit
from ultralowbit.errors import InputError
from ultralowbit.nn.linear import PackedLinear
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

peft = pytest.importorskip("peft")

IDS = torch.arange(4, 20)[None]
LLAMA = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, save_model) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    rtn = Recipe.model_validate({"name": "rtn", "quantize": {"method": "rtn", "bits": 2, "group": 32}})
    made = {}
    for name, values in (("llama", LLAMA), ("gpt2", GPT2)):
        source = save_model(AutoConfig.for_model(name, **values), root / name)
        made[name] = compress(str(source), rtn, root / f"{name}-packed").folder
    return made


def lora(**values) -> peft.LoraConfig:
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4} | values))


@pytest.mark.parametrize("fuse", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"], "all-linear"], ids=["default", "names", "all"])
def test_an_adapter_trains_and_the_packed_weights_do_not(folders, targets, prepared, fuse):
    torch.manual_seed(0)
    model = ultralowbit.load(folders["llama"], fuse=fuse)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(IDS).logits
    if prepared:
        model = peft.prepare_model_for_kbit_training(model)
    adapted = peft.get_peft_model(model, lora(target_modules=targets))
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-5, atol=1e-5)  # B starts at zero
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    wanted = {None: {"q_proj", "v_proj"}, "all-linear": linears}.get(targets if isinstance(targets, str) else None)
    wanted = set(targets) if isinstance(targets, list) else wanted
    assert {name.split(".")[-4] for name in trained} == wanted
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {name.replace(".base_layer", ""): t for name, t in adapted.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_adapter_is_saved_and_loaded(folders, tmp_path):
    adapted = peft.get_peft_model(ultralowbit.load(folders["llama"]), lora(target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    expected = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(ultralowbit.load(folders["llama"]), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, expected)
    with again.disable_adapter():
        assert torch.equal(again(IDS).logits, ultralowbit.load(folders["llama"])(IDS).logits)


def test_a_conv1d_takes_an_adapter(folders):
    adapted = peft.get_peft_model(ultralowbit.load(folders["gpt2"]), lora(target_modules=["c_attn"]))
    adapted(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("values", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_what_needs_dense_weights_is_refused(folders, values):
    with pytest.raises(InputError, match="needs dense weights") as error:
        peft.get_peft_model(ultralowbit.load(folders["llama"]), lora(target_modules=["q_proj"], **values))
    assert "\n" not in str(error.value)


def test_merging_is_refused(folders):
    adapted = peft.get_peft_model(ultralowbit.load(folders["llama"]), lora(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="cannot be merged into packed weights"):
        adapted.merge_and_unload()
    assert any(isinstance(module, PackedLinear) for module in adapted.modules())
