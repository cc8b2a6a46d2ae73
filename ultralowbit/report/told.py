"""Results that somebody tells, of other programs or of runs that are gone, to stand beside the runs in a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ultralowbit.errors import InputError, reason
from ultralowbit.eval.base import Column
from ultralowbit.eval.schema import Record, first_mistake
from ultralowbit.recipe import read_yaml
from ultralowbit.report.schema import ComparedRow, Value

Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]

EXAMPLE = (
    '{source: llama.cpp b4500, rows: [{name: IQ2_XXS, bits: 2.06, file: 7.1e7, values: {"perplexity on x.txt": 75}}]}'
)


class ToldRow(Record):
    """One result. bits: of a weight of the packed Linears; file: bytes of the whole; values: by the names of what the
    comparison draws, such as "perplexity on wiki.test.raw"."""

    name: str
    bits: Number | None = None
    file: Number | None = None
    values: dict[str, float] = Field(min_length=1)


class Told(Record):
    """Results of which no folder is at hand. source: who tells them, and what was measured how; measured: whether with
    this package, so that sizes are true and rows are drawn as runs."""

    source: str
    measured: bool = False
    rows: list[ToldRow] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> Told:
        """Of a YAML file; raises `InputError` for any other."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({reason(error)}): give a YAML file such as {EXAMPLE}") from error
        try:
            return cls.model_validate(read_yaml(text, str(path)))
        except ValidationError as error:
            raise InputError(f"{path}: {first_mistake(error)}; expected something like {EXAMPLE}") from error

    def refuse_unknown(self, drawn: Iterable[str]) -> None:
        """Raise `InputError` for a value of something that no section draws."""
        known = list(dict.fromkeys(drawn))
        for row in self.rows:
            for name in row.values:
                if name not in known:
                    raise InputError(
                        f"{row.name} has a value for {name!r}, which no run was measured on, expected one of "
                        f"{', '.join(map(repr, known))}: correct it, or leave it out"
                    )

    def compared(self, columns: Sequence[Column]) -> list[ComparedRow]:
        """The rows that have a value of one of these columns."""
        keys = {column.drawn: column.key for column in columns if column.drawn}
        rows, kind = [], "run" if self.measured else "told"
        for row in self.rows:
            if measured := {keys[name]: value for name, value in row.values.items() if name in keys}:
                sizes = {"linear_bits": row.bits, "file_bytes": row.file}
                numbers = measured | {key: size for key, size in sizes.items() if size is not None}
                values = {key: Value(mean=number, values=[number]) for key, number in numbers.items()}
                rows.append(ComparedRow(label=row.name, kind=kind, metrics=values, budget={}, linear_weights=0))
        return sorted(rows, key=lambda row: -row.mean("linear_bits") if "linear_bits" in row.metrics else math.inf)

    def note(self, rows: Sequence[ComparedRow]) -> str:
        """What a comparison says of these rows."""
        names = ", ".join(row.label for row in rows)
        what = "of runs that are not at hand" if self.measured else "told, not measured here, and sizes are nominal"
        return f"{names}: {what}. {self.source}"
