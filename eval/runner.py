"""Perplexity and fidelity of checkpoints, packed or not, on texts by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ultralowbit.checkpoint.config import QUANT_METHOD, read_config_json
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.data.corpora import read_text, token_sha256
from ultralowbit.errors import CheckpointError, InputError, reason
from ultralowbit.eval.fidelity import Depth, Fidelity, by_depth, observe, recorded
from ultralowbit.eval.perplexity import Bos, Perplexity, cut, perplexity, token_stream
from ultralowbit.hub import open_tokenizer
from ultralowbit.nn.decoder import find_blocks
from ultralowbit.nn.hf import load
from ultralowbit.system import available_memory, release
from ultralowbit.units import format_bytes

DEFAULT_CONTEXT = 2048


DEPTH_TOKENS = 512
"""On which the divergence by depth is measured, since every block costs a forward pass."""


@dataclass(frozen=True, eq=False)
class EvalText:
    """A text as one tokenizer sees it: tokens [n], whole windows of `context`; `sha256` is that of its windows."""

    source: str
    tokens: Tensor
    context: int
    bos: Bos

    @property
    def sha256(self) -> str:
        return token_sha256(self.tokens.view(-1, self.context))


def read_texts(
    folder: Path,
    sources: Iterable[str],
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    bos: Bos = "text",
    trust_remote_code: bool = False,
) -> list[EvalText]:
    """The test splits of the sources in the tokens of the checkpoint `folder`, of each the first `max_tokens`.

    `context` is 2048, or the model's positions if those are fewer. Raises `InputError` for a source that cannot be
    read or is shorter than a window: before anything heavy has begun.
    """
    config = read_config_json(folder)
    positions = (config.get("text_config") or config).get("max_position_embeddings") or context or DEFAULT_CONTEXT
    context = context or min(DEFAULT_CONTEXT, positions)
    if not 2 <= context <= positions:
        raise InputError(f"--context is {context}, the model takes 2 to {positions} tokens")
    tokenizer = open_tokenizer(folder, trust_remote_code)
    texts = []
    for source in dict.fromkeys(sources):
        tokens = token_stream(tokenizer, read_text(source, "test").text, bos=bos)[:max_tokens]
        if len(tokens) < context:
            raise InputError(
                f"{source!r} gives {len(tokens)} tokens to measure perplexity on, expected at least one window of "
                f"{context}: choose a smaller --context or a longer text"
            )
        texts.append(EvalText(source, tokens[: len(tokens) // context * context], context, bos))
    return texts


def is_packed(folder: Path) -> bool:
    """Whether the checkpoint folder is one that `compress` wrote."""
    return (read_config_json(folder).get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def pick_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """What a checkpoint is measured in: fp32 on a CPU, where all else is slow, and as it was stored elsewhere."""
    if device.type == "cpu":
        return torch.float32
    config = read_config_json(folder)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, name)


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    int8: bool = False,
    fuse: bool = False,
) -> PreTrainedModel:
    """A checkpoint on the device, packed or not; raises `CheckpointError` if a weight of it is missing. `int8` lets
    packed Linears round their inputs to 8 bits, `fuse` multiplies those that share an input at once."""
    if is_packed(folder):
        activations = "int8" if int8 else "exact"
        return load(folder, activations, fuse, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as e:
        raise InputError(f"transformers cannot load {folder} ({reason(e)}): check the folder") from e
    if found["missing_keys"]:
        raise CheckpointError(f"{folder} holds no tensor for {sorted(found['missing_keys'])[0]}: download it again")
    return model.to(device).eval()


def too_large(folders: Iterable[tuple[Path, torch.dtype]], device: torch.device) -> str | None:
    """Why checkpoints should not be loaded together in these dtypes, in words; None if there is room for them."""
    need = round(1.1 * sum(_in_memory(folder, dtype) for folder, dtype in folders))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return None if need <= free else f"needs {format_bytes(need)} of memory, {format_bytes(free)} are free"


def _in_memory(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights: packed ones as they are stored, all others in `dtype`."""
    size = measure_size(folder)
    return size.linear_bytes + size.other_weights * dtype.itemsize


def unknown(texts: Sequence[EvalText], dtype: torch.dtype, known: Iterable[Perplexity]) -> list[EvalText]:
    """The texts that `known` has no perplexity on: of the same tokens and in the same dtype."""
    there = {_key(p, p.dtype) for p in known}
    return [text for text in texts if _key(text, str(dtype).removeprefix("torch.")) not in there]


def _key(measured: EvalText | Perplexity, dtype: str) -> tuple[str, ...]:
    return measured.source, measured.sha256, measured.bos, dtype


