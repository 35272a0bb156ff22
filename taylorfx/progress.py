"""What takes long says how far it is: lines of the log ``"taylorfx"`` at INFO, and bars where they are asked for.

>>> import logging
>>> logging.basicConfig(level=logging.INFO)  # shows the lines, for example of every step of `prune`
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["LOG", "bar", "told"]

T = TypeVar("T")

LOG = logging.getLogger("taylorfx")
"""Where every function writes."""


@contextmanager
def bar(shown: bool, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar, or none, as a function that advances it.

    Args:
        total: how far it goes; unknown if none or zero.

    Raises:
        ImportError: if a bar is to be shown without rich.
    """
    if not shown:
        yield lambda count: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError("A progress bar needs rich; pip install rich, or leave progress=True out.") from error
    with Progress(transient=True, console=Console(file=sys.stdout)) as drawn:  # also while torch's own words are caught
        task = drawn.add_task(what, total=total or None)
        yield lambda count: drawn.advance(task, count)


def told(items: Iterable[T], advance: Callable[[int], None]) -> Iterator[T]:
    """The items, each of which advances a bar once it is done with."""
    for item in items:
        yield item
        advance(1)
