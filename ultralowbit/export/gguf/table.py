"""Compare GGUF files in llama.cpp itself.

    python -m ultralowbit.export.gguf.table MODEL a.gguf b.gguf --calib TEXT --test TEXT

MODEL is the original, whose packed checkpoints the files were exported from. Beside them stand MODEL in 16 bits and
what llama.cpp's own quantization makes of it, with an importance matrix from the calibration text. All rows are
measured alike: bytes of the file, perplexity, and how many tokens a second are read one after another.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ultralowbit.errors import InputError
from ultralowbit.export.base import export
from ultralowbit.hub import open_tokenizer

THEIRS = ("Q2_K", "IQ2_XXS", "IQ1_S")
_PROMPT, _GENERATED = 16, 64


def windows(folder: Path, text: Path, context: int, most: int) -> list[list[int]]:
    """The first `most` tokens of a text in windows that do not overlap."""
    tokens = open_tokenizer(folder)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:most]
    return [tokens[start : start + context] for start in range(0, len(tokens) - context + 1, context)]


def perplexity(model: Any, texts: list[list[int]]) -> float:
    """exp of the mean loss of all tokens of the windows but the first."""
    losses = []
    for tokens in texts:
        model.reset()
        model.eval(tokens)
        logits = torch.from_numpy(model.scores[: len(tokens) - 1])
        losses.append(nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none").double())
    return torch.cat(losses).mean().exp().item()


def tokens_per_second(model: Any, tokens: list[int]) -> float:
    """The median of tokens that are read one after another."""
    model.reset()
    model.eval(tokens[:_PROMPT])
    seconds = []
    for token in tokens[_PROMPT : _PROMPT + _GENERATED]:
        start = time.perf_counter()
        model.eval([token])
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


@torch.no_grad()
def importance(folder: Path, texts: list[list[int]]) -> dict[str, Tensor]:
    """llama.cpp's name of each Linear's weight -> the mean square of each of its inputs, fp32 [in]."""
    import gguf

    from ultralowbit.export.gguf.architectures import architecture

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = architecture(model.config).name
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == own)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.square().flatten(0, -2).sum(0)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stored = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            module.register_forward_pre_hook(lambda _, inputs, stored=stored: add(stored, inputs[0]))
    for tokens in texts:
        model(torch.tensor([tokens]))
    return {name: total / sum(map(len, texts)) for name, total in sums.items()}


def quantize(source: Path, out: Path, kind: str, importances: dict[str, Tensor], threads: int) -> None:
    """What llama.cpp makes of an F16 file; `InputError` where it refuses."""
    import llama_cpp

    count = len(importances)
    arrays = [values.float().contiguous().numpy() for values in importances.values()]
    entries = (llama_cpp.llama_model_imatrix_data * (count + 1))()  # one without a name ends the list
    for entry, name, values in zip(entries, importances, arrays, strict=False):
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.name, entry.data, entry.size = name.encode(), pointer, len(values)
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.imatrix = threads, entries
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)):
        raise InputError(f"llama.cpp cannot quantize {source.name} to {kind}: leave it out")


def rows(options: argparse.Namespace) -> Iterator[tuple[str, int, float, float]]:
    """Name, bytes, perplexity and tokens a second of each file."""
    import llama_cpp

    texts = windows(options.model, options.test, options.context, options.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        original = export(options.model, "gguf", Path(folder) / "F16.gguf")
        files = [original, *options.files]
        if options.theirs:
            importances = importance(options.model, windows(options.model, options.calib, options.context, 16384))
        for kind in options.theirs:
            quantize(original, Path(folder) / f"{kind}.gguf", kind, importances, options.threads)
            files.append(Path(folder) / f"{kind}.gguf")
        for file in files:
            model = llama_cpp.Llama(
                str(file), n_ctx=options.context, n_batch=options.context, n_threads=options.threads,
                n_threads_batch=options.threads, logits_all=True, verbose=False,
            )  # fmt: skip
            speed = tokens_per_second(model, np.concatenate(texts).tolist())
            yield file.stem, file.stat().st_size, perplexity(model, texts), speed
            model.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ultralowbit.export.gguf.table", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the original")
    parser.add_argument("files", type=Path, nargs="*", help="exported files")
    parser.add_argument("--calib", type=Path, required=True, help="text for llama.cpp's importance matrix")
    parser.add_argument("--test", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens of the test text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--theirs", nargs="*", default=list(THEIRS), help="llama.cpp's own types")
    print("| file | MB | perplexity | tokens/s |\n|---|---:|---:|---:|")
    for name, size, ppl, speed in rows(parser.parse_intermixed_args()):
        print(f"| `{name}` | {size / 1e6:.1f} | {ppl:.2f} | {speed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
