"""The package as a whole: what importing it costs, and that its modules keep to the drawing."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import taylorfx as tfx

ROOT = Path(tfx.__file__).parent

# The house, from the ground up: a package imports from earlier rows only, a module of a package from its own, too.
STAGES = (
    {"tree", "functions", "progress", "internals"},
    {"distributed"},
    {"layers"},
    {"network"},
    {"coupling"},
    {"rewrite", "cost"},
    {"scoring"},
    {"cutting"},
    {"selection", "repair", "truth", "store"},
    {"interop"},
    {"report", "step", "testing"},
    {"sentence"},
    {"callbacks", "candidates"},
    {"cli"},
    {"__main__"},
)

# What stands in one place only.
HOMES = {
    "torch.func.vjp": {"scoring/measure.py"},
    "index_select": {"cutting/cut.py"},
    "Module": {"interop"},
    "torch.export": {"interop"},
    "torch.distributed": {"distributed"},
    "matplotlib": {"report"},
    "hypothesis": {"testing"},
    "torch._": {"internals.py"},
    "torch.utils._sympy": {f"interop/capture/{name}.py" for name in ("sizes", "guards", "formulas", "shorter")},
}

SOURCES = sorted(ROOT.rglob("*.py"))


def module(path: Path) -> str:
    """The name of a source's top-level module or subpackage."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def stage(name: str) -> int:
    return next((k for k, stage in enumerate(STAGES) if name in stage), len(STAGES))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute access, from the first name on; what lies before it is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Everything that a source imports, names of modules and of what is taken from them alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import at line {node.lineno}"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def used(tree: ast.AST) -> set[str]:
    """All dotted names of a source, and ``torch._`` if one of them is private to torch and has no other home."""
    names = {*imported(tree), *(dotted(node) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name)))}
    return names | {"torch._" for name in names if re.match(r"torch\.(?!utils\._sympy)(.*\.)?_(?!_)", name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_down_the_pipeline(path: Path) -> None:
    here = module(path)
    if here == "__init__":
        return
    assert stage(here) < len(STAGES), f"{here} has no place in the pipeline; give it one in STAGES"
    for name in imported(ast.parse(path.read_text())):
        root, _, rest = name.partition(".")
        if root == "taylorfx":
            there = rest.partition(".")[0]
            assert there == here or stage(there) < stage(here), f"{here} imports {name}"


@pytest.mark.parametrize("what", HOMES)
def test_it_stands_in_its_own_module_only(what: str) -> None:
    for path in SOURCES:
        names = used(ast.parse(path.read_text()))
        if any(f".{what}." in f".{name}." for name in names):
            place = path.relative_to(ROOT).as_posix()
            assert any(place == home or place.startswith(f"{home}/") for home in HOMES[what]), place


def test_the_search_for_homes_finds_what_there_is() -> None:
    """The control of the test above: what exists already is found at home."""
    homes = {
        "torch._": "internals",
        "torch.func.vjp": "scoring/measure",
        "index_select": "cutting/cut",
        "hypothesis": "testing/strategies",
    }
    for what, home in homes.items():
        names = used(ast.parse((ROOT / f"{home}.py").read_text()))
        assert any(f".{what}." in f".{name}." for name in names)
    assert "torch.func.vjp" in used(ast.parse("from torch.func import vjp"))
    assert "torch.nn.Module" in used(ast.parse("class A(torch.nn.Module): pass"))
    assert "torch._" in used(ast.parse("from torch.autograd.function import _SingleLevelFunction"))
    assert "torch._" in used(ast.parse("torch._C._functorch.get_unwrapped(x)"))
    assert "torch._" not in used(ast.parse("torch.nn.Linear(1, 2)._forward(torch.__version__)"))
    assert "leaf.index_select" in used(ast.parse("leaf.index_select(0, index)"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_fits_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.body[-1].end_lineno - node.body[0].lineno <= 60, f"{node.name} is long"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"


def public() -> Iterator[tuple[str, object]]:
    """Every public name and its value: those on top, and those of the namespaces."""
    for name in tfx.__all__:
        value = getattr(tfx, name)
        yield name, value
        if inspect.ismodule(value):
            yield from ((f"{name}.{inner}", getattr(value, inner)) for inner in value.__all__)


def described_values() -> set[str]:
    """The module-level names that are followed by a docstring of their own."""
    names = set()
    for path in SOURCES:
        body = ast.parse(path.read_text()).body
        for node, after in pairwise(body):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(text, str):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


@pytest.mark.parametrize(("name", "value"), [*public()])
def test_a_public_name_says_what_it_is(name: str, value: Any) -> None:
    if not (inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value)) or inspect.ismodule(value)):
        assert name.rpartition(".")[2] in described_values()
        return
    generated = inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")  # by dataclass
    assert value.__doc__
    assert not generated
    if inspect.isclass(value):
        for member, found in vars(value).items():
            if not member.startswith("_") and (inspect.isroutine(found) or isinstance(found, property)):
                assert inspect.getdoc(getattr(value, member)), f"{name}.{member} has no docstring"


def test_the_public_names_are_sorted_out() -> None:
    assert len(set(tfx.__all__)) == len(tfx.__all__) <= 70
    own = {name for name, value in vars(tfx).items() if getattr(value, "__module__", "").startswith("taylorfx.")}
    assert own <= set(tfx.__all__)
    assert all(hasattr(tfx, name) for name in tfx.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_hides_a_module(path: Path) -> None:
    """What a package exports is not called as one of its modules: each can be imported."""
    if path.name != "__init__.py":
        name = ".".join(path.with_suffix("").relative_to(ROOT.parent).parts)
        package, _, last = name.rpartition(".")
        if package == "taylorfx.callbacks":  # whose modules import the libraries that they are for
            return
        assert inspect.ismodule(getattr(importlib.import_module(package), last, importlib.import_module(name)))


def modules_after(statement: str) -> set[str]:
    program = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_importing_it_is_light() -> None:
    """Nothing is loaded but the package, its file format, and what torch, optree and scipy's csgraph load anyway."""
    new = modules_after("import taylorfx") - modules_after("import torch, optree, scipy.sparse.csgraph")
    assert not new & {"matplotlib", "pytest", "hypothesis", "rich", "sklearn", "taylorfx.testing"}
    assert {name.partition(".")[0] for name in new} <= {"taylorfx", "safetensors", "graphlib"}
    assert len({name for name in new if not name.startswith("taylorfx")}) < 10, sorted(new)


def test_it_ships_its_types_and_its_version() -> None:
    assert (ROOT / "py.typed").is_file()
    assert importlib.metadata.version("taylorfx") == tfx.__version__
