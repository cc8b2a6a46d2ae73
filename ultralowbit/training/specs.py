"""What a recipe says of each stage that reads text or trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from typing import Annotated, Any, ClassVar, Literal, Union

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from ultralowbit.data.corpora import public_name
from ultralowbit.data.overlap import apart
from ultralowbit.methods.base import fields
from ultralowbit.system import multiplies_bf16
from ultralowbit.training.estimators import ESTIMATORS, STE
from ultralowbit.training.objectives import BLOCK_OBJECTIVES, OBJECTIVES

MOST = 10**9
"""Of anything that is counted: more is a slip of the pen."""
MOST_SEED = 2**62
"""Seeds that generators take, with room for the numbers that training adds."""
Beta = Annotated[float, Field(ge=0, lt=1)]


FEW = 1 << 24
"""Weights up to which products are a small part of a step, and made in fp32 on any CPU."""


def _word(value: object) -> object:
    """`on` and `off` as the words that they are: without quotes YAML reads truth values."""
    return ("off", "on")[value] if isinstance(value, bool) else value


Choice = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


def one_of(table: dict[str, type], tag: str) -> Any:
    """The type of a recipe's key that holds one of the table's classes: the one that its key `tag` names."""
    return Annotated[Union[tuple(table.values())], Field(discriminator=tag)]  # noqa: UP007 (built at run time)


class StrictModel(BaseModel):
    """A part of a recipe: it cannot be changed, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextSpec(StrictModel):
    """Which text a stage reads, and how much of it."""

    source: str | dict[str, float] = Field(
        "c4",
        description="local .txt/.jsonl/.parquet, wikitext2, c4, ptb, org/name, python-docs or self; or several with "
        "their shares of the windows: {wikitext2: 1, self: 3}",
    )
    samples: int = Field(128, ge=1, le=MOST, description="windows drawn from the text")
    length: int = Field(2048, ge=2, le=MOST, description="tokens in a window; cut to the model's context")
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of the windows and of the model's own samples")

    @model_validator(mode="before")
    @classmethod
    def _as_once_written(cls, values: Any) -> Any:
        """Recipes in the folders of earlier versions name a key of calibration here too, which nothing read."""
        if cls is TextSpec and isinstance(values, dict) and values.get("clip_tokens", 0) is None:
            return {key: value for key, value in values.items() if key != "clip_tokens"}
        return values

    @field_validator("source", mode="before")
    @classmethod
    def _is_one_or_several(cls, source: Any) -> Any:
        """Names without folders differ: reports have these alone, and `verify` finds texts again by them."""
        if not isinstance(source, str):
            if not isinstance(source, dict) or not source or not all(isinstance(text, str) for text in source):
                raise PydanticCustomError("source", "expected a text, or several with shares: {wikitext2: 1, c4: 3}")
            names = [public_name(text) for text in source]
            for name, share in zip(names, source.values(), strict=True):
                if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= MOST:
                    raise PydanticCustomError("source", f"the share of {name} should be a number above 0")
                if names.count(name) > 1:
                    raise PydanticCustomError("source", f"two texts are called {name}: rename one")
        return source

    @model_validator(mode="after")
    def _reads_each(self) -> TextSpec:
        left = dict.fromkeys(self.shares)
        for text in self.dealt():
            left.pop(text, None)
            if not left:
                return self
        raise PydanticCustomError(
            "share",
            f"{next(iter(left))} would get none of {self.samples} windows: give it a larger share, or more samples",
        )

    @property
    def shares(self) -> dict[str, float]:
        """Each text, by name or path, and its share of the windows; they add up to 1."""
        texts = self.source if isinstance(self.source, dict) else {self.source: 1.0}
        return {text: share / sum(texts.values()) for text, share in texts.items()}

    @property
    def named(self) -> str:
        """The text in words, such as "wikitext2 (25 %) and c4 (75 %)"."""
        if isinstance(self.source, str):
            return self.source
        *first, last = [f"{text} ({100 * share:.3g} %)" for text, share in self.shares.items()]
        return f"{', '.join(first)} and {last}" if first else last

    def dealt(self) -> Iterator[str]:
        """The text of each window: in whatever first part of them, each text has about its share."""
        shares = self.shares
        counts = dict.fromkeys(shares, 0)
        for i in range(1, self.samples + 1):
            text = max(counts, key=lambda text: shares[text] * i - counts[text])
            counts[text] += 1
            yield text

    def renamed(self, rename: Callable[[str], str]) -> TextSpec:
        """The same with each text's name or path replaced by what `rename` makes of it."""
        texts = self.source
        new = rename(texts) if isinstance(texts, str) else {rename(text): share for text, share in texts.items()}
        return self.model_copy(update={"source": new})


