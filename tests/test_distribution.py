"""What is shipped and what is declared: the source distribution is whole, and the oldest versions are tested ones."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "docs", "examples", "taylorfx", "tests")
FILES = (".gitignore", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml")
PIN = re.compile(r"^([\w.-]+)==([\d.]+)", re.MULTILINE)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_the_source_distribution_holds_all_that_its_tests_need(tmp_path: Path) -> None:
    if version(importlib.metadata.version("setuptools").split("+")[0]) < (77,):
        pytest.skip("setuptools 77 or later builds it: pip install -e '.[test]'")
    copy = tmp_path / "checkout"
    ignored = (".git", ".venv", "*.egg-info", "build", "dist", "out", ".*_cache", ".hypothesis", "__pycache__")
    copytree(ROOT, copy, ignore=ignore_patterns(*ignored))
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    paths = [path for folder in FOLDERS for path in (copy / folder).rglob("*") if path.is_file()]
    wanted = {path.relative_to(copy).as_posix() for path in paths} | set(FILES)
    assert len(wanted) > 100
    assert wanted - held == set()


def test_the_oldest_versions_that_are_declared_are_those_that_are_tested() -> None:
    """`constraints.txt` pins what CI installs, per Python version where they differ: the oldest is the bound."""
    tested: dict[str, list[tuple[int, ...]]] = {}
    for name, pinned in PIN.findall((ROOT / "constraints.txt").read_text()):
        tested.setdefault(name, []).append(version(pinned))
    (declared,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', declared))
    assert list(bounds) == ["torch", "optree", "numpy", "scipy", "safetensors"]
    assert {name: version(bound) for name, bound in bounds.items()} == {name: min(tested[name]) for name in bounds}
