"""Arrows point one way: which of our packages each one may import, and which foreign packages only some may name."""

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
ALLOWED = {
    "errors": "",
    "units": "errors",
    "progress": "",
    "system": "errors",
    "format": "errors",
    "kernels": "format errors",
    "checkpoint": "format errors progress",
    "hub": "checkpoint errors",
    "nn": "kernels checkpoint format errors",
    "data": "nn checkpoint errors progress",
    "methods": "kernels format errors",
    "training": "methods nn kernels data checkpoint format errors progress system",
    "recipe": "training methods errors",
    "pipeline": "recipe training methods data nn kernels checkpoint format hub system errors progress units",
    "eval": "nn data checkpoint format hub system errors progress units",
    "export": "nn checkpoint format hub errors progress units",
    "serve": "nn checkpoint format hub errors",
    "report": "eval export pipeline recipe training methods data nn checkpoint format hub system errors progress units",
    "bench": "serve report eval export pipeline recipe training methods data nn kernels checkpoint format hub system "
    "errors progress units",
    "demo": "bench report eval pipeline recipe data nn checkpoint format hub system errors progress units",
    "cli": "demo bench serve report export eval pipeline recipe training methods data nn kernels checkpoint format hub "
    "system errors progress units",
    "": "nn pipeline recipe",  # ultralowbit/__init__.py, lazily
    "__main__": "cli",
}
"""Package or module at the root -> the others that it may import, beside itself."""


def modules() -> dict[str, Path]:
    paths = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            paths[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return paths


MODULES = modules()


def imports(path: Path, late: bool = True) -> set[str]:
    """Full names of what a file imports; without `late`, of what it imports when it is itself imported."""
    names = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not late:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update({n for n in full if n in MODULES} or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def ours(name: str, late: bool = True) -> set[str]:
    names = imports(MODULES[name], late)
    return {n.removeprefix("ultralowbit").removeprefix(".") for n in names if n.partition(".")[0] == "ultralowbit"}


def foreign(name: str, late: bool = True) -> set[str]:
    tops = {n.partition(".")[0] for n in imports(MODULES[name], late)}
    return tops - set(sys.stdlib_module_names) - {"ultralowbit", "__future__"}


def package(name: str) -> str:
    """The package, or the module at the root, that a module belongs to."""
    return name.removeprefix("ultralowbit").removeprefix(".").partition(".")[0]


def within(*packages: str) -> list[str]:
    return sorted(name for name in MODULES if package(name) in packages)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_allowed_arrows(name):
    if package(name) == "recipes":
        assert ours(name) == set()
        return
    allowed = {package(name), "", *ALLOWED[package(name)].split()}
    others = {package(other) for other in ours(name)} - allowed
    assert not others, f"{name} imports {', '.join(sorted(others))}"


def test_every_package_has_its_arrows():
    assert {package(name) for name in MODULES} - {"recipes"} == ALLOWED.keys()


def test_packages_form_no_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in ALLOWED[name].split():
                visit(other, (*above, name))
            done.add(name)

    for name in ALLOWED:
        visit(name, ())


def test_no_module_needs_itself():
    graph = {n.removeprefix("ultralowbit").removeprefix("."): ours(n, late=False) for n in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in graph.get(name, ()):
                if other not in (name, ""):
                    visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", within("format"))
def test_the_format_needs_torch_alone(name):
    assert foreign(name) <= {"torch"}


@pytest.mark.parametrize("name", within("kernels"))
def test_kernels_need_torch_and_triton_alone(name):
    assert foreign(name) <= {"torch", "triton"}


@pytest.mark.parametrize("name", within("methods"))
def test_methods_need_torch_and_pydantic_alone(name):
    assert foreign(name) <= {"torch", "pydantic"}


def test_naming_the_kernels_imports_nothing():
    assert imports(MODULES["ultralowbit.kernels"]) == set()


def test_the_pipeline_names_no_method():
    for name in within("pipeline"):
        assert not {n for n in ours(name) if n.startswith("methods.") and n.split(".")[1] in METHODS}, name
        nodes = ast.walk(ast.parse(MODULES[name].read_text()))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not texts & set(METHODS), name


@pytest.mark.parametrize("optional", ["triton", "lm_eval", "datasets", "matplotlib", "gguf", "vllm"])
def test_optional_packages_are_imported_where_they_are_used(optional):
    for name in MODULES:
        # of which the one is imported by a function where Triton is, and the other by vLLM
        if not name.startswith(("ultralowbit.kernels.gpu", "ultralowbit.serve.vllm")):
            assert optional not in foreign(name, late=False), name


def test_what_knows_of_architectures_stays_in_its_files():
    assert {n for n in MODULES if "accelerate" in foreign(n)} <= {"ultralowbit.nn.decoder", "ultralowbit.nn.original"}
    assert {n for n in MODULES if "lm_eval" in foreign(n)} == {"ultralowbit.eval.zeroshot"}


def test_files_and_functions_are_short():
    for name, path in MODULES.items():
        source = path.read_text()
        assert len(source.splitlines()) <= 450, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_the_root_holds_few_modules():
    assert len(list((ROOT / "ultralowbit").glob("*.py"))) <= 8
