"""Recipes: YAML -> validated values. Every mistake is reported at once, with the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ultralowbit.methods import METHODS, Method
from ultralowbit.text import InputError
from ultralowbit.tune.estimators import ESTIMATORS, STE
from ultralowbit.tune.loop import TrainSpec
from ultralowbit.tune.objectives import BLOCK_OBJECTIVES, OBJECTIVES


def _one_of(table: dict[str, type], tag: str) -> Any:
    return Annotated[Union[tuple(table.values())], Field(discriminator=tag)]  # noqa: UP007 (built at run time)


Solve = _one_of(METHODS, "method")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationSpec(_Model):
    """Which text the statistics come from, and how much of it."""

    source: str = Field(
        "c4", description="local .txt/.jsonl/.parquet, wikitext2, c4, ptb, org/name, python-docs or self"
    )
    samples: int = Field(128, ge=1, description="windows drawn from the text")
    length: int = Field(2048, ge=2, description="tokens in a window; cut to the model's context")
    seed: int = Field(0, ge=0, description="of the windows and of the model's own samples")
    clip_tokens: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="percentile (0.999) of the token norms that the Hessian scales larger tokens down to",
    )


class Trained(_Model):
    """What the trained stages have in common."""

    training: TrainSpec
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the windows that judges and is not trained on")

    def split(self, windows: range) -> tuple[range, range]:
        """The windows to train on and the last ones, at least one, that are held out; of one window, that one twice."""
        cut = len(windows) - max(1, round(self.held_out * len(windows)))
        return (windows[:cut], windows[cut:]) if cut else (windows, windows)


class _Views(Trained):
    """`training.lr` names what is trained: scale, offset, row, column, latent."""

    estimator: _one_of(ESTIMATORS, "kind") = Field(STE(), description="how a gradient passes through a sign")
    scales: Literal["free", "analytic"] = Field(
        "free", description="free: trained on their own; analytic: mean |w| of the latent weights, at every step"
    )


class Tune(_Views):
    """Block-wise tuning: the packed Linears of a block, fitted to what the original block puts out. Activations lie in
    batches of `training.batch` windows, so that a batch of the loop is one of these."""

    @property
    def loop(self) -> TrainSpec:
        return replace(self.training, batch=1)

    def steps(self, batches: int) -> int:
        """Optimizer steps of a block, on so many batches."""
        return self.loop.total_steps(len(self.split(range(batches))[0]))

    objective: _one_of(BLOCK_OBJECTIVES, "kind")


class Distill(_Views):
    """End-to-end training of the packed model, against the original or on the text alone."""

    objective: _one_of(OBJECTIVES, "kind")
    data: CalibrationSpec | None = Field(None, description="text to train on, null for that of the calibration")


class Prepare(Trained):
    """Quantization preprocessing: the model is quantized, restored by low-rank adapters, merged; then quantized."""

    rank: int = Field(64, ge=1, description="r of the adapters")
    alpha: float = Field(16, gt=0, description="the adapters count alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1)
    targets: tuple[str, ...] = Field(("*",), description="shell patterns of the Linears that get an adapter")
    exclude: tuple[str, ...] = Field((), description="shell patterns of those that get none all the same")
    data: CalibrationSpec | None = Field(None, description="text to train on, null for that of the calibration")

    def adapts(self, name: str) -> bool:
        """Whether the Linear with this full name gets an adapter."""
        return any(fnmatch(name, p) for p in self.targets) and not any(fnmatch(name, p) for p in self.exclude)


class Override(_Model):
    """Another method for the Linears whose full name matches."""

    match: str = Field(description="shell pattern on the full name, such as *.down_proj")
    solve: Solve


class Recipe(_Model):
    """What is done to each Linear of the decoder blocks, and on which text: the stages in the order of the fields, all
    but `solve` optional."""

    name: str
    summary: str = ""
    prepare: Prepare | None = None
    solve: Solve
    tune: Tune | None = None
    distill: Distill | None = None
    calibration: CalibrationSpec = CalibrationSpec()
    skip: tuple[str, ...] = Field((), description="shell patterns of Linears to leave as they are")
    overrides: tuple[Override, ...] = ()

    def method_for(self, name: str) -> Method:
        """The method of the Linear with this full name: the last matching override, or `solve`."""
        matching = [override.solve for override in self.overrides if fnmatch(name, override.match)]
        return (matching or [self.solve])[-1]

    @property
    def reads_text(self) -> bool:
        """Whether a stage trains, or a method asks for statistics of inputs."""
        methods = (self.solve, *(override.solve for override in self.overrides))
        return any((self.prepare, self.tune, self.distill)) or any(method.needs for method in methods)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def load(
        cls,
        name: str | Path,
        settings: tuple[str, ...] | list[str] = (),
        *,
        small: bool = False,
        texts: Mapping[str, Any] = MappingProxyType({}),
    ) -> Recipe:
        """A shipped recipe by name or a YAML file by path, with `key.path=value` settings applied before validation.

        small: with what the file has under `small`, for models of a few million parameters, where the paper's constants
        make no sense. texts: values, such as `source`, of every text that the recipe reads: that of the calibration and
        those that stages train on; settings go before them. Raises `InputError` that lists every unknown key and bad
        value.
        """
        text, label = _recipe_text(str(name))
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise InputError(f"{label} is not YAML: {' '.join(str(e).split())}") from e
        if not isinstance(data, dict):
            raise InputError(f"{label} holds {type(data).__name__}, expected keys such as `solve: {{method: gptq}}`")
        data.setdefault("name", Path(str(name)).stem)
        of_small = data.pop("small", None) or {}
        if not isinstance(of_small, dict):
            raise InputError(f"{label}: small holds {type(of_small).__name__}, expected keys of the recipe")
        if small:
            data = _merged(data, of_small)
        _set_texts(data, texts)
        for setting in settings:
            _apply(data, setting)
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise InputError(f"{label}: " + "; ".join(_explain(error) for error in e.errors())) from e


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in files("ultralowbit.recipes").iterdir() if p.name.endswith(".yaml")
    )


def _recipe_text(name: str) -> tuple[str, str]:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        try:
            return Path(name).expanduser().read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"the recipe file {name!r} cannot be read ({type(e).__name__}): check the path") from e
    if name not in shipped():
        near = get_close_matches(name, shipped(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no recipe {name!r}: {hint}`ultralowbit recipes list` names all, or give a .yaml file")
    return (files("ultralowbit.recipes") / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"


def _merged(data: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the values of `other` in the place of its own, group by group."""
    both = {key: (data[key], value) for key, value in other.items()
            if isinstance(value, dict) and isinstance(data.get(key), dict)}  # fmt: skip
    return {**data, **other, **{key: _merged(*pair) for key, pair in both.items()}}


