"""Remake the demo checkpoint: `python -m ultralowbit.demo.train --out DIR` (about half an hour on two cores)."""

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultralowbit.data.python_docs import corpus, documents

END = "<|endoftext|>"
CHECKPOINT = Path(__file__).parent / "checkpoint"
MAX_POSITIONS = 512


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose one special token is never added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, end: int, seed: int) -> LlamaForCausalLM:
    """Build the untrained float32 model, leaving the global random state as it was."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():  # GPT-2's scaling of what writes to the residual stream
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=True, temperature=0.7, top_p=0.9
    )
    return model


def batches(stream: Tensor, steps: int, batch: int, length: int, seed: int) -> Iterable[Tensor]:
    """Yield steps batches [batch, length + 1]: each epoch cuts the stream [tokens] elsewhere and shuffles the cuts."""
    generator = torch.Generator().manual_seed(seed)
    made = 0
    while made < steps:
        start = int(torch.randint(length, (), generator=generator))
        windows = stream[start:].unfold(0, length + 1, length)
        for rows in torch.randperm(len(windows), generator=generator).split(batch):
            if len(rows) == batch and made < steps:
                made += 1
                yield windows[rows]


def next_token_loss(model: LlamaForCausalLM, windows: Tensor, bf16: bool) -> Tensor:
    """Return the mean cross-entropy of every token of windows [batch, length + 1] after the first."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: Tensor, length: int = 256, bf16: bool = False) -> float:
    """Return the mean loss over the whole windows of length tokens, each predicting length - 1, in tokens [count]."""
    training = model.training
    model.eval()
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [next_token_loss(model, part, bf16) * len(part) for part in windows.split(32)]
    model.train(training)
    return float(sum(losses)) / len(windows)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the rate of a step: a linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    fraction = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))


def train(model: LlamaForCausalLM, stream: Tensor, heldout: Tensor, args: argparse.Namespace) -> float:
    """Train on stream [tokens], leave the weights that did best on heldout [tokens], and return their loss."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    best, best_state, running, began = math.inf, model.state_dict(), 0.0, time.perf_counter()
    model.train()
    for step, windows in enumerate(batches(stream, args.steps, args.batch, args.length, args.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        loss = next_token_loss(model, windows, args.bf16)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            held = evaluate(model, heldout, bf16=args.bf16)
            if held < best:
                best, best_state = held, {name: value.clone() for name, value in model.state_dict().items()}
            seen = (step + 1) * args.batch * args.length
            seconds = time.perf_counter() - began
            print(
                f"step {step + 1}/{args.steps}  epoch {seen / len(stream):.1f}  train {running:.4f}  "
                f"heldout {held:.4f}  best {best:.4f}  {seen / seconds:.0f} tokens/s  {seconds / 60:.1f} min",
                flush=True,
            )
    model.load_state_dict(best_state)
    return best


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ultralowbit.demo.train",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write")
    parser.add_argument("--vocab", type=int, default=2048, help="tokens in the vocabulary")
    parser.add_argument("--steps", type=int, default=3200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--length", type=int, default=MAX_POSITIONS, help="tokens in a window")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="weight decay of AdamW, on matrices")
    parser.add_argument("--every", type=int, default=200, help="steps between held-out measurements")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="use bfloat16 autocast")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, and write both."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    texts = documents("train")
    tokenizer = train_tokenizer(texts, args.vocab)
    end = tokenizer.eos_token_id
    stream = torch.tensor([token for ids in tokenizer(list(texts))["input_ids"] for token in (*ids, end)])
    heldout = torch.tensor(tokenizer(corpus("heldout"))["input_ids"])
    model = build_model(len(tokenizer), end, args.seed)
    print(f"{len(stream)} train and {len(heldout)} heldout tokens, {model.num_parameters()} parameters", flush=True)

    train(model, stream, heldout, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)  # written for its owner alone, and packaged with that mode
    tokenizer.save_pretrained(args.out)
    model.float()  # the written weights' own losses, in float32 arithmetic
    for name, tokens in (("train", stream), ("heldout", heldout)):
        loss = evaluate(model, tokens)
        print(f"{name}: {len(tokens)} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.2f} at context 256")


if __name__ == "__main__":
    main()
