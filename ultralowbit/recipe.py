"""Recipes: YAML -> validated values. Every mistake is reported at once, with the nearest known key."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, get_args, get_type_hints

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator

from ultralowbit.errors import InputError
from ultralowbit.methods import METHODS
from ultralowbit.methods.allocation import Allocate
from ultralowbit.methods.base import Method
from ultralowbit.methods.embeddings import EMBEDDINGS
from ultralowbit.methods.error_correction import ErrorCorrection
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.output_feedback import OutputFeedback
from ultralowbit.methods.rotation import Rotate
from ultralowbit.methods.sign import Sign
from ultralowbit.methods.statistics import Need
from ultralowbit.training.specs import Blockwise, CalibrationSpec, Finetune, Preprocess, StrictModel, TextSpec, one_of

Quantize = one_of(METHODS, "method")


class Override(StrictModel):
    """Another method for the Linears whose full name matches."""

    match: str = Field(description="shell pattern on the full name, such as *.down_proj")
    quantize: Quantize


class Recipe(StrictModel):
    """What is done to each Linear of the decoder blocks, to the embedding and the head, and on which text: the stages
    in the order of the fields, all but `quantize` optional."""

    name: str
    summary: str = ""
    preprocess: Preprocess | None = None
    rotate: Rotate | None = None
    error_correction: ErrorCorrection | None = None
    allocate: Allocate | None = None
    output_feedback: OutputFeedback | None = None
    embeddings: one_of(EMBEDDINGS, "method") | None = None
    quantize: Quantize
    blockwise: Blockwise | None = None
    finetune: Finetune | None = None
    calibration: CalibrationSpec = CalibrationSpec()
    ignore: tuple[str, ...] = Field((), description="shell patterns of Linears to leave as they are")
    overrides: tuple[Override, ...] = Field(
        (),
        description="another method for the Linears whose full name matches, the last that does counts, such as "
        "[{match: '*.down_proj', quantize: {method: gptq, bits: 4}}]",
    )
    _planes: Mapping[str, int] = PrivateAttr(default_factory=dict)
    _folded: frozenset[str] = PrivateAttr(default=frozenset())

    @field_validator("rotate", mode="before")
    @classmethod
    def _may_be_off(cls, rotate: Any) -> Any:
        """`off`, which YAML reads as false, for all of it or for its inputs, is none."""
        inputs = rotate.get("inputs") if isinstance(rotate, dict) else rotate
        return None if inputs is False or inputs == "off" else rotate

    @model_validator(mode="after")
    def _can_correct(self) -> Recipe:
        if self.error_correction is not None and self.calibration.clip_tokens is not None:
            raise ValueError("error_correction counts all tokens alike: leave calibration.clip_tokens out")
        methods = (self.quantize, *(override.quantize for override in self.overrides))
        if self.error_correction is not None and not any(Need.HESSIAN in method.needs for method in methods):
            raise ValueError(
                f"error_correction fits Linears by their Hessian, which {self.quantize.method} as it is set does not "
                "take: leave it out, or choose a method that compensates, such as gptq or sign"
            )
        return self

    @model_validator(mode="after")
    def _has_planes(self) -> Recipe:
        if self.allocate is not None and (not isinstance(self.quantize, Sign) or self.quantize.tied):
            raise ValueError("allocate chooses planes: give it quantize: {method: sign, tied: false}")
        return self

    @model_validator(mode="after")
    def _hears_outputs(self) -> Recipe:
        methods = (self.quantize, *(override.quantize for override in self.overrides))
        if self.output_feedback is not None and not all(isinstance(method, GPTQ | Sign) for method in methods):
            raise ValueError("output_feedback goes with methods that pack each row on its own: gptq, sign")
        return self

    def method_for(self, name: str) -> Method:
        """The method of the Linear with this full name: the last matching override, or `quantize`, with the planes that
        were allocated to it."""
        matching = [override.quantize for override in self.overrides if fnmatch(name, override.match)]
        if matching:
            return matching[-1]
        return replace(self.quantize, planes=self._planes[name]) if name in self._planes else self.quantize

    def with_planes(self, planes: Mapping[str, int]) -> Recipe:
        """The recipe with so many planes for these Linears, by their full names."""
        recipe = self.model_copy()
        recipe._planes = dict(planes)
        return recipe

    def is_allocated(self, name: str) -> bool:
        """Whether the planes of the Linear with this full name are chosen by `allocate`."""
        return self.allocate is not None and not any(fnmatch(name, override.match) for override in self.overrides)

    def with_folded(self, names: frozenset[str]) -> Recipe:
        """The recipe for a model with rotations folded into the inputs of these modules, by their full names."""
        recipe = self.model_copy()
        recipe._folded = names
        return recipe

    def hadamard(self, name: str, in_features: int) -> int | None:
        """The block of the Hadamard matrix that multiplies so many inputs of the module with this full name where they
        enter it, None where there is none."""
        if self.rotate is None or self.rotate.others == "none" or name in self._folded:
            return None
        return self.rotate.block(in_features)

    @property
    def reads_text(self) -> bool:
        """Whether a stage trains, or a method asks for statistics of inputs."""
        methods = (self.quantize, *(override.quantize for override in self.overrides))
        return self.stage_reads_text or any(method.needs for method in methods)

    @property
    def stage_reads_text(self) -> bool:
        """Whether a stage beside `quantize` reads text, whatever the methods."""
        fitted = self.embeddings is not None and bool(self.embeddings.quantizer.needs)
        return fitted or any((self.preprocess, self.allocate, self.output_feedback, self.blockwise, self.finetune))

    @property
    def texts(self) -> dict[str, TextSpec]:
        """The texts that are read, by the stage that reads them first."""
        stages = {name: getattr(self, name) for name in ("preprocess", "finetune")}
        read = {name: stage.data for name, stage in stages.items() if stage is not None and stage.data is not None}
        return {"calibration": self.calibration, **read}

    @property
    def packed_windows(self) -> int:
        """Windows of the calibration text that are packed from, the first ones. Fine-tuning on the same text judges by
        the last: packing has fitted itself to what it has read, and there whatever is trained afterwards looks worse.
        Where blocks are trained, all are read, as by the papers."""
        samples = self.calibration.samples
        if self.finetune is None or self.finetune.data is not None or self.blockwise is not None:
            return samples
        return len(self.finetune.split(range(samples))[0])

    @property
    def sources(self) -> list[str]:
        """The texts that stages read, by name or path."""
        return list(dict.fromkeys(text for spec in self.texts.values() for text in spec.shares))

    def with_sources(self, rename: Callable[[str], str], stage: str | None = None) -> Recipe:
        """The recipe with each text's name or path, or that of one stage, replaced by what `rename` makes of it."""
        update: dict[str, Any] = {}
        for name, spec in self.texts.items():
            if stage in (None, name):
                new = spec.renamed(rename)
                trained = getattr(self, name)
                update[name] = new if name == "calibration" else trained.model_copy(update={"data": new})
        return self.model_copy(update=update)

    @property
    def changes(self) -> str:
        """What differs from the shipped recipe of this name, as settings; nothing in a recipe of one's own. Which text
        is read, and the bits in a name such as ulb-1.7bit, count as no change."""
        goal = re.fullmatch(r"(.+)-\d[\d.]*\s?\w+", self.name)
        name = goal[1] if goal and self.allocate is not None and self.name not in shipped() else self.name
        if name not in shipped():
            return ""
        own, said = self.model_dump(mode="json", exclude={"name", "summary"}), []
        for small in (False, True):
            base = Recipe.load(name, small=small).model_dump(mode="json")
            unlike = dict(_unlike(base, own))
            if name != self.name:
                unlike.pop("allocate.bits", None)
            values = {key: json.dumps(value).replace('"', "") for key, value in unlike.items()}
            said.append([f"{key}={v if len(v) <= 60 else v[:57] + '...'}" for key, v in values.items()])
        return ", ".join(min(said, key=len))

    @property
    def described(self) -> str:
        """The name, and what was changed in the shipped recipe of this name."""
        return f"{self.name}, with {self.changes}" if self.changes else self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def commented(self) -> str:
        """`to_yaml` with what each value means above it."""
        return "".join(f"{line}\n" for line in _commented(self, self.model_dump(mode="json")))

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
        data = read_yaml(text, label)
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
            recipe = cls.model_validate(data)
        except ValidationError as e:
            raise InputError(f"{label}: " + "; ".join(_explain(error, data) for error in e.errors())) from e
        if recipe.allocate is not None and any(key_of(setting) == "quantize.planes" for setting in settings):
            raise InputError(
                "--set quantize.planes says nothing where allocate chooses the planes of each Linear: set "
                "allocate.bits, or allocate=null too"
            )
        return recipe


