"""Metrics of checkpoints, packed or not, on texts by name: what is opened when, and what is in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ultralowbit.checkpoint.config import QUANT_METHOD, positions, read_config_json, vocabulary
from ultralowbit.checkpoint.size import measure_size
from ultralowbit.data.corpora import public_name, token_sha256
from ultralowbit.data.tokens import text_tokens
from ultralowbit.errors import CheckpointError, InputError, naming_memory, reason
from ultralowbit.eval.base import Bos, Measured, Result, without_original
from ultralowbit.eval.fidelity import Depth, by_depth, recorded
from ultralowbit.eval.metric import METRICS, by_metric
from ultralowbit.eval.windows import cut, framed, measure
from ultralowbit.hub import open_tokenizer
from ultralowbit.nn.decoder import find_blocks
from ultralowbit.nn.hf import load
from ultralowbit.nn.original import read_any_config
from ultralowbit.progress import OnProgress, Progress, Silent
from ultralowbit.system import available_memory, release
from ultralowbit.units import format_bytes

DEFAULT_CONTEXT = 2048


DEPTH_TOKENS = 512
"""On which the divergence by depth is measured, since every block costs a forward pass."""


@dataclass(frozen=True, eq=False)
class EvalText:
    """A text as one tokenizer sees it."""

    source: str
    """Its name, without the folders of this machine."""
    tokens: Tensor
    """int64 [n], whole windows of `context`."""
    context: int
    bos: Bos

    @cached_property
    def sha256(self) -> str:
        """Digest of the windows, see `token_sha256`."""
        return token_sha256(self.tokens.view(-1, self.context))


def read_texts(
    folder: Path,
    sources: Iterable[str],
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    bos: Bos = "text",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[EvalText]:
    """Read the test split of each source, or its first `max_tokens`, in the tokens of the checkpoint `folder`.

    `context` is 2048, or the model's positions if those are fewer. Raises `InputError` for a source that cannot be
    read, is shorter than a window, or has tokens that the model does not: before anything heavy has begun.
    """
    config = read_any_config(folder, trust_remote_code)
    known = vocabulary(config)
    most = positions(config) or context or DEFAULT_CONTEXT
    context = context or min(DEFAULT_CONTEXT, most)
    if not 2 <= context <= most:
        raise InputError(f"--context is {context}, the model takes 2 to {most} tokens")
    tokenizer = open_tokenizer(folder, trust_remote_code)
    texts: list[EvalText] = []
    for source in dict.fromkeys(sources):
        counter = progress.counter(f"tokens of {source}") if progress else None
        read = text_tokens(source, "test", tokenizer, most=max_tokens, progress=counter)
        tokens = framed(tokenizer, read, bos)[:max_tokens]
        if len(tokens) < context:
            raise InputError(
                f"{source!r} gives {len(tokens)} tokens to measure perplexity on, expected at least one window of "
                f"{context}: choose a smaller --context or a longer text"
            )
        if known and tokens.max() >= known:
            raise InputError(
                f"the tokenizer in {folder} makes token {int(tokens.max())} of {source!r}, but config.json says that "
                f"the model has {known} tokens: give a folder whose two belong together"
            )
        name, twins = public_name(source), [text.source for text in texts]
        number = sum(twin == name or twin.startswith(f"{name} (") for twin in twins)
        name = f"{name} ({number + 1})" if number else name
        texts.append(EvalText(name, tokens[: len(tokens) // context * context], context, bos))
    return texts


def is_packed(folder: Path) -> bool:
    """Whether the checkpoint folder is one that `compress` wrote."""
    quantization = read_config_json(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def pick_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """Pick the dtype to measure a checkpoint in: fp32 on a CPU, where all else is slow, elsewhere that of config.json.

    Raises `InputError` for a name there that is no floating-point dtype.
    """
    if device.type == "cpu":
        return torch.float32
    config = read_config_json(folder)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype in {folder / 'config.json'} is {name!r}, expected one such as bfloat16: give --dtype")
    return dtype


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    int8: bool = False,
    fuse: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint, packed or not, onto the device, in evaluation mode.

    `int8` lets packed Linears round their inputs to 8 bits; `fuse` multiplies those that share an input at once. Raises
    `InputError` where transformers cannot load it, `CheckpointError` if a weight is missing.
    """
    if is_packed(folder):
        activations = "int8" if int8 else "exact"
        return load(folder, activations, fuse, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    try:
        with naming_memory(f"loading {folder}"):
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, ImportError) as e:
        raise InputError(f"transformers cannot load {folder} ({reason(e)}): check the folder") from e
    if loading["missing_keys"]:
        raise CheckpointError(f"{folder} holds no tensor for {sorted(loading['missing_keys'])[0]}: download it again")
    return model.to(device).eval()


Opening = Callable[[Path, torch.device, torch.dtype, bool], PreTrainedModel]
"""How models that are measured are opened, where not by `open_model`: by what keeps them for the next measurement."""


def too_large(folders: Iterable[tuple[Path, torch.dtype]], device: torch.device) -> str | None:
    """Say why the checkpoints should not be loaded together in these dtypes; None if there is room for them."""
    need = round(1.1 * sum(_in_memory(folder, dtype) for folder, dtype in folders))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return None if need <= free else f"needs {format_bytes(need)} of memory, {format_bytes(free)} are free"


