"""Files that were changed at random: each is read as it was written, or refused clearly, soon and in little room.

Two thousand mutants of each kind, by seeds, so that a failure names the one that it can be repeated with.
"""

import copy
import functools
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from test_store import places, value_at
from test_store_values import COUPLING, PARAMS, PLAN, SPEC, STATS, TIMINGS, same

import taylorfx as tfx
from taylorfx import store
from taylorfx.network.parameters import check

COUNT, SECONDS, ROOM = 2_000, 1.0, 200 * 2**20
"""How many mutants of a kind, how long each takes at most, and bytes that all of them take beyond what there was."""

SAVES = {
    "network": lambda path: tfx.save(path, PARAMS, SPEC),
    "plan": lambda path: store.save_plan(path, PLAN),
    "statistics": lambda path: store.save_statistics(path, STATS),
    "timings": lambda path: store.save_timings(path, TIMINGS),
}
LOADS = {
    "network": lambda path: check(*tfx.load(path)) is None,
    "plan": lambda path: store.load_plan(path, COUPLING) == PLAN,
    "statistics": lambda path: same(store.load_statistics(path, COUPLING), STATS),
    "timings": lambda path: np.isfinite([*store.load_timings(path).table.values()]).all(),
}
DOCUMENTS = {"network": "taylorfx.spec", "statistics": "taylorfx.statistics"}
"""The entries of a header that hold a document; files of other kinds are one."""

SCALARS = (
    None, True, False, 0, 1, -1, 3, 0.5, -0.0, float("nan"), float("inf"), 2**16, 2**31, 2**40, 2**62, 2**63, 10**30,
    -(2**70), 1e300, "", "x", "a", "a[0]", "a.weight", "a.b", ".", "..", "$", "float64", "int8", "F32", "cuda:99",
    "mean", "Linear", "Conv2d", "Captured", "Input", "from_file.default", "__metadata__", "\ud800", "\0", "9" * 5000,
)  # fmt: skip


@functools.cache
def original(kind):
    """The bytes of a file of this kind."""
    with tempfile.TemporaryDirectory() as folder:
        SAVES[kind](Path(folder, kind))
        return Path(folder, kind).read_bytes()


def value(rng, depth=3):
    """A value of JSON."""
    how = rng.random()
    if depth and how < 0.15:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and how < 0.25:
        return {str(rng.choice(SCALARS)): value(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.randrange(-2, 13) if how < 0.5 else rng.choice(SCALARS)


def change(rng, data):
    """Replace, leave out, repeat, move or rename one of the values of a document, in place."""
    every = list(places(data))
    path = rng.choice(every)
    owner, key = value_at(data, path[:-1]), path[-1]
    how = rng.choice(["replace", "replace", "remove", "borrow", "repeat", "rename"])
    if how == "borrow":
        owner[key] = copy.deepcopy(value_at(data, rng.choice(every)))
    elif how == "repeat" and isinstance(owner, list):
        owner[key:key] = [copy.deepcopy(owner[key])] * rng.choice([1, 1, 100])
    elif how == "rename" and isinstance(owner, dict):
        owner[str(rng.choice(SCALARS))] = owner.pop(key)
    elif how == "remove":
        del owner[key]
    else:
        owner[key] = value(rng)
    return data


def change_bytes(rng, raw):
    """Replace, leave out, repeat or put in some bytes, or end the file early."""
    start = rng.randrange(len(raw) + 1)
    end = min(len(raw), start + rng.randrange(40))
    new = rng.choice([rng.randbytes(rng.randrange(9)), raw[start:end] * 2, b"[" * 5_000, b"9" * 5_000])
    return raw[:start] + new + (raw[end:] if rng.random() < 0.9 else b"")


def mutant(kind, seed):
    """A file with one to three changes: of its document, of the header around that, or of its bytes."""
    rng, raw = random.Random(f"{kind} {seed}"), original(kind)
    for _ in range(rng.randint(1, 3)):
        how = rng.choice(["bytes", "document", "document", "header"])
        try:
            if how == "bytes":
                raw = change_bytes(rng, raw)
            elif kind not in DOCUMENTS:
                raw = json.dumps(change(rng, json.loads(raw))).encode()
            else:
                end = 8 + int.from_bytes(raw[:8], "little")
                head = json.loads(raw[8:end])
                if how == "header":
                    change(rng, head)
                else:
                    meta, name = head["__metadata__"], DOCUMENTS[kind]
                    meta[name] = json.dumps(change(rng, json.loads(meta[name])))
                text = json.dumps(head).encode()
                raw = len(text).to_bytes(8, "little") + text + raw[end:]
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ):  # beyond that
            raw = change_bytes(rng, raw)
    return raw


def status(name):
    """Bytes of memory that this process has, ``VmRSS``, or had at most, ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def tidy():
    """What other tests have left is not collected meanwhile: of a long run that alone may take more than a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("kind", SAVES)
def test_a_mutated_file_is_read_as_it_was_or_refused_soon_and_in_little_room(kind, tmp_path):
    path, refused = tmp_path / "mutant", 0
    path.write_bytes(original(kind))
    assert LOADS[kind](path)
    measured = sys.platform == "linux"
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # what there was at most is what there is
        before = status("VmRSS")
    for seed in range(COUNT):
        path.write_bytes(mutant(kind, seed))
        start = time.process_time()
        try:
            assert LOADS[kind](path), seed
        except tfx.FileError as error:
            refused += 1
            assert str(path) in str(error), seed
            assert len(str(error)) < 200_000, seed
        assert time.process_time() - start < SECONDS, seed
    assert refused > 0.6 * COUNT, "most changes matter"
    assert not measured or status("VmHWM") - before < ROOM