def _set_texts(data: dict[str, Any], texts: Mapping[str, Any]) -> None:
    if not texts:
        return
    stages = [data.get(stage) for stage in ("prepare", "distill")]
    trained_on = [stage["data"] for stage in stages if isinstance(stage, dict) and isinstance(stage.get("data"), dict)]
    for text in (data.setdefault("calibration", {}), *trained_on):
        if isinstance(text, dict):
            text |= texts


def _apply(data: dict[str, Any], setting: str) -> None:
    path, equals, value = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {setting!r} is not KEY.PATH=VALUE, such as solve.bits=3")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise InputError(f"--set {setting!r}: the value is not YAML") from e
    at: Any = data
    for key in keys[:-1]:
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise InputError(f"--set {setting!r}: {key} is not a group of keys")
    at[keys[-1]] = parsed


def _explain(error: Any) -> str:
    where = [str(part) for part in error["loc"] if part not in METHODS]  # the union's tag is no key
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(error["loc"][:-1])
        near = get_close_matches(where[-1], known, n=1)
        return f"unknown key {'.'.join(where)}" + (
            f", did you mean {near[0]}?" if near else f" (known: {', '.join(known)})"
        )
    if error["type"] == "union_tag_invalid":
        return f"{'.'.join(where)}.method is {error['ctx']['tag']}, expected one of {', '.join(METHODS)}"
    return f"{'.'.join(where)}: {error['msg'][0].lower()}{error['msg'][1:]} (found {error['input']!r})"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    tag = next((part for part in reversed(loc) if part in METHODS), None)
    if tag is not None:
        return [field.name for field in fields(METHODS[tag])]
    owner = {"calibration": CalibrationSpec, "overrides": Override}.get(str(loc[0]) if loc else "", Recipe)
    return list(owner.model_fields)
