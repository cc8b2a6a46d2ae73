"""What an install holds, and what importing it costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
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
    known = {".py", ".pyc", ".md", ".csv", ".png", ".cpp", ".h", ".so"}  # of these, a wheel has what is compiled
    matched, others = set(), set()
    for package, patterns in declared.items():
        parts = package.split(".")[1:]
        folder = ROOT.joinpath(*parts) if parts and parts[0] in MAPPED else ROOT.joinpath("ultralowbit", *parts)
        matched |= {path for pattern in patterns for path in folder.glob(pattern)}
    for top in ("ultralowbit", *MAPPED):
        others |= {path for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix not in known}
    assert {path.relative_to(ROOT) for path in others - matched} == set(), "would not be in a wheel"
    assert matched


def test_a_wheel_holds_every_file_under_one_name(tmp_path, monkeypatch):
    """Where nothing compiles, too: without its kernels the package runs the reference."""
    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(compiler, "no-such-compiler")
    backend = pytest.importorskip("setuptools.build_meta")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for top in ("ultralowbit", *MAPPED):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        names = set(zipfile.ZipFile(backend.build_wheel(".")).namelist())
    finally:
        os.chdir(before)
    assert {name.partition("/")[0] for name in names} == {
        "ultralowbit",
        f"ultralowbit-{PROJECT['project']['version']}.dist-info",
    }
    expected = {
        str(Path("ultralowbit", path.relative_to(ROOT / "ultralowbit" if top == "ultralowbit" else ROOT)))
        for top in ("ultralowbit", *MAPPED)
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".safetensors") or path.parent.name == "checkpoint"
    }
    assert {name for name in expected if "__pycache__" not in name} <= names


LOOK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
before = set(sys.modules)
import ultralowbit
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_the_package_adds_little_to_transformers_and_leaves_no_name_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    names = set(done.stdout.split())
    assert "ultralowbit" in names
    assert not names & {"triton", "lm_eval", "datasets", "matplotlib", "pandas", "pyarrow", "sklearn", "typer", "rich"}
    assert not names & {"eval", "kernels", "recipes", "tests"}


def test_naming_the_package_or_asking_for_help_needs_no_torch(tmp_path):
    for script in ("import ultralowbit", "import ultralowbit.cli.app"):
        script += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert not set(done.stdout.split()) & {"torch", "transformers", "triton", "lm_eval", "datasets", "matplotlib"}


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
    for name, package in (("data", "datasets"), ("eval", "lm-eval")):
        assert any(d.startswith(package) for d in extras[name]) and any(name in d for d in extras["dev"])
    assert not any(d.startswith(("triton", "lm-eval", "datasets")) for d in PROJECT["project"]["dependencies"])
