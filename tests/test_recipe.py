"""Recipes: what ships parses, and every mistake of a recipe is told at once, with what was probably meant."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.resources import files

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ultralowbit.errors import InputError
from ultralowbit.methods import METHODS
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.recipe import Recipe, shipped
from ultralowbit.training.specs import CalibrationSpec

BASE = "name: mine\nquantize: {method: gptq, bits: 2}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def refused(name: str, *words: str, settings: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as error:
        Recipe.load(name, settings)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# --- shipped ---------------------------------------------------------------------------------------------------------


def test_recipes_are_shipped():
    assert {"gptq-2bit", "sign-1"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_parses_and_says_what_it_is(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.summary
    assert type(recipe.quantize) in METHODS.values()


@pytest.mark.parametrize("name", shipped())
def test_the_first_line_is_the_command_that_runs_it(name):
    first = (files("ultralowbit.recipes") / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# ultralowbit compress MODEL --recipe {name} --out DIR"


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_survives_being_written(name, tmp_path):
    recipe = Recipe.load(name)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_with_comments_is_the_same_and_says_what_each_part_means(name, tmp_path):
    recipe = Recipe.load(name)
    (tmp_path / "again.yaml").write_text(recipe.commented())
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    lines = recipe.commented().splitlines()
    for key in recipe.model_dump().keys() - {"name", "summary"}:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("# "), key


def test_every_method_has_a_recipe():
    assert {Recipe.load(name).quantize.method for name in shipped()} == set(METHODS)


# --- where recipes come from -----------------------------------------------------------------------------------------


def test_a_file_is_a_recipe_named_after_it(write):
    recipe = Recipe.load(write("quantize: {method: sign}"))
    assert recipe.name == "mine"
    assert recipe.quantize == Sign()
    assert recipe.calibration == CalibrationSpec()


def test_an_unknown_name_suggests_the_nearest():
    refused("gptq-2bits", "no recipe 'gptq-2bits'", "did you mean 'gptq-2bit'?")
    assert "did you mean" not in refused("qwertyuiop", "no recipe 'qwertyuiop'")


@pytest.mark.parametrize("name", ["./none.yaml", "none.yaml", "none.yml", "a/b", "/"])
def test_a_file_that_is_not_there_is_named(name):
    refused(name, repr(name), "cannot be read")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "NoneType"),
        ("just text", "str"),
        ("[1, 2]", "list"),
        ("a: [1", "not plain YAML"),
        ("a: b: c", "not plain YAML"),
        ("\ta: 1", "not plain YAML"),
        ("a: !!python/object:os.system x", "not plain YAML"),
    ],
)
def test_a_file_that_holds_no_recipe_is_refused(write, text, word):
    refused(write(text), "mine.yaml", word)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    refused(str(tmp_path / "x.yaml"), "cannot be read")


# --- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "calibratoin: {}", ["unknown key calibratoin", "did you mean calibration?"]),
        (BASE + "calibration: {sampels: 3}", ["unknown key calibration.sampels", "did you mean samples?"]),
        ("quantize: {method: gptq, bist: 2}", ["unknown key quantize.bist", "did you mean bits?"]),
        ("quantize: {method: sign, bits: 2}", ["unknown key quantize.bits"]),
        ("quantize: {method: rtn, zzz: 2}", ["unknown key quantize.zzz", "known: method, bits, group"]),
        (
            BASE + "overrides: [{match: '*', quantize: {method: rtn, bitts: 3}}]",
            ["quantize.bitts", "did you mean bits?"],
        ),
        (BASE + "overrides: [{mach: '*', quantize: {method: rtn}}]", ["overrides.0.mach", "did you mean match?"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_unknown_key_is_told_with_the_nearest(write, text, words):
    refused(write(text), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x", ["quantize", "required"]),
        ("quantize: {}", ["quantize", "method"]),
        ("quantize: {method: gtpq}", ["quantize.method is gtpq", "expected one of rtn, gptq, sign"]),
        ("quantize: gptq", ["quantize"]),
        ("quantize: {method: gptq, bits: 5}", ["quantize.bits", "found 5"]),
        ("quantize: {method: gptq, bits: two}", ["quantize.bits", "found 'two'"]),
        ("quantize: {method: gptq, group: 100}", ["quantize.group", "found 100"]),
        ("quantize: {method: gptq, damp: 0}", ["quantize.damp", "found 0"]),
        ("quantize: {method: gptq, damp: -1}", ["quantize.damp", "found -1"]),
        ("quantize: {method: sign, planes: 9}", ["quantize.planes", "found 9"]),
        ("quantize: {method: sign, iterations: -1}", ["quantize.iterations", "found -1"]),
        (BASE + "calibration: {samples: 0}", ["calibration.samples", "found 0"]),
        (BASE + "calibration: {length: 1}", ["calibration.length", "found 1"]),
        (BASE + "calibration: {seed: -1}", ["calibration.seed", "found -1"]),
        (BASE + "calibration: {clip_tokens: 1.5}", ["calibration.clip_tokens", "found 1.5"]),
        (BASE + "calibration: c4", ["calibration", "found 'c4'"]),
        (BASE + "ignore: lm_head", ["ignore", "found 'lm_head'"]),
        (BASE + "overrides: [{quantize: {method: rtn}}]", ["overrides.0.match", "required"]),
        (BASE + "overrides: [{match: '*'}]", ["overrides.0.quantize", "required"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_is_told_with_its_place(write, text, words):
    refused(write(text), "mine.yaml", *words)


KEYS = {  # of the table in which the mistake is, so that the sentence teaches the right names
    "calibration": "source, samples, length, seed, clip_tokens, autocast",
    "preprocess": "training, held_out, data, checkpointing, rank, alpha, dropout, targets, exclude",
    "quantize": "method, group, iterations, compensation, damp",
    "blockwise": "training, held_out, estimator, scales, latents, objective",
    "finetune": "training, held_out, data, checkpointing, estimator, scales, latents, objective",
    "preprocess.data": "source, samples, length, seed",
    "finetune.data": "source, samples, length, seed",
    "rotate": "inputs, others, tied, seed",
    "error_correction": "damp, residual",
}


@pytest.mark.parametrize("place", KEYS)
def test_a_typo_in_a_stage_lists_the_keys_of_that_stage(place):
    message = mistake([f"{place}.zzzz=1"])
    assert f"unknown key {place}.zzzz (known: {KEYS[place]})" in message


@pytest.mark.parametrize("setting", ["rotate=null", "rotate=off", "rotate.inputs=off", 'rotate.inputs="off"'])
def test_rotation_can_be_turned_off(setting):
    assert Recipe.load("ulb-fast").rotate is not None and Recipe.load("ulb-fast", [setting]).rotate is None


@pytest.mark.parametrize(
    ("setting", "kinds"),
    [
        ("finetune.objective.kind=msee", "ce, kl, dad, direction, lowrank"),
        ("blockwise.objective.kind=msee", "mse, mse_nlc"),
        ("quantize.method=msee", "rtn, gptq, sign, pb_llm, ptq161, billm, arb_rc, db_llm"),
    ],
)
def test_an_unknown_kind_lists_the_kinds_of_that_stage(setting, kinds):
    place = setting.partition("=")[0]
    assert f"{place} is msee, expected one of {kinds}" in mistake([setting])


def mistake(settings: list[str]) -> str:
    with pytest.raises(InputError) as caught:
        Recipe.load("db-llm", settings)
    return str(caught.value)


def test_all_mistakes_are_told_at_once(write):
    text = "quantize: {method: gptq, bits: 7, bist: 2}\ncalibration: {samples: 0, lenght: 4}\nsumary: x"
    message = refused(
        write(text), "quantize.bits", "quantize.bist", "calibration.samples", "calibration.lenght", "sumary"
    )
    assert message.count(";") == 4


def test_null_is_the_whole_row(write):
    assert Recipe.load(write("quantize: {method: gptq, bits: 2, group: null}")).quantize == GPTQ(bits=2, group=None)


def _choices(schema) -> Iterator[str]:
    """Every word that a recipe's key may have, where it may not have any."""
    if isinstance(schema, list):
        for part in schema:
            yield from _choices(part)
    elif isinstance(schema, dict):
        yield from (word for word in schema.get("enum", []) if isinstance(word, str))
        for part in schema.values():
            yield from _choices(part)