class CalibrationSpec(TextSpec):
    """Which text the statistics come from, and how the blocks are run on it."""

    clip_tokens: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="percentile (0.999) of the token norms that the Hessian scales larger tokens down to",
    )
    autocast: Choice = Field(
        "auto",
        description="bfloat16 products where blocks run in fp32, as they do on CPUs; auto: on CPUs with AMX, where "
        "blocks have more than 2^24 weights in all",
    )

    def autocasts(self, device: torch.device, weights: int) -> bool:
        """Whether the products of blocks with so many weights are made in bfloat16, where these run in fp32."""
        if self.autocast != "auto":
            return self.autocast == "on"
        return device.type == "cpu" and multiplies_bf16(device) and weights > FEW


KINDS = ("scale", "offset", "row", "column", "latent")
"""What of a packed weight can be trained."""
PLAIN_KINDS = ("norm", "bias")
"""What can be trained beside packed weights."""


class Trained(StrictModel):
    """What the trained stages have in common."""

    kinds: ClassVar[tuple[str, ...]]
    """What `training.lr` may name."""
    training: TrainSpec
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the windows that judges and is not trained on")

    @field_validator("training")
    @classmethod
    def _known_kinds(cls, training: TrainSpec) -> TrainSpec:
        unknown = sorted(set(training.lr) - set(cls.kinds))
        if unknown or not training.lr:
            what = f"names {unknown[0]!r}" if unknown else "is empty"
            raise PydanticCustomError("kinds", f"lr {what}, expected some of {', '.join(cls.kinds)}")
        return training

    def split(self, windows: range) -> tuple[range, range]:
        """The windows to train on and the last ones, at least one, that are held out; of one window, that one twice."""
        cut = len(windows) - max(1, round(self.held_out * len(windows)))
        return (windows[:cut], windows[cut:]) if cut else (windows, windows)


SMALL = 1 << 28
"""Packed weights up to which a stage trains with what is fastest and most exact, where the recipe does not say how."""


class FakeQuantized(Trained):
    """`training.lr` names what is trained: scale, offset, row, column, latent."""

    kinds = KINDS

    estimator: one_of(ESTIMATORS, "kind") = Field(STE(), description="how a gradient passes through a sign")
    scales: Literal["free", "analytic"] = Field(
        "free", description="free: trained on their own; analytic: mean |w| of the latent weights, at every step"
    )
    latents: Literal["fp32", "bf16"] | None = Field(
        None,
        description="fp32: 16 bytes a latent weight with its gradient and moments; bf16: 6, rounded at random, with "
        "moments in 8 bits; null: bf16 for more than 2^28 weights in the stage",
    )

    @property
    def of_packed(self) -> set[str]:
        """What of packed weights is trained."""
        return self.training.lr.keys() & {*KINDS}

    def latent_dtype(self, weights: int) -> torch.dtype:
        """Of the latent weights, where so many weights are packed."""
        latents = self.latents or ("fp32" if weights <= SMALL else "bf16")
        return torch.float32 if latents == "fp32" else torch.bfloat16


class Blockwise(FakeQuantized):
    """Block-wise training: the packed Linears of a block are fitted to what the original block puts out."""

    @property
    def loop(self) -> TrainSpec:
        """Of the training loop: activations lie in batches of `training.batch` windows, each a sample of the loop."""
        return replace(self.training, batch=1)

    def steps(self, batches: int) -> int:
        """Optimizer steps of a block, on so many batches."""
        return self.loop.total_steps(len(self.split(range(batches))[0]))

    objective: one_of(BLOCK_OBJECTIVES, "kind")


