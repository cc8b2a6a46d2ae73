"""Arrows point one way: which of our modules each one may import, and which foreign packages only some may name."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from ultralowbit.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ultralowbit": ROOT / "ultralowbit"} | {
    f"ultralowbit.{name}": ROOT / name for name in ("eval", "kernels", "recipes")
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def imports(path: Path, late: bool = True) -> set[str]:
    """Full names of what a file imports; without `late`, of what it imports when it is itself imported."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not late:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update({n for n in names if n in MODULES} or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def ours(name: str) -> set[str]:
    return {n.removeprefix("ultralowbit.") for n in imports(MODULES[name]) if n.partition(".")[0] == "ultralowbit"}


def foreign(name: str, late: bool = True) -> set[str]:
    tops = {n.partition(".")[0] for n in imports(MODULES[name], late)}
    return tops - set(sys.stdlib_module_names) - {"ultralowbit", "__future__"}


def test_the_format_is_the_ground_floor():
    assert foreign("ultralowbit.format") == {"torch"}
    assert ours("ultralowbit.format") == set()


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("ultralowbit.kernels.")))
def test_kernels_know_the_format_only(name):
    assert {n for n in ours(name) if not n.startswith("kernels")} <= {"format"}
    assert foreign(name) <= {"torch", "triton"}


def test_naming_the_kernels_imports_nothing():
    assert imports(MODULES["ultralowbit.kernels"]) == set()


def test_statistics_know_nothing_of_ours():
    assert ours("ultralowbit.stats") == set()
    assert foreign("ultralowbit.stats") == {"torch"}


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("ultralowbit.methods")))
def test_methods_know_formats_and_statistics_only(name):
    assert {n for n in ours(name) if not n.startswith("methods")} <= {"format", "stats"}
    assert foreign(name) <= {"torch", "pydantic"}


@pytest.mark.parametrize("name", ["estimators", "objectives", "view", "loop"])
def test_the_engine_of_tuning_knows_no_model(name):
    name = f"ultralowbit.blockwise.{name}"
    allowed = {"format", "methods.base", "text", "progress", "checkpoint"}
    assert {n for n in ours(name) if not n.startswith("blockwise")} <= allowed
    assert foreign(name) <= {"torch", "pydantic", "safetensors"}


def test_layers_know_formats_and_kernels_only():
    assert ours("ultralowbit.linear") == {"format", "kernels.packed_matmul"}


def test_stacks_know_layers_and_kernels_only():
    assert ours("ultralowbit.fused") == {"linear", "kernels.packed_matmul"}


def test_the_loader_knows_layers_and_formats_only():
    assert ours("ultralowbit.hf") == {"format", "fused", "linear"}


def test_the_pipeline_names_no_method():
    assert not {n for n in ours("ultralowbit.pipeline") if n.startswith("methods.")}
    texts = {node.value for node in ast.walk(ast.parse(MODULES["ultralowbit.pipeline"].read_text())) if _is_text(node)}
    assert not texts & set(METHODS)


@pytest.mark.parametrize("name", sorted(n for n in MODULES if f"{n}.".startswith("ultralowbit.eval.")))
def test_evaluation_looks_at_packed_models_from_outside(name):
    allowed = {"checkpoint", "format", "hf", "linear", "text", "hub", "kernels.packed_matmul"}
    assert {n for n in ours(name) if not n.startswith("eval")} <= allowed


def test_nothing_imports_the_command_line():
    for name in MODULES:
        if name not in ("ultralowbit.__main__", "ultralowbit.cli"):
            assert "cli" not in ours(name), name


@pytest.mark.parametrize(
    "name", ["format", "stats", "methods", "blockwise", "kernels", "linear", "hf", "model", "pipeline", "recipe"]
)
def test_the_lower_floors_do_not_look_up(name):
    upper = {
        "cli", "evaluation", "console", "report", "compare", "plots", "card", "plan", "measure", "verify", "bench",
        "bench_methods", "demo",
    }  # fmt: skip
    for module in MODULES:
        if module == f"ultralowbit.{name}" or module.startswith(f"ultralowbit.{name}."):
            assert not {n.partition(".")[0] for n in ours(module)} & upper, module


def test_no_module_needs_itself():
    graph = {n.removeprefix("ultralowbit").removeprefix(".") or "ultralowbit": ours(n) for n in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for other in graph.get(name, ()):
            if other != name and other != "ultralowbit":
                visit(other, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("package", ["triton", "lm_eval", "datasets", "matplotlib"])
def test_optional_packages_are_imported_where_they_are_used(package):
    for name in MODULES:
        assert package not in foreign(name, late=False) or name.startswith("ultralowbit.kernels.triton"), name


def test_only_the_model_file_builds_decoders():
    """What accelerate and transformers' Conv1D know of architectures stays in the files that are about them."""
    assert {n.removeprefix("ultralowbit.") for n in MODULES if "accelerate" in foreign(n)} <= {"model"}


def test_only_evaluation_knows_lm_eval():
    assert {n for n in MODULES if "lm_eval" in foreign(n)} == {"ultralowbit.eval.zeroshot"}