def test_words_need_no_quotes(write):
    """YAML reads `on`, `off`, `yes` and `no` as truth values."""
    words = {word for word in _choices(Recipe.model_json_schema()) if yaml.safe_load(word) != word}
    assert words == {"on", "off"}
    training = "blockwise: {objective: {kind: mse}, training: {lr: {scale: 1.0e-3}, autocast: %s}}"
    for word in words:
        assert Recipe.load(write(BASE + training % word)).blockwise.training.autocast == word


# --- --set -----------------------------------------------------------------------------------------------------------


def test_settings_replace_values_before_they_are_checked(write):
    settings = (
        "quantize.bits=3",
        "quantize.group=null",
        "quantize.symmetric=true",
        "calibration.source=./text.txt",
        "calibration.clip_tokens=0.999",
        "ignore=['*down_proj', \"x.*\"]",
        "name=other",
    )
    recipe = Recipe.load(write(BASE), settings)
    assert recipe.quantize == GPTQ(bits=3, group=None, symmetric=True)
    assert recipe.calibration == CalibrationSpec(source="./text.txt", clip_tokens=0.999)
    assert recipe.ignore == ("*down_proj", "x.*")
    assert recipe.name == "other"


def test_a_text_may_be_several_with_shares(write):
    recipe = Recipe.load(write(BASE), ["calibration.source={wikitext2: 1, ./my.txt: 2.5, self: 1.5}"])
    assert recipe.calibration.shares == {"wikitext2": 0.2, "./my.txt": 0.5, "self": 0.3}
    assert recipe.calibration.named == "wikitext2 (20 %), ./my.txt (50 %) and self (30 %)"
    assert recipe.sources == ["wikitext2", "./my.txt", "self"]
    assert recipe.with_sources(str.upper).sources == ["WIKITEXT2", "./MY.TXT", "SELF"]
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    one = CalibrationSpec(source={"c4": 3})
    assert (one.named, [*one.dealt()]) == ("c4 (100 %)", ["c4"] * 128)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(200, 400))
