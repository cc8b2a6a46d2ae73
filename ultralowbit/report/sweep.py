"""`ultralowbit bench methods`: recipes on models and seeds, in one table, and what is left of each model by tracks."""

from __future__ import annotations

from pathlib import Path

from ultralowbit.errors import InputError
from ultralowbit.eval import zeroshot
from ultralowbit.progress import Progress
from ultralowbit.report import style
from ultralowbit.report.comparison import may_write, write_comparison
from ultralowbit.report.schema import Comparison
from ultralowbit.report.sweep_runs import Methods, Sweep
from ultralowbit.report.sweep_tracks import sweep_tracks


def run_sweep(
    wanted: Methods,
    out: Path,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    watch: Progress,
    command: str | None = None,
) -> Comparison:
    """Run all, into folders of `out/runs`, and write the comparison of `compare` with the tracks into `out`.

    What is there already is not run again. A recipe that fails on a model is noted in the table, and the others go on;
    one that reads no text is run with one seed, since others would give the same bytes. Raises `InputError` where two
    models or recipes have one name, or nothing came of any run.
    """
    style.require()
    out = out.expanduser()
    may_write(out)
    questions = None
    if wanted.tasks:
        zeroshot.require()
        questions = zeroshot.read_tasks(wanted.tasks.tasks, wanted.tasks.tasks_dir, watch.counter)
    recipes = {name: wanted.recipe(name, wanted.seeds[0]).name for name in wanted.recipes}
    names = [_name(model) for model in wanted.models]
    for what, labels in (("models", names), ("recipes", [*recipes.values()])):
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise InputError(f"two of the {what} are called {twice}: rename one, their results could not be told apart")
    sweep = Sweep(wanted, out, device, restart, trust_remote_code, watch, {name: {} for name in names})
    total = len(names) * len(recipes)
    for i, (model, name) in enumerate(zip(wanted.models, names, strict=True)):
        for k, (recipe, label) in enumerate(recipes.items(), 1):
            watch.say(f"{name}, {label} ({i * len(recipes) + k} of {total})")
            sweep.run(model, name, recipe, label)
    folders = [folder for of_model in sweep.results.values() for one in of_model.values() for folder in one.folders]
    if not folders:
        raise InputError(f"every run failed, the first one with: {sweep.failed[0].error}")
    for of_model in sweep.results.values() if questions else ():
        sweep.ask(questions, of_model.values())
    tracks = sweep_tracks(sweep) if wanted.with_tracks else None
    title = f"{len(recipes)} recipes on {', '.join(names)}"
    return write_comparison(folders, out, command=command, failed=sweep.failed, title=title, tracks=tracks)


def _name(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model.partition("@")[0].replace("/", "-")
