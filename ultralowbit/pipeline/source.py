"""What a run reads: the model, the formats that a recipe gives its Linears, texts in its tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.config import positions
from ultralowbit.checkpoint.manifest import UNTIED
from ultralowbit.data.calibration import Calibration, calibrate
from ultralowbit.errors import InputError, naming_memory
from ultralowbit.format.weight import Format
from ultralowbit.hub import open_tokenizer
from ultralowbit.methods.rotation import rotated_format, rotated_weight
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.embedding import find_ends
from ultralowbit.progress import Progress
from ultralowbit.recipe import Recipe
from ultralowbit.training.fake_quant.linear import FakeQuantLinear
from ultralowbit.training.plain import plain_parameters
from ultralowbit.training.specs import Blockwise, CalibrationSpec, Finetune, TextSpec

BATCH_TOKENS = 2048
"""Tokens that run through a block at a time: enough to keep the products busy, little enough to keep them in memory."""


def open_decoder(
    folder: Path, device: torch.device, trust_remote_code: bool = False, spec: CalibrationSpec | None = None
) -> Decoder:
    """The model on meta, ready to stream; blocks run in fp32 on a CPU and in the checkpoint's dtype elsewhere. spec:
    says whether products in fp32 are made in bfloat16; none are without it."""
    decoder = Decoder(folder, torch.float32 if device.type == "cpu" else None, device, trust_remote_code)
    if spec is not None and decoder.dtype == torch.float32:
        names = chain.from_iterable(map(decoder.names_of_block, range(len(decoder.blocks))))
        decoder.autocast = spec.autocasts(device, sum(math.prod(decoder.specs[name].shape) for name in names))
    return decoder


def open_folded(
    folder: Path, device: torch.device, recipe: Recipe, trust_remote_code: bool = False
) -> tuple[Decoder, Recipe, dict[str, Any] | None]:
    """The model with rotations folded into what is read of it, where the recipe asks for that and the architecture
    allows it; the recipe that knows which inputs are then rotated; and what the manifest says of that, None where
    nothing is folded and there is nothing to note."""
    decoder, rotate = open_decoder(folder, device, trust_remote_code, recipe.calibration), recipe.rotate
    if rotate is None:
        return decoder, recipe, None
    inputs, notes = rotate.inputs, []
    if inputs == "folded":
        why_not = decoder.fold(rotate.seed, rotate.tied == "untie")
        if why_not is None:
            recipe, notes = recipe.with_folded(decoder.folding.folded), [UNTIED] * decoder.folding.untied
        else:
            instead = "nothing is rotated" if rotate.others == "none" else "inputs are rotated where they enter"
            notes = [f"rotations cannot be folded into {decoder.config.model_type}, {why_not}: {instead}"]
            inputs = rotate.others
    entered = {m for name, (_, m) in packed_linears(decoder, recipe).items() if recipe.hadamard(name, m)}
    notes += filter(None, map(rotate.about, sorted(entered)))
    return decoder, recipe, {"inputs": inputs, "notes": notes} if notes or rotate.inputs == "folded" else None


def window_length(spec: TextSpec, decoder: Decoder) -> int:
    """The length of windows that is asked for, cut to the model's positions."""
    return min(spec.length, positions(decoder.config) or spec.length)


