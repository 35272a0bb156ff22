"""What the documentation shows runs: every docstring's example, and the documents from top to bottom."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from _torchvision import library

import taylorfx as tfx
from taylorfx.scoring import criteria
from taylorfx.truth import forecasts as forecast

ROOT = Path(tfx.__file__).parents[1]
README, CONTRIBUTING, CHANGELOG = (ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))
TEST = re.compile(r"^def (test_\w+)", re.MULTILINE)
MODULES = sorted(m.name for m in pkgutil.walk_packages(tfx.__path__, "taylorfx."))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["taylorfx", *MODULES])
def test_the_examples_of_a_module_run(name: str) -> None:
    if name == "taylorfx.callbacks.lightning":
        library()  # lightning imports torchvision
        pytest.importorskip("lightning")
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not found.failed


def test_the_readme_lists_every_package_in_the_order_of_imports() -> None:
    """A package or module at the top level imports only from rows of the table above its own."""
    listed = re.findall(r"^\| `taylorfx\.(\w+)` \|", README.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name.removeprefix("taylorfx.") for name in MODULES if name.count(".") == 1)
    for place, name in enumerate(listed):
        path = Path(tfx.__file__).with_name(name)
        for file in [*path.rglob("*.py")] or [path.with_suffix(".py")]:
            assert {*re.findall(r"^ *from taylorfx\.(\w+)", file.read_text(), re.MULTILINE)} <= {*listed[: place + 1]}


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [name for name in MODULES if not name.startswith("taylorfx.callbacks.")]
    examples = sum(len(test.examples) for name in names for test in finder.find(importlib.import_module(name)))
    assert examples >= 90


@pytest.mark.parametrize("document", [README, CONTRIBUTING], ids=lambda path: path.name)
def test_a_document_runs_from_top_to_bottom(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks share one namespace, as for a reader who types them one after the other."""
    if importlib.util.find_spec("torchvision"):
        library()  # transformers imports it where it is installed
    torch.manual_seed(0)
    text, space = document.read_text(), {"__name__": document.stem.lower()}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 5
    for block in blocks:
        line = text[: block.start(1)].count("\n")  # so that an error names the line of the document
        exec(compile("\n" * line + block.group(1), str(document), "exec"), space)
    assert ("print(" in text) == ("\n" in capsys.readouterr().out)


@pytest.mark.parametrize("document", [README, CONTRIBUTING, CHANGELOG], ids=lambda path: path.name)
def test_a_document_names_what_there_is(document: Path) -> None:
    """Every `tfx.name`, every path and link, and every test that it points to exists."""
    text = document.read_text()
    for name in set(re.findall(r"\btfx\.([A-Za-z_]\w*)", text)):
        assert hasattr(tfx, name), name
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)|\b((?:taylorfx|tests|benchmarks|examples)/[\w/.]*\w)", text)
    for target in {link or path for link, path in paths}:
        assert (ROOT / target).exists(), target
    tests = {name for path in (ROOT / "tests").rglob("test_*.py") for name in TEST.findall(path.read_text())}
    assert set(re.findall(r"`(test_\w+)`", text)) <= tests


def test_every_benchmark_has_a_section_with_its_results() -> None:
    sections = re.findall(r"^## `(\w+\.py)`: ", (ROOT / "benchmarks" / "README.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(path.name for path in (ROOT / "benchmarks").glob("[!_]*.py"))


def test_what_can_be_added_is_shown_from_outside() -> None:
    """Each recipe points to a test of `test_from_outside`, and none of these is left out."""
    shown = re.findall(r"Test: `(test_\w+)`", CONTRIBUTING.read_text())
    outside = set(TEST.findall((ROOT / "tests" / "test_from_outside.py").read_text()))
    assert len(shown) == len(set(shown)) == 6
    assert outside - set(shown) == {"test_the_users_module_needs_public_names_only"}


def test_the_map_of_the_house_has_every_package() -> None:
    package = (ROOT / "tests" / "test_package.py").read_text()
    stages = ast.literal_eval(re.findall(r"^STAGES = (\(.*?^\))", package, re.DOTALL | re.MULTILINE)[0])
    rows = re.findall(r"^\| (`.*?`) \|", CONTRIBUTING.read_text().split("## The house")[1], re.MULTILINE)
    order = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    levels = [next(k for k, stage in enumerate(stages) if name in stage) for name in order]
    assert set(order) == set().union(*stages)
    assert levels == sorted(levels)


def test_the_readme_lists_every_layer() -> None:
    listed = set(re.findall(r"`(\w+)`", README.read_text()))
    layers = {name for name in tfx.layers.__all__ if inspect.isclass(getattr(tfx.layers, name))}
    assert {name for name in layers if issubclass(getattr(tfx.layers, name), tfx.Layer)} <= listed | {"Layer"}
    assert {name for name in criteria.__all__ if name[0].islower()} <= listed | {"unnormalized"}


def test_the_readme_records_the_fidelity_of_every_criterion() -> None:
    """No criterion without its correlation with the oracle."""
    section = README.read_text().split("## Fidelity")[1].split("\n## ")[0]
    recorded = set(re.findall(r"^\| `(\w+)` \| -?[01]\.\d\d", section, re.MULTILINE))
    helpers = {"unnormalized", "per_layer_l2", "per_layer_max", "per_layer_mean", "sampled"}
    per_unit = {name for name in forecast.__all__ if not name.startswith("plan_")}
    assert {name for name in criteria.__all__ if name[0].islower()} - helpers | per_unit <= recorded