class EndToEnd(Trained):
    """A stage in which the model is trained as a whole."""

    data: TextSpec | None = Field(
        None,
        description="text to train on, null for that of the calibration; what fine-tuning holds out of that is not "
        "packed from, unless blocks are trained",
    )
    checkpointing: bool | None = Field(
        None,
        description="run each block again for its gradient instead of keeping what it made; null: for more than 2^28 "
        "packed weights",
    )

    def windows(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Of tokens [windows, length] on the host those to train on and those that are held out, on a device, and what
        there is to note: windows that share text with held out ones, as those of one text may lie over each other, are
        left out."""
        training, held_out = (tokens[part.start : part.stop] for part in self.split(range(len(tokens))))
        own = apart(training, held_out)
        left_out = len(own) - int(own.sum())
        notes = (f"{left_out} windows that share text with those held out were not trained on",)
        if left_out in (0, len(own)):
            own, notes = slice(None), ()
        return training[own].to(device), held_out.to(device), notes

    def is_checkpointed(self, weights: int) -> bool:
        """Whether blocks are run again for their gradients, where so many weights are packed."""
        return weights > SMALL if self.checkpointing is None else self.checkpointing


class Finetune(FakeQuantized, EndToEnd):
    """Fine-tuning: the packed model is trained end to end, against the original or on the text alone.

    `training.lr` may name norm and bias too. Without latent there is the light form, for those who lack memory.
    """

    kinds = (*KINDS, *PLAIN_KINDS)

    objective: one_of(OBJECTIVES, "kind")


class Preprocess(EndToEnd):
    """Quantization preprocessing: the model is quantized, restored by low-rank adapters, merged; then quantized.

    What is quantized stays packed while its adapters are trained. These are a hundredth of the model, so that there is
    no key `latents` here.
    """

    kinds = ("adapter",)

    rank: int = Field(64, ge=1, le=1 << 16, description="r of the adapters")
    alpha: float = Field(16, gt=0, description="the adapters count alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1)
    targets: tuple[str, ...] = Field(("*",), description="shell patterns of the Linears that get an adapter")
    exclude: tuple[str, ...] = Field((), description="shell patterns of those that get none all the same")

    def adapts(self, name: str) -> bool:
        """Whether the Linear with this full name gets an adapter."""
        return any(fnmatch(name, p) for p in self.targets) and not any(fnmatch(name, p) for p in self.exclude)


@fields
class TrainSpec:
    """How parameters are trained; the defaults are EfficientQAT's for scales (arXiv 2407.11062).

    lr: by kind of parameter, the largest of the schedule. relative: rates of latent weights are multiples of the
    mean distance between their levels, other rates of the root mean square that a tensor has at the start, 1e-3 at
    least, as in Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): what suits one model and number of levels
    then suits others, such as larger models, whose weights are ten times smaller. epochs: passes over the samples,
    unless `steps` counts the optimizer's steps. batch: samples in a forward pass. accumulation: forward passes in a
    step. warmup: share of the steps in which the rate rises from 0; it then falls on a cosine to `final_lr` of it.
    clip_norm: of the gradient of all parameters, null for none. evaluations: on held-out samples, evenly spread
    over the steps, the last after the last step. patience: evaluations without a better one after which training
    ends, null for none. autocast: bfloat16 products, "auto" on GPUs, and on CPUs with AMX where more than 2^24
    numbers are trained.
    """

    lr: dict[str, Annotated[float, Field(gt=0)]]
    relative: bool = False
    epochs: float = Field(2.0, gt=0, le=MOST)
    steps: int | None = Field(None, ge=1, le=MOST)
    batch: int = Field(2, ge=1, le=MOST)
    accumulation: int = Field(1, ge=1, le=MOST)
    warmup: float = Field(0.0, ge=0, le=1)
    final_lr: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_norm: float | None = Field(0.3, gt=0)
    evaluations: int = Field(4, ge=1, le=MOST)
    patience: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, le=MOST_SEED)
    autocast: Choice = "auto"

    def autocasts(self, device: torch.device, trained: int) -> bool:
        """Whether products are made in bfloat16 there, where so many numbers are trained."""
        if self.autocast != "auto":
            return self.autocast == "on"
        return multiplies_bf16(device) and (device.type != "cpu" or trained > FEW)

    def total_steps(self, samples: int) -> int:
        """Optimizer steps on so many samples."""
        return self.steps or max(1, round(self.epochs * math.ceil(samples / (self.batch * self.accumulation))))

    def factor(self, step: int, total: int) -> float:
        """Of the learning rate at this step, counted from 0."""
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, total - warm)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2