def packed_linears(decoder: Decoder, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(out, in) of every Linear that the recipe packs, by their full names in the order of the blocks."""
    blocks = (decoder.shapes(i, recipe.ignore) for i in range(len(decoder.blocks)))
    return {name: shape for shapes in blocks for name, shape in shapes.items()}


def planned_formats(decoder: Decoder, recipe: Recipe) -> dict[str, tuple[Format, tuple[int, int]]]:
    """Format and (out, in) of every Linear that the recipe packs, as expected before any data is seen: where the choice
    of weights depends on data, the packed result may need more room."""
    if recipe.embeddings is not None:
        find_ends(decoder.model)  # refuses what cannot be packed
    for stage in ("preprocess", "blockwise", "finetune") if decoder.experts else ():
        if getattr(recipe, stage) is not None:
            without = "--effort fast" if recipe.allocate is not None else f"--set {stage}=null"
            raise InputError(
                f"the stage {stage} of recipe {recipe.name} cannot run on a mixture of experts yet, which "
                f"{decoder.config.model_type} is: leave it out with {without}, or give a recipe without it"
            )
    _check_ignored(decoder, recipe)
    formats, made = {}, {}
    for name, shape in packed_linears(decoder, recipe).items():
        alike = method, columns, block = recipe.method_for(name), shape[1], recipe.hadamard(name, shape[1])
        if alike not in made:
            made[alike] = rotated_format(method.format(columns), block) if block else method.format(columns)
        formats[name] = (made[alike], shape)
    if not formats:
        raise InputError(f"recipe {recipe.name} skips every Linear of the model: nothing would be compressed")
    for override in recipe.overrides:
        if not any(recipe.method_for(name) is override.quantize for name in formats):
            raise InputError(
                f"the override {override.match!r} matches no Linear of the model, such as {next(iter(formats))}"
            )
    spec = recipe.preprocess
    if spec is not None and not any(map(spec.adapts, formats)):
        raise InputError(
            f"preprocess.targets {list(spec.targets)} match no Linear that is packed, such as {next(iter(formats))}: "
            "give patterns of names"
        )
    for stage in ("blockwise", "finetune"):
        if getattr(recipe, stage) is not None:
            _check_rates(stage, getattr(recipe, stage), recipe, formats, decoder.model)
    return formats


def _check_ignored(decoder: Decoder, recipe: Recipe) -> None:
    """Raise `InputError` for a pattern in `ignore` that no module's full name matches."""
    names = [name for i in range(len(decoder.blocks)) for name in decoder.shapes(i)] if recipe.ignore else []
    for pattern in recipe.ignore:
        if not any(fnmatch(name, pattern) for name in chain(names, dict(decoder.model.named_modules()))):
            ends = {name.rpartition(".")[2]: name for name in reversed(names)}
            near = get_close_matches(pattern.strip("*.").rpartition(".")[2], ends, n=2, cutoff=0.5) or [*ends][:1]
            raise InputError(
                f"ignore has {pattern!r}, which matches no module of the model, such as "
                f"{' or '.join(ends[end] for end in near)}: correct it, or leave it out"
            )


def _check_rates(
    stage: str,
    spec: Blockwise | Finetune,
    recipe: Recipe,
    formats: Mapping[str, tuple[Format, tuple[int, int]]],
    model: nn.Module,
) -> None:
    """Raise `InputError` where a stage has a learning rate for what neither a packed Linear nor the model has.

    Seen by packing and making trainable a few random rows of each distinct Linear, as the stage will do.
    """
    there: set[str] = {plain.kind for plain in plain_parameters(model) if plain.kind in spec.training.lr}
    nothing: InputError | None = None
    generator = torch.Generator().manual_seed(0)
    distinct = {(repr(recipe.method_for(name)), shape[1]): name for name, (_, shape) in formats.items()}
    for (_, columns), name in distinct.items():
        method = recipe.method_for(name)
        rows = torch.randn(4, columns, generator=generator, dtype=torch.float32)  # [4, in]
        packed, block = method.quantize(rows, None), recipe.hadamard(name, columns)
        packed = rotated_weight(packed, block) if block else packed
        try:
            trained = FakeQuantLinear(packed, spec.of_packed, latent=rows, scales=spec.scales)
        except InputError as e:
            nothing = e
        else:
            there |= trained.by_kind().keys()
    if not there:
        raise InputError(f"{stage} has nothing to train: {nothing}") from nothing
    if missing := sorted(spec.training.lr.keys() - there):
        raise InputError(
            f"{stage}.training.lr has a rate for {missing[0]}, of which the model has nothing to train (it has "
            f"{', '.join(sorted(there))}): leave it out"
        )


class TextReader:
    """Reads texts in the tokens of a model, with the tokenizer opened once."""

    def __init__(self, folder: Path, decoder: Decoder, trust_remote_code: bool, progress: Progress) -> None:
        self.folder, self.decoder, self.progress = folder, decoder, progress
        self.trust_remote_code = trust_remote_code

    @cached_property
    def tokenizer(self) -> Any:
        return open_tokenizer(self.folder, self.trust_remote_code)

    def read(self, spec: TextSpec) -> Calibration:
        """The windows that a recipe asks for; `InputError` where text, tokenizer and model do not go together."""
        length = window_length(spec, self.decoder)
        if length < spec.length:
            self.progress.say(f"windows of {spec.named} cut from {spec.length} to the model's {length} positions")
        with naming_memory(f"reading {spec.samples} windows of {spec.named}"):
            dealt, windows = [*spec.dealt()], {}
            for text, samples in Counter(dealt).items():
                read = calibrate(
                    text, self.tokenizer, samples=samples, length=length, seed=spec.seed, model_path=self.folder,
                    device=self.decoder.device, trust_remote_code=self.trust_remote_code,
                    progress=self.progress.counter(f"tokens of {text}"),
                )  # fmt: skip
                windows[text] = iter(read.tokens)
            data = Calibration(torch.stack([next(windows[text]) for text in dealt]), spec.named, spec.seed)
        rows = self.decoder.model.get_input_embeddings().num_embeddings
        if data.tokens.max() >= rows:
            raise InputError(
                f"the tokenizer makes token {data.tokens.max().item()}, the model has {rows}: put the tokenizer files "
                "that belong to the model into its folder"
            )
        return data


def batched(tokens: Tensor, most: int | None = None) -> Tensor:
    """[samples, length] -> [batches, batch, length], all batches of one shape: blocks are called alike for each. `most`
    is in samples, by default what makes `BATCH_TOKENS`."""
    samples, length = tokens.shape
    return tokens.view(-1, _divisor(samples, most or max(1, BATCH_TOKENS // length)), length)


def smaller_batch(recipe: Recipe) -> str | None:
    """What to say where blocks are trained on fewer windows at a time than the recipe asks for."""
    samples = recipe.calibration.samples
    asked = 1 if recipe.blockwise is None else min(recipe.blockwise.training.batch, samples)
    batch = _divisor(samples, asked)
    if batch == asked:
        return None
    return (
        f"blocks are trained on {batch} of the {samples} windows at a time, not on blockwise.training.batch = {asked}, "
        f"which does not divide them: --samples {samples - samples % asked} would"
    )


def _divisor(samples: int, most: int) -> int:
    """The largest divisor of a number of samples that is at most so large."""
    return max(b for b in range(1, min(most, samples) + 1) if samples % b == 0)