def _in_memory(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights: packed ones as they are stored, all others in `dtype`."""
    size = measure_size(folder)
    packed = sum(layer.weights for layer in size.outside)
    stored = sum(layer.bytes for layer in (*size.layers, *size.outside))
    return stored + (size.other_weights - packed) * dtype.itemsize


def measure_alone(
    folder: Path,
    texts: Sequence[EvalText],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    known: Measured | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    label: str = "",
    opening: Opening | None = None,
) -> Measured:
    """Measure one model on each text with every metric that needs no original.

    Results in `known` of the same tokens and dtype are taken over, and no model is opened if that is all of them.
    `label` names the model where stages are shown.
    """
    dtype, progress = dtype or pick_dtype(folder, device), progress or Silent()
    opening = opening or open_model
    known, metrics = known or {}, without_original(METRICS)
    rows = {text.source: known_results(known, text, dtype, metrics) for text in texts}
    missing = [text for text in texts if len(rows[text.source]) < len(metrics)]
    if missing:
        model = opening(folder, device, dtype, trust_remote_code)
        for text in missing:
            counter = progress.counter(f"{label or folder.name}: reading {text.source}")
            (rows[text.source],) = measure(
                [model], text.tokens, metrics, context=text.context, source=text.source, bos=text.bos, progress=counter
            )
        del model
        release(device)
    return by_metric([*rows.values()])


def known_results(
    known: Measured, text: EvalText, dtype: torch.dtype, metrics: Iterable[str] = ()
) -> dict[str, Result]:
    """What `known` holds of a text in the same tokens and dtype, by metric; of all metrics unless some are named."""
    same = (text.sha256, text.bos, str(dtype).removeprefix("torch."))
    return {
        name: replace(result, source=text.source)
        for name in metrics or METRICS
        for result in known.get(name, ())
        if (result.sha256, result.bos, result.dtype) == same
    }


@dataclass(frozen=True)
class Compared:
    """What one pass over each text showed of an original, and of models made from it."""

    original: Measured
    """By the metrics that need no original."""
    floor: Measured
    """Of the original in another precision, by the metrics that need one: what rounding costs. Empty unless asked."""
    models: list[Measured]


def measure_beside(
    original: Path,
    models: Sequence[Path],
    texts: Sequence[EvalText],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    floor: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    opening: Opening | None = None,
) -> Compared:
    """Measure an original and models made from it with every metric, each run once over each text.

    All run side by side if they fit into memory together; otherwise one after another, while the original's predictions
    are kept in a temporary file. `floor` adds the original in bf16, or in fp32 where it is measured in something else.
    `texts` are in the tokens of all of them, see `check_comparable`.
    """
    dtype, progress = dtype or pick_dtype(original, device), progress or Silent()
    opening = opening or open_model
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    loads = [(original, other)] * floor + [(folder, dtype) for folder in models]
    together = too_large([(original, dtype), *loads], device) is None
    with ExitStack() as files:
        first = opening(original, device, dtype, trust_remote_code)
        if together:
            references, groups = [first] * len(texts), [loads]
        else:
            kept = (
                recorded(first, cut(t.tokens, t.context), progress=progress.counter(f"original: reading {t.source}"))
                for t in texts
            )
            references, groups = [files.enter_context(each) for each in kept], [[each] for each in loads]
        del first
        by_model: list[Measured] = []
        for group in groups:
            release(device)
            opened = [opening(folder, device, load_dtype, trust_remote_code) for folder, load_dtype in group]
            rows = [
                measure(
                    opened, t.tokens, METRICS, context=t.context, original=reference, source=t.source, bos=t.bos,
                    progress=progress.counter(f"both models: reading {t.source}"),
                )
                for reference, t in zip(references, texts, strict=True)
            ]  # fmt: skip
            by_model += [by_metric([row[i + 1] for row in rows]) for i in range(len(group))]
            del opened
        del references
    release(device)
    rounded = {name: by_model[0][name] for name in METRICS if floor and METRICS[name].needs_original}
    return Compared(by_metric([row[0] for row in rows]), rounded, by_model[floor:])


def measure_depth(
    original: Path,
    model: Path,
    text: EvalText,
    device: torch.device,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    progress: OnProgress | None = None,
    opening: Opening | None = None,
) -> Depth:
    """Measure how the divergence of a model from the original builds up along the blocks, on the beginning of a text.

    Both are in memory together.
    """
    opening = opening or open_model
    nets = [opening(folder, device, dtype, trust_remote_code) for folder in (original, model)]
    blocks, others = (find_blocks(net, net.config)[1] for net in nets)
    windows = cut(text.tokens[:DEPTH_TOKENS], min(text.context, DEPTH_TOKENS))
    result = by_depth(nets[0], blocks, others, windows, source=text.source, progress=progress)
    del nets, blocks, others
    release(device)
    return result


def check_comparable(original: str, texts: Sequence[EvalText], model: str, others: Sequence[EvalText]) -> None:
    """Raise `InputError` unless a model and the original that it is compared with read the same tokens of each text."""
    for text, other in zip(texts, others, strict=True):
        if text.context != other.context:
            raise InputError(
                f"{model} reads windows of {other.context} tokens and {original} of {text.context}: give both the same "
                "--context"
            )
        if text.sha256 != other.sha256:
            raise InputError(
                f"{model} cannot be compared with {original}, because their tokenizers cut {text.source!r} into "
                "different tokens: give --fidelity the original that it was made from"
            )