def test_every_first_part_of_the_windows_has_each_text_by_its_share(shares, samples):
    spec = CalibrationSpec(source={str(i): share for i, share in enumerate(shares)}, samples=samples)
    counts = dict.fromkeys(spec.shares, 0)
    for i, text in enumerate(spec.dealt(), 1):
        counts[text] += 1
        assert all(abs(counts[name] - share * i) < len(shares) for name, share in spec.shares.items())
    assert sum(counts.values()) == samples and all(
        abs(counts[n] - s * samples) < 1 + 1e-9 for n, s in spec.shares.items()
    )


def test_as_many_windows_as_one_likes_take_no_time_to_check():
    spec = CalibrationSpec(source={"c4": 1, "ptb": 3}, samples=10**9)
    assert [*itertools.islice(spec.dealt(), 4)].count("ptb") == 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("5", "calibration.source: expected a text, or several with shares: {wikitext2: 1, c4: 3} (found 5)"),
        ("{}", "expected a text, or several with shares"),
        ("[c4]", "expected a text, or several with shares"),
        ("{5: 1}", "expected a text, or several with shares"),
        ("{c4: 0}", "the share of c4 should be a number above 0"),
        ("{c4: .nan}", "the share of c4 should be a number above 0"),
        ("{c4: true}", "the share of c4 should be a number above 0"),
        ("{c4: 1, ptb: 9000}", "c4 would get none of 128 windows: give it a larger share, or more samples"),
    ],
)
def test_shares_that_make_no_sense_are_refused(write, value, words):
    refused(write(BASE), words, settings=(f"calibration.source={value}",))


