"""What commands print: user text is never markup and never drives a terminal, and warnings always show."""

from __future__ import annotations

import io
import logging

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from ultralowbit.checkpoint.files import read_headers
from ultralowbit.cli import console
from ultralowbit.cli.app import app
from ultralowbit.cli.console import Watch, show_warnings, visible
from ultralowbit.cli.errors import explain
from ultralowbit.export.base import EXPORTERS

NAMES = ["out [x]", "a[/o]b", "[bold]", "esc\x1b[31m", "bell\x07"]


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """Stderr as a terminal without colours."""
    stream = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=stream, force_terminal=True, color_system=None, width=100))
    return stream


@pytest.fixture
def logged(monkeypatch):
    """The package's logger, whose handlers are put back."""
    log = logging.getLogger("ultralowbit")
    monkeypatch.setattr(log, "handlers", [])
    return log


def run(*args: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(args))


def commands() -> list[tuple[str, typer.core.TyperCommand]]:
    def below(group, path):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, f"{path} {name}")
            else:
                yield f"{path} {name}", command

    return list(below(typer.main.get_command(app), "ultralowbit"))


@pytest.mark.parametrize("name", NAMES)
def test_the_bar_shows_names_as_they_are(terminal, name):
    with Watch() as watch:
        watch.start(f"reading {name}", 2)
        watch.say(f"packed {name}")
        watch.step()
    shown = terminal.getvalue()
    assert f"reading {visible(name)}" in shown and f"packed {visible(name)}" in shown
    assert "\x1b[31m" not in shown and "\x07" not in shown


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quiet", [False, True])
def test_warnings_show_beside_the_bar_also_where_it_is_quiet(terminal, logged, name, quiet):
    show_warnings()
    show_warnings()  # a second command in one process
    with Watch(quiet) as watch:
        watch.start("blocks", 2)
        logging.getLogger("ultralowbit.pipeline.stream").warning("%s is too short", name)
    shown = terminal.getvalue()
    assert shown.count(f"{visible(name)} is too short") == 1 and "WARNING" in shown
    assert "\x1b[31m" not in shown and "\x07" not in shown


def test_quiet_shows_no_progress(terminal):
    with Watch(quiet=True) as watch:
        watch.start("blocks", 2)
        watch.counter("more")(1, 2)
        watch.say("packed")
    assert terminal.getvalue() == ""


def test_a_counter_is_a_stage_of_its_own(monkeypatch):
    watch = Watch(quiet=True)
    count = watch.counter("reading")
    assert watch.pace is None  # it begins when it is first called
    count(2, 5)
    count(5, 5)
    assert (watch.pace.what, watch.pace.done, watch.pace.total) == ("reading", 5, 5)


def test_running_out_of_memory_says_of_what(tmp_path, monkeypatch):
    allocator = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 45035 bytes. Error code 12 (Cannot allocate memory)"
    )
    said = explain(RuntimeError(allocator))
    assert "tried to allocate 45035 bytes" in said and "enforce" not in said and "Error code" not in said

    def unmappable(*args, **kwargs):
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("ultralowbit.checkpoint.files.safe_open", unmappable)
    with pytest.raises(MemoryError) as error:
        read_headers([tmp_path / "model.safetensors"])
    assert str(tmp_path / "model.safetensors") in explain(error.value)
    assert explain(error.value).startswith("out of memory while reading ")


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    for option, command in (("--json", "bench decode"), ("--json", "bench quantize"), ("--csv", "bench kernels")):
        for file in (tmp_path / "none" / "x", tmp_path):
            result = run(*command.split(), option, str(file))
            assert result.exit_code == 2 and result.stdout == "", result.output
            assert result.stderr.count("\n") == 1 and repr(str(file)) in result.stderr


def test_the_command_above_a_recipe_is_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my [red] recipe.yaml").write_text("quantize: {method: sign}\n")
    first, *others = run("recipes", "show", "my [red] recipe.yaml").stdout.splitlines()
    assert first == "# ultralowbit compress MODEL --recipe 'my [red] recipe.yaml' --out DIR"
    assert "method: sign" in "\n".join(others)


@pytest.mark.parametrize("path, command", commands(), ids=[path for path, _ in commands()])
def test_help_begins_with_a_verb_or_noun_and_has_an_example(path, command):
    no_beginning = {"a", "an", "and", "how", "if", "in", "of", "on", "the", "what", "where", "whether"}
    assert f"[bold]{path}" in command.help
    for text in (command.help, *(parameter.help for parameter in command.params)):
        assert text.split()[0].lower() not in no_beginning, text


def test_help_lists_the_exporters_and_exit_codes():
    assert ", ".join(EXPORTERS) in run("export", "--help").stdout
    shown = " ".join(run("--help").stdout.split())
    assert all(f"{code} " in shown.partition("Exit codes:")[2] for code in (0, 1, 2, 3, 4, 130))
