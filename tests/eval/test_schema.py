"""JSON files are read back as they were written, and a damaged one is one sentence that names the file and the key."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ultralowbit.errors import InputError
from ultralowbit.eval.fidelity import Fidelity
from ultralowbit.eval.metric import METRICS
from ultralowbit.eval.perplexity import Perplexity
from ultralowbit.eval.schema import SCHEMA_VERSION, Evaluation, ModelResults, read_file, strict, to_json, write_file

HOW = {"source": "t", "windows": 2, "context": 8, "tokens": 14, "dtype": "float32", "sha256": "ab"}


def evaluation(perplexity: float = 3.5) -> Evaluation:
    measured = Perplexity(**HOW, perplexity=perplexity, nll=math.log(perplexity) if perplexity > 0 else perplexity)
    near = Fidelity(**HOW, original_dtype="bfloat16", kl_mean=0.1, kl_median=0.05, kl_p99=1.0, top1=0.9)
    row = ModelResults(model="m", metrics={"perplexity": [measured], "fidelity": [near]}, noise_floor={})
    return Evaluation(created="today", environment={"torch": "2"}, fidelity_to="o", results=[row])


@pytest.mark.parametrize("perplexity", [3.5, math.inf])
def test_what_is_written_is_read_back(tmp_path, perplexity):
    write_file(tmp_path / "eval.json", evaluation(perplexity))
    assert read_file(tmp_path / "eval.json", Evaluation, "") == evaluation(perplexity)
    text = (tmp_path / "eval.json").read_text()
    stored = json.loads(text, parse_constant=pytest.fail)
    (read,) = stored["results"][0]["metrics"]["perplexity"]
    assert read["perplexity"] == (perplexity if math.isfinite(perplexity) else "inf")


def test_nan_comes_back_too(tmp_path):
    write_file(tmp_path / "eval.json", evaluation(math.nan))
    (read,) = read_file(tmp_path / "eval.json", Evaluation, "").results[0].metrics["perplexity"]
    assert math.isnan(read.perplexity) and math.isnan(read.nll)
    assert strict({"a": [math.nan, (1.0, math.inf)]}) == {"a": ["nan", [1.0, "inf"]]}


def change(stored: dict, *keys) -> dict:
    """A copy with the value at the keys replaced by the last one of them, or removed where that is Ellipsis."""
    *path, key, value = keys
    copied = deepcopy(stored)
    place = copied
    for step in path:
        place = place[step]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return copied


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("schema_version", 1), f"another release (schema_version 1, expected {SCHEMA_VERSION})"),
        (("kind", "run"), "(kind: "),
        (("results", ...), "(results: Field required)"),
        (("results", 0, "metrics", "perplexity", 0, "nll", "x"), "(results.0.metrics: perplexity.nll: "),
        (("results", 0, "metrics", "perplexity", 0, "nll", ...), "(results.0.metrics: perplexity.nll: "),
        (("results", 0, "metrics", "perplexity", 7), "(results.0.metrics: perplexity: expected a list)"),
        (("results", 0, "metrics", "speed", []), "speed is no metric of this release, which has perplexity, fidelity)"),
        (("results", 0, "other", 1), "(results.0.other: "),
        (("results", 0, "tasks", {"scores": 1}), "(results.0.tasks.scores: "),
    ],
)
def test_damage_is_one_sentence(tmp_path, keys, said):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(change(to_json(evaluation()), *keys)))
    with pytest.raises(InputError) as caught:
        read_file(path, Evaluation, "measure again")
    assert said in str(caught.value) and str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(": measure again") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"[", b"[]", b"7", b"\xff\xfe{}", b"[" * 100_000, b"{}", b'{"a": ' + b"9" * 9000 + b"}"]
)
def test_what_is_no_such_file_is_one_sentence(tmp_path, text):
    (tmp_path / "eval.json").write_bytes(text)
    for path in (tmp_path / "eval.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="measure again") as caught:
            read_file(path, Evaluation, "measure again")
        assert "\n" not in str(caught.value)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}), st.just([[1]])
)


def places(value, at=()):
    """Every key path of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*at, key)
        yield from places(each, (*at, key))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(tmp_path, data):
    stored = to_json(evaluation())
    keys = data.draw(st.sampled_from([*places(stored)]))
    (tmp_path / "eval.json").write_text(json.dumps(change(stored, *keys, data.draw(VALUES | st.just(...)))))
    try:
        read = read_file(Path(tmp_path / "eval.json"), Evaluation, "measure again")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(
            isinstance(r, METRICS[n].result) for row in read.results for n, of in row.metrics.items() for r in of
        )