def measure_perplexity(
    folder: Path,
    texts: Sequence[EvalText],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    known: Sequence[Perplexity] = (),
    trust_remote_code: bool = False,
    progress: Callable[[str], Callable[[int, int], object]] | None = None,
) -> list[Perplexity]:
    """Perplexity on each text. What `known` holds of the same tokens and dtype is not measured again.

    `progress(what)` gives the callback for one text, called with the windows done and in all.
    """
    dtype = dtype or pick_dtype(folder, device)
    found = {_key(p, p.dtype): p for p in known}
    missing = unknown(texts, dtype, known)
    if missing:
        model = open_model(folder, device, dtype, trust_remote_code)
        for text in missing:
            watch = progress(f"perplexity on {text.source}") if progress else None
            result = perplexity(
                model, text.tokens, context=text.context, source=text.source, bos=text.bos, progress=watch
            )
            found[_key(result, result.dtype)] = result
        del model
        release(device)
    return [found[_key(text, str(dtype).removeprefix("torch."))] for text in texts]


@dataclass(frozen=True)
class Compared:
    """What one pass over each text showed: of the original, of itself in another precision, and of each model."""

    base: list[Perplexity]
    floor: list[Fidelity]
    """Empty unless asked for."""
    models: list[tuple[list[Perplexity], list[Fidelity]]]


def measure_divergence(
    base: Path,
    models: Sequence[Path],
    texts: Sequence[EvalText],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    floor: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], Callable[[int, int], object]] | None = None,
) -> Compared:
    """Perplexity of an original and of models made from it, and their fidelity to it, each run once over each text.

    All run side by side if they fit into memory together; otherwise one after another, the original's predictions
    being kept in a temporary file. `floor` adds the original in bf16, or in fp32 where that is not what it is measured
    in. `texts` are in the tokens of all of them, see `check_comparable`.
    """
    dtype = dtype or pick_dtype(base, device)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    loads = [(base, other)] * floor + [(folder, dtype) for folder in models]
    together = too_large([(base, dtype), *loads], device) is None

    def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return open_model(folder, device, dtype, trust_remote_code)

    def stage(what: str) -> Callable[[int, int], object] | None:
        return progress(what) if progress else None

    with ExitStack() as files:
        original = load(base, dtype)
        if together:
            references, groups = [original] * len(texts), [loads]
        else:
            kept = (
                recorded(original, cut(text.tokens, text.context), progress=stage(f"original on {text.source}"))
                for text in texts
            )
            references, groups = [files.enter_context(each) for each in kept], [[each] for each in loads]
        del original
        found: list[tuple[list[Perplexity], list[Fidelity]]] = []
        for group in groups:
            release(device)
            opened = [load(*each) for each in group]
            rows = [
                observe(
                    reference, opened, text.tokens, context=text.context, source=text.source, bos=text.bos,
                    progress=stage(f"perplexity and divergence on {text.source}"),
                )
                for reference, text in zip(references, texts, strict=True)
            ]  # fmt: skip
            found += [([p[i + 1] for p, _ in rows], [f[i] for _, f in rows]) for i in range(len(group))]
            del opened
        del references
    release(device)
    return Compared([p[0] for p, _ in rows], found[0][1] if floor else [], found[floor:])


def depth(
    base: Path,
    model: Path,
    text: EvalText,
    device: torch.device,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Depth:
    """How the divergence of a model from the original builds up along the blocks, on the beginning of a text. Both are
    in memory together."""
    nets = [open_model(folder, device, dtype, trust_remote_code) for folder in (base, model)]
    blocks, others = (find_blocks(net, net.config)[1] for net in nets)
    windows = cut(text.tokens[:DEPTH_TOKENS], min(text.context, DEPTH_TOKENS))
    found = by_depth(nets[0], blocks, others, windows, source=text.source, progress=progress)
    del nets, blocks, others
    release(device)
    return found


def check_comparable(base: str, texts: Sequence[EvalText], model: str, others: Sequence[EvalText]) -> None:
    """Raise `InputError` unless a model and the original it is compared with see the same texts in the same tokens."""
    for text, other in zip(texts, others, strict=True):
        if text.context != other.context:
            raise InputError(
                f"{model} reads windows of {other.context} tokens and {base} of {text.context}: give both the same "
                "--context"
            )
        if text.sha256 != other.sha256:
            raise InputError(
                f"{model} cannot be compared with {base}, because their tokenizers cut {text.source!r} into different "
                "tokens: give --fidelity the original that it was made from"
            )
