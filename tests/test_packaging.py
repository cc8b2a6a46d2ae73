"""What an install holds, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("eval", "kernels", "recipes")


def test_every_folder_with_code_is_a_package_that_installs():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("ultralowbit", *MAPPED)
        for path in (ROOT / top).rglob("*.py")
    }
    assert listed == {name if name.startswith("ultralowbit") else f"ultralowbit.{name}" for name in on_disk}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"ultralowbit": "ultralowbit"} | {
        f"ultralowbit.{name}": name for name in MAPPED
    }
    for name in listed:
        folder = ROOT / name.replace(".", "/")
        mapped = ROOT / name.removeprefix("ultralowbit.").replace(".", "/")
        assert (folder if folder.is_dir() else mapped).joinpath("__init__.py").is_file(), name


def test_files_that_are_no_code_are_declared():
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    folders = {"ultralowbit": ROOT / "ultralowbit"} | {f"ultralowbit.{name}": ROOT / name for name in MAPPED}
    folders["ultralowbit.demo"] = ROOT / "ultralowbit/demo"
    for package, folder in folders.items():
        matched = {path for pattern in declared.get(package, []) for path in folder.glob(pattern)}
        below = {
            path
            for other in folders.values()
            if other != folder and folder in other.parents
            for path in other.rglob("*")
        }
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc", ".md", ".csv") and path not in below:
                assert path in matched, f"{path.relative_to(ROOT)} would not be in a wheel"


LOOK = """
import json, sys
sys.path[:] = [p for p in sys.path if p]  # as from another folder
import {module}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Top-level modules in a fresh process that imported `module`."""

    def look(module: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", LOOK.format(module=module)],
            cwd=tmp_path_factory.mktemp("elsewhere"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout.splitlines()[-1]))

    return look


def test_importing_the_package_is_cheap_and_leaves_no_name_behind(imported):
    names = imported("ultralowbit")
    assert "ultralowbit" in names
    heavy = {"triton", "lm_eval", "datasets", "matplotlib", "pandas", "pyarrow", "sklearn", "scipy", "typer", "rich"}
    assert not names & heavy
    assert not names & {"eval", "recipes", "tests"}


@pytest.mark.parametrize("name", ["eval", "recipes"])
def test_mapped_folders_are_no_modules_of_their_own(tmp_path, name):
    """`kernels` is a package of Hugging Face; ours must not be found in its place either."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr


def test_kernels_is_not_ours(tmp_path):
    script = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert str(ROOT / "kernels") not in done.stdout


def test_extras_name_what_is_imported_late():
    extras = PROJECT["project"]["optional-dependencies"]
    assert any(d.startswith("datasets") for d in extras["data"])
    assert any(d.startswith("lm-eval") for d in extras["eval"])
    assert not any(d.startswith(("triton", "lm-eval", "datasets")) for d in PROJECT["project"]["dependencies"])
