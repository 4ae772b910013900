"""Render plain text tables with right-aligned columns in groups."""

import os
from collections.abc import Callable, Sequence
from typing import TextIO

GAP = "  "
GROUP_GAP = "    "

BOLD = "1"
RED = "1;31"
GREEN = "1;32"
YELLOW = "1;33"

Painter = Callable[[str, str], str]
"""Takes text and one of the colours above; returns the text, in colour or not."""


def painter(stream: TextIO) -> Painter:
    """Return a painter that colours text if `stream` is a terminal and NO_COLOR is not set."""
    if stream.isatty() and not os.environ.get("NO_COLOR"):
        return lambda text, colour: f"\x1b[{colour}m{text}\x1b[0m"
    return lambda text, _: text


def render(
    groups: Sequence[tuple[str, Sequence[str]]],
    rows: Sequence[Sequence[str]],
    *,
    paint: Painter,
    strong: str,
) -> str:
    """Return the lines of a table.

    Args:
        groups: (title, column names) of each group. A group is as wide as its title or its
            columns, whichever is wider.
        rows: with one cell for each column of all groups.
        paint: paints the group that is bold.
        strong: the title of that group.
    """
    blocks: list[list[str]] = []
    first = 0
    for title, names in groups:
        cells = [names, *(row[first : first + len(names)] for row in rows)]
        first += len(names)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        head, *body = (GAP.join(map(str.rjust, line, widths)) for line in cells)
        width = max(len(title), len(head))
        lines = [title.center(width), head.rjust(width), "-" * width]
        lines += [line.rjust(width) for line in body]
        blocks.append([paint(line, BOLD) for line in lines] if title == strong else lines)
    return "\n".join(GROUP_GAP.join(parts).rstrip() for parts in zip(*blocks, strict=True))


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Return a line for each (name, text); all texts begin in one column."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}{GAP}{text}".rstrip() for name, text in rows)
