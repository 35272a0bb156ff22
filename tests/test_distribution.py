"""What is shipped and declared: releases are whole, the oldest versions are tested ones, each fact is in one place."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import taylorfx as tfx

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "docs", "examples", "taylorfx", "tests")
FILES = (
    ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile",
    "README.md", "constraints.txt", "pyproject.toml",
)  # fmt: skip
PIN = re.compile(r"^([\w.-]+)==([\d.]+)", re.MULTILINE)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is in the checkout, without what tools have left there."""
    copy = tmp_path / "checkout"
    left = (".git", ".venv", "*.egg-info", "build", "dist", "out", ".*_cache", ".hypothesis", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left))
    return copy


def release(checkout: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """What `make release` does, with these tests."""
    if version(importlib.metadata.version("setuptools").split("+")[0]) < (77,):
        pytest.skip("setuptools 77 or later builds it: pip install -e '.[test]'")
    command = ["bash", ".ci/release", sys.executable, *tests]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def test_a_release_is_whole_and_runs_its_own_tests(checkout: Path) -> None:
    done = release(checkout, "tests/test_distribution.py", "-k", "oldest or version")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^2 passed", done.stdout, re.MULTILINE), done.stdout

    archive, wheel = sorted((checkout / "dist").iterdir(), key=lambda path: path.suffix)
    assert archive.name == f"taylorfx-{tfx.__version__}.tar.gz"
    assert wheel.name == f"taylorfx-{tfx.__version__}-py3-none-any.whl"
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    paths = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    wanted = {path for path in paths if path.startswith(tuple(f"{folder}/" for folder in FOLDERS))} | set(FILES)
    assert len(wanted) > 100
    assert {path for path in wanted - held if "__pycache__" not in path} == set()

    with zipfile.ZipFile(wheel) as zipped:
        names = set(zipped.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert message_from_bytes(zipped.read(metadata))["Version"] == tfx.__version__
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == {path for path in paths if path.startswith("taylorfx/") and path.endswith((".py", "py.typed"))}


def test_a_release_that_fails_its_tests_is_none(checkout: Path) -> None:
    (checkout / "tests" / "test_broken.py").write_text("def test_it():\n    assert False\n")
    done = release(checkout, "tests/test_broken.py")
    assert done.returncode != 0
    assert "1 failed" in done.stdout
    assert not (checkout / "dist").exists()


def test_a_release_is_of_what_is_committed(checkout: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    done = release(checkout, "tests/test_broken.py")
    assert done.returncode != 0
    assert "?? README.md" in done.stderr
    assert not (checkout / "dist").exists()


def made(target: str, *options: str) -> list[str]:
    """The commands of a target of the Makefile whose environment is set up."""
    command = ["make", "--dry-run", "--no-print-directory", "--assume-old=.venv/dev.stamp", target, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_release_runs_the_tests_that_are_asked_for() -> None:
    assert made("release", "TESTS=tests/test_docs.py -x")[-1] == ".ci/release .venv/bin/python tests/test_docs.py -x"
    assert made("release")[-1] == ".ci/release .venv/bin/python -n 2"


def test_every_commit_is_checked_as_lint_does() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "nothing is downloaded"
    assert [hook["entry"] for hook in repository["hooks"]] == made("lint")[-3:]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repository["hooks"])


def test_the_version_is_in_one_place_and_in_the_changelog() -> None:
    """setuptools reads it from the package without importing it."""
    assert tfx.__version__ not in (ROOT / "pyproject.toml").read_text()
    titles = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert any(re.fullmatch(rf"\[{re.escape(tfx.__version__)}\] - (Unreleased|\d{{4}}-\d\d-\d\d)", t) for t in titles)


def test_the_oldest_versions_that_are_declared_are_those_that_are_tested() -> None:
    """`constraints.txt` pins what CI installs, per Python version where they differ: the oldest is the bound."""
    tested: dict[str, list[tuple[int, ...]]] = {}
    for name, pinned in PIN.findall((ROOT / "constraints.txt").read_text()):
        tested.setdefault(name, []).append(version(pinned))
    (declared,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', declared))
    assert list(bounds) == ["torch", "optree", "numpy", "scipy", "safetensors"]
    assert {name: version(bound) for name, bound in bounds.items()} == {name: min(tested[name]) for name in bounds}
