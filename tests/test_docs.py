"""What the documentation shows runs: every docstring's example, and README.md from top to bottom."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import taylorfx as tfx
from taylorfx.scoring import criteria
from taylorfx.truth import forecasts as forecast

README = Path(tfx.__file__).parents[1] / "README.md"
MODULES = sorted(m.name for m in pkgutil.walk_packages(tfx.__path__, "taylorfx."))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["taylorfx", *MODULES])
def test_the_examples_of_a_module_run(name: str) -> None:
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
    examples = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert examples >= 90


def test_the_readme_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks share one namespace, as for a reader who types them one after the other."""
    torch.manual_seed(0)
    text, space = README.read_text(), {"__name__": "readme"}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 5
    for block in blocks:
        line = text[: block.start(1)].count("\n")  # so that an error names the line of README.md
        exec(compile("\n" * line + block.group(1), str(README), "exec"), space)
    assert "\n" in capsys.readouterr().out


def test_the_readme_names_what_there_is() -> None:
    """Every `tfx.name` and every file that it points to exists."""
    text = README.read_text()
    for name in set(re.findall(r"\btfx\.([A-Za-z_]\w*)", text)):
        assert hasattr(tfx, name), name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target


def test_the_readme_lists_every_layer() -> None:
    listed = set(re.findall(r"`(\w+)`", README.read_text()))
    layers = {name for name in tfx.layers.__all__ if inspect.isclass(getattr(tfx.layers, name))}
    assert {name for name in layers if issubclass(getattr(tfx.layers, name), tfx.Layer)} <= listed | {"Layer"}
    assert {name for name in criteria.__all__ if name[0].islower()} <= listed | {"of_weights", "unnormalized"}


def test_the_readme_records_the_fidelity_of_every_criterion() -> None:
    """No criterion without its correlation with the oracle."""
    section = README.read_text().split("## Fidelity")[1].split("\n## ")[0]
    recorded = set(re.findall(r"^\| `(\w+)` \| -?[01]\.\d\d", section, re.MULTILINE))
    helpers = {"of_weights", "unnormalized", "per_layer_l2", "per_layer_max", "per_layer_mean"}
    per_unit = {name for name in forecast.__all__ if not name.startswith("plan_")}
    assert {name for name in criteria.__all__ if name[0].islower()} - helpers | per_unit <= recorded