def test_texts_whose_reports_could_not_tell_them_apart_are_refused(write, tmp_path):
    paths = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("words")
    setting = f"calibration.source={{{paths[0]}: 1, {paths[1]}: 1}}"
    refused(write(BASE), "two texts are called text.txt: rename one", settings=(setting,))


def test_a_later_setting_wins_and_may_hold_an_equals_sign(write):
    recipe = Recipe.load(write(BASE), ["quantize.bits=3", "quantize.bits=4", "summary=a=b"])
    assert recipe.quantize.bits == 4
    assert recipe.summary == "a=b"


@pytest.mark.parametrize("setting", ["quantize.bits", "=3", "quantize..bits=3", ".=1", "", "quantize.=3"])
def test_a_setting_without_key_or_value_is_refused(write, setting):
    refused(write(BASE), f"--set {setting!r} is not KEY.PATH=VALUE", settings=(setting,))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("quantize.bits=[1", ["not plain YAML"]),
        ("name.first=x", ["name is not a group of keys"]),
        ("quantize.method.x=3", ["method is not a group of keys"]),
        ("quantize.bist=3", ["unknown key quantize.bist", "did you mean bits?"]),
        ("quantize.bits=5", ["quantize.bits", "found 5"]),
        ("bits=3", ["unknown key bits, did you mean quantize.bits?"]),
        ("quantize.samples=3", ["unknown key quantize.samples, did you mean calibration.samples?"]),
        ("calibration.samples=many", ["calibration.samples", "found 'many'"]),
        ("overrides.0.quantize.bits=3", ["overrides"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_does_not_fit_is_refused(write, setting, words):
    refused(write(BASE + "overrides: [{match: '*', quantize: {method: rtn}}]"), *words, settings=(setting,))


def test_planes_that_allocate_would_override_cannot_be_set():
    refused("ulb", "--set quantize.planes says nothing where allocate", settings=("quantize.planes=3",))
    assert Recipe.load("ulb", ["quantize.planes=3", "allocate=null"]).quantize.planes == 3


def test_errors_are_corrected_only_where_a_method_compensates():
    refused("rtn-4bit", "which rtn as it is set does not take", settings=("error_correction={}",))
    override = "overrides=[{match: '*down_proj', quantize: {method: gptq}}]"
    assert Recipe.load("rtn-4bit", ["error_correction={}", override]).error_correction


def test_a_setting_can_change_the_method(write):
    recipe = Recipe.load(write("quantize: {method: gptq}"), ["quantize.method=rtn", "quantize.bits=8"])
    assert recipe.quantize == RTN(bits=8)


@pytest.mark.parametrize(
    ("name", "settings", "described"),
    [
        ("sign-2", ["quantize.group=64"], "sign-2, with quantize.group=64"),
        ("sign-2", ["calibration.samples=3", "calibration.source=x.txt", "summary=mine"], "sign-2"),
        ("sign-2", ["name=mine", "quantize.group=64"], "mine"),
        ("ulb", ["name=ulb-1.7bit", "allocate.bits=1.7", "embeddings=null"], "ulb-1.7bit, with embeddings=null"),
        ("ulb-best", ["finetune.data.samples=9", "finetune.data.seed=9"], "ulb-best, with finetune.data.samples=9"),
        ("sign-2", ["finetune={training: {lr: {scale: 0.1}}, objective: {kind: kl}}"], "sign-2, with finetune={"),
    ],
)
def test_what_was_changed_in_a_shipped_recipe_is_said(name, settings, described, tmp_path):
    recipe = Recipe.load(name, settings)
    assert recipe.described == described or (described.endswith("{") and recipe.described.startswith(described))
    (tmp_path / "edited.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "edited.yaml").changes == recipe.changes


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_unchanged(name):
    assert not any(Recipe.load(name, small=small).changes for small in (False, True))


# --- which method ----------------------------------------------------------------------------------------------------


def test_the_last_matching_override_decides(write):
    overrides = [
        {"match": "*.mlp.*", "quantize": {"method": "sign"}},
        {"match": "*down_proj", "quantize": {"method": "rtn", "bits": 3}},
        {"match": "model.layers.[01].*", "quantize": {"method": "rtn", "bits": 8}},
    ]
    recipe = Recipe.load(write(BASE + yaml.safe_dump({"overrides": overrides})))
    assert recipe.method_for("model.layers.5.self_attn.q_proj") == GPTQ(bits=2)
    assert recipe.method_for("model.layers.5.mlp.up_proj") == Sign()
    assert recipe.method_for("model.layers.5.mlp.down_proj") == RTN(bits=3)
    assert recipe.method_for("model.layers.1.mlp.down_proj") == RTN(bits=8)
    assert recipe.method_for("model.layers.11.self_attn.q_proj") == GPTQ(bits=2)


def test_recipes_do_not_change():
    recipe = Recipe.load("gptq-2bit")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "x"
    with pytest.raises((ValueError, AttributeError)):
        recipe.quantize.bits = 4


@pytest.mark.parametrize(("name", "reads"), [("rtn-4bit", False), ("gptq-2bit", True), ("db-llm", True)])
def test_what_reads_text(name, reads):
    """Statistics for the method, or windows to train on."""
    assert Recipe.load(name).reads_text is reads


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_has_sound_values_for_small_models(name):
    usual, small = Recipe.load(name), Recipe.load(name, small=True)
    trains = any((usual.preprocess, usual.blockwise, usual.finetune))
    assert (usual != small) == trains  # what is only solved suits any size
    assert usual.quantize == small.quantize


def test_small_values_take_the_place_of_the_others_group_by_group(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "quantize: {method: gptq, bits: 2, group: 64}\n"
        "small: {quantize: {group: 32}, calibration: {samples: 3}}\n"
        "calibration: {samples: 9, length: 7}\n"
    )
    usual, small = (Recipe.load(tmp_path / "r.yaml", small=small) for small in (False, True))
    assert (usual.quantize.group, usual.calibration.samples) == (64, 9)
    assert (small.quantize.bits, small.quantize.group) == (2, 32)
    assert (small.calibration.samples, small.calibration.length) == (3, 7)
    assert Recipe.load(tmp_path / "r.yaml", ["quantize.group=128"], small=True).quantize.group == 128
    assert "small" not in yaml.safe_load(small.to_yaml())


@pytest.mark.parametrize("text", ["small: 3", "small: [a]", "small: {sovle: {}}"])
def test_small_values_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(f"quantize: {{method: rtn}}\n{text}\n")
    with pytest.raises(InputError, match=r"small holds|unknown key sovle"):
        Recipe.load(tmp_path / "r.yaml", small=True)


def test_values_of_texts_are_for_those_that_stages_train_on_too():
    recipe = Recipe.load("ptq161", texts={"source": "my.txt", "seed": 5})
    assert (recipe.calibration.source, recipe.calibration.seed) == ("my.txt", 5)
    assert (recipe.preprocess.data.source, recipe.preprocess.data.seed, recipe.preprocess.data.samples) == (
        "my.txt",
        5,
        20000,
    )
    recipe = Recipe.load("ptq161", ["preprocess.data.source=c4"], texts={"source": "my.txt"})
    assert (recipe.calibration.source, recipe.preprocess.data.source) == ("my.txt", "c4")  # a setting goes before them
    assert Recipe.load("db-llm", texts={"source": "my.txt"}).finetune.data is None


def test_a_recipe_that_an_earlier_version_wrote_is_read(write):
    """Its texts to train on had a key of calibration's, which was always null."""
    stage = "finetune: {objective: {kind: kl}, training: {lr: {scale: 1.0e-3}}, data: {source: c4, clip_tokens: %s}}"
    assert Recipe.load(write(BASE + stage % "null")).finetune.data.source == "c4"
    refused(write(BASE + stage % "0.5"), "finetune.data.clip_tokens")