class _Loader(yaml.SafeLoader):
    """Plain values alone: a few bytes of aliases can stand for gigabytes, and a date is no value of a recipe."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), expected every value to be written out")
        return super().compose_node(parent, index)


def read_yaml(text: str, label: str) -> Any:
    """The value of a YAML document without aliases and dates; for others an `InputError` that begins with `label`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise InputError(f"{label} is not plain YAML ({reason}): correct it") from e


def _unlike(base: Mapping[str, Any], own: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The keys, as `--set` names them, that `own` has other values for, but what reports tell of texts anyway."""
    told = ("source", "seed", "samples", "length") if place == "calibration." else ("source",)
    told += ("seed",) if place.endswith("data.") else ()
    for key, value in own.items():
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, dict) and key not in told:
            yield from _unlike(before, value, f"{place}{key}.")
        elif value != before and key not in told:
            yield place + key, value


def _commented(part: Any, plain: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Lines of YAML of a recipe's part, whose JSON values are `plain`, each with what its field or class says of it."""
    described = type(part).model_fields if isinstance(part, BaseModel) else {}
    for key, value in plain.items():
        inside = type(getattr(part, key))
        by_tag, absent = _classes(_annotation(type(part), key))
        about = described[key].description if key in described else None
        if about is None and (kind := inside if _keys(inside) else absent):
            about = kind.__doc__
        elif about is None and value is None and by_tag:
            about = f"null, or one of {', '.join(by_tag)}"
        for line in textwrap.wrap(" ".join((about or "").split()), 118 - len(indent), break_on_hyphens=False):
            yield f"{indent}# {line}"
        if _keys(inside):
            yield f"{indent}{key}:"
            yield from _commented(getattr(part, key), value, f"{indent}  ")
        else:
            text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True)
            yield from textwrap.indent(text, indent).splitlines()


