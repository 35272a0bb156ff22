"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["columns"]


def columns(rows: Sequence[Sequence[str]], right: int = 2) -> str:
    """Rows as aligned text, the first one as the head; the last ``right`` columns are numbers.

    >>> print(columns([("layer", "units"), ("conv1", "64"), ("fc", "1,000")], right=1))
    layer  units
    -----  -----
    conv1     64
    fc     1,000
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    left = len(widths) - right
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    cells = ([c.rjust(w) if k >= left else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
             for row in ruled)  # fmt: skip
    return "\n".join("  ".join(row).rstrip() for row in cells)
