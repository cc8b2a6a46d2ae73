"""Recipes: YAML -> validated values. Every mistake is reported at once, with the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import Field, ValidationError

from ultralowbit.errors import InputError
from ultralowbit.methods import METHODS
from ultralowbit.methods.base import Method
from ultralowbit.training.specs import Blockwise, CalibrationSpec, Finetune, Preprocess, StrictModel, one_of

Quantize = one_of(METHODS, "method")


class Override(StrictModel):
    """Another method for the Linears whose full name matches."""

    match: str = Field(description="shell pattern on the full name, such as *.down_proj")
    quantize: Quantize


class Recipe(StrictModel):
    """What is done to each Linear of the decoder blocks, and on which text: the stages in the order of the fields, all
    but `quantize` optional."""

    name: str
    summary: str = ""
    preprocess: Preprocess | None = None
    quantize: Quantize
    blockwise: Blockwise | None = None
    finetune: Finetune | None = None
    calibration: CalibrationSpec = CalibrationSpec()
    ignore: tuple[str, ...] = Field((), description="shell patterns of Linears to leave as they are")
    overrides: tuple[Override, ...] = ()

    def method_for(self, name: str) -> Method:
        """The method of the Linear with this full name: the last matching override, or `quantize`."""
        matching = [override.quantize for override in self.overrides if fnmatch(name, override.match)]
        return (matching or [self.quantize])[-1]

    @property
    def reads_text(self) -> bool:
        """Whether a stage trains, or a method asks for statistics of inputs."""
        methods = (self.quantize, *(override.quantize for override in self.overrides))
        return any((self.preprocess, self.blockwise, self.finetune)) or any(method.needs for method in methods)

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
            raise InputError(f"{label} holds {type(data).__name__}, expected keys such as `quantize: {{method: gptq}}`")
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
    both = {
        key: (data[key], value)
        for key, value in other.items()
        if isinstance(value, dict) and isinstance(data.get(key), dict)
    }  # fmt: skip
    return {**data, **other, **{key: _merged(*pair) for key, pair in both.items()}}


def _set_texts(data: dict[str, Any], texts: Mapping[str, Any]) -> None:
    if not texts:
        return
    stages = [data.get(stage) for stage in ("preprocess", "finetune")]
    trained_on = [stage["data"] for stage in stages if isinstance(stage, dict) and isinstance(stage.get("data"), dict)]
    for text in (data.setdefault("calibration", {}), *trained_on):
        if isinstance(text, dict):
            text |= texts


def _apply(data: dict[str, Any], setting: str) -> None:
    path, equals, value = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {setting!r} is not KEY.PATH=VALUE, such as quantize.bits=3")
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