def at_bits(name: str, bits: float | str, label: str) -> tuple[str, ...]:
    """Settings with which the recipe of this name shares out planes for so many bits, and is called after them."""
    return f"allocate.bits={bits}", f"name={name}-{label}"


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in files("ultralowbit.recipes").iterdir() if p.name.endswith(".yaml")
    )


def _recipe_text(name: str) -> tuple[str, str]:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        try:
            return Path(name).expanduser().read_text(encoding="utf-8"), name
        except (OSError, ValueError, RuntimeError) as e:  # no UTF-8, no file name, no such user's home
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


def key_of(setting: str) -> str:
    """Which key a setting is of."""
    return setting.partition("=")[0].strip()


def _apply(data: dict[str, Any], setting: str) -> None:
    _, equals, value = setting.partition("=")
    keys = key_of(setting).split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {setting!r} is not KEY.PATH=VALUE, such as quantize.bits=3")
    parsed = read_yaml(value, f"--set {setting!r}")
    at: Any = data
    for key in keys[:-1]:
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise InputError(f"--set {setting!r}: {key} is not a group of keys")
    at[keys[-1]] = parsed


def _explain(error: Any, data: Any) -> str:
    """A mistake that pydantic found in a recipe's data, in words; known keys and kinds are those of the place where it
    is, and where another place has a key of that name, it is told."""
    path, owner = _walk(error["loc"])
    where = ".".join(path) or "the recipe"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys(owner)
        elsewhere = [full for full in _full_keys(Recipe, data) if full.rpartition(".")[2] == path[-1]]
        near = [" or ".join(elsewhere)] if elsewhere else get_close_matches(path[-1], known, n=1)
        return f"unknown key {where}" + (f", did you mean {near[0]}?" if near else f" (known: {', '.join(known)})")
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        key, expected = (context[name].replace("'", "") for name in ("discriminator", "expected_tags"))
        return f"{where}.{key} is {context['tag']}, expected one of {expected}"
    if error["type"] == "union_tag_not_found":
        return f"{where} has no {error['ctx']['discriminator']}, expected one of {', '.join(_tags(owner, path[-1]))}"
    if error["type"] == "value_error":  # our own sentence, which says what it is about
        return f"{where}: {error['ctx']['error']}"
    value = repr(error["input"])
    shown = value if len(value) <= 100 else f"{value[:97]}..."
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]} (found {shown})"


def _walk(loc: tuple[Any, ...]) -> tuple[list[str], type]:
    """The keys of a place in a recipe, without the tags of unions that pydantic puts between them, and the class whose
    key the last one is."""
    owner: Any = Recipe
    kinds: dict[str, type] = {}
    path: list[str] = []
    inside: Any = Recipe
    for part in map(str, loc):
        if part in kinds:
            inside, kinds = kinds[part], {}
            continue
        path.append(part)
        owner = inside
        kinds, inside = _classes(_annotation(inside, part))
    return path, owner


def _full_keys(owner: Any, data: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a recipe's part with those of the parts in it, as `--set` names them."""
    for key in _keys(owner):
        yield key
        inside = data.get(key, {} if key == "calibration" else None)
        if isinstance(inside, Mapping):
            by_tag, plain = _classes(_annotation(owner, key))
            kind = by_tag.get(inside.get("method", inside.get("kind")), plain)
            yield from (f"{key}.{name}" for name in _full_keys(kind, inside))


def _annotation(owner: Any, key: str) -> Any:
    if not isinstance(owner, type):
        return None
    return get_type_hints(owner, include_extras=True).get(key) if key in _keys(owner) else owner


def _classes(annotation: Any) -> tuple[dict[str, type], Any]:
    """The classes that a field may hold by their tag, and the one without a tag."""
    by_tag: dict[str, type] = {}
    plain: Any = None
    parts = [annotation]
    while parts:
        part = parts.pop()
        if isinstance(part, type) and _keys(part):
            tags = [get_args(hint)[0] for name, hint in get_type_hints(part).items() if name in ("method", "kind")]
            if tags:
                by_tag[tags[0]] = part
            else:
                plain = part
        else:
            parts += get_args(part)
    return by_tag, plain


def _keys(owner: Any) -> list[str]:
    if isinstance(owner, type) and issubclass(owner, BaseModel):
        return list(owner.model_fields)
    return [field.name for field in fields(owner)] if is_dataclass(owner) else []


def _tags(owner: type, key: str) -> list[str]:
    return sorted(_classes(_annotation(owner, key))[0])
