"""Where things stand in a profile's text, so that a problem can name its line.

Always true: a place names the file, and a line only if scanning the text found one (TOML's parser
does not say, and a table may be written inline).
"""

import re
from pathlib import Path

TOP = -1  # the row of what stands above the tiers

_HEADER = re.compile(r"""\s*(\[\[?)\s*["']?([A-Za-z0-9_-]+)""")
_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")


class Lines:
    """The lines of tables and keys. Row 0 is the first [[tier]], TOP is above them."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._found: dict[tuple[int, str], int] = {}  # (row, key); a row's header has no key
        rows, row = 0, TOP
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _HEADER.match(line):
                if header.groups() == ("[[", "tier"):
                    row, rows = rows, rows + 1
                    self._found[row, ""] = number
                else:
                    self._found.setdefault((TOP, header[2]), number)
            elif key := _KEY.match(line):
                self._found.setdefault((row, key[1]), number)

    def place(self, row: int, key: str = "") -> str:
        """The file, with the line of ``key`` in ``row``, or else of the row."""
        line = self._found.get((row, key)) or self._found.get((row, ""))
        return f"{self._path}, line {line}" if line else str(self._path)
