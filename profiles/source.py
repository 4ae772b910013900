"""Finds and reads the files of a profile, and merges each with the profile that it extends.

Invariants:

* Every value keeps the file and the line where it is written, along the whole chain of files.
* A place always names the file. It names a line only where scanning the text found one: TOML's
  parser reports no lines, and a table may be written inline.
* Only the keys above the first ``[[tier]]`` are checked here.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvcache import inputs, secrets
from kvcache.profiles.errors import ProfileError, listed, nearest, show, show_option

TOP_KEYS = ("extends", "without", "tier")
LIMIT = 64 << 10
"""Largest size of a profile's file, in bytes."""
MAX_LEVELS = 16
"""Longest chain of files that extend each other."""

_MAX_DOTS = 100  # per line; tomllib takes minutes for a key of thousands of parts

_SHIPPED_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class GivenValue:
    """A value as written, and its place; ``shipped`` if it is from a shipped profile."""

    value: object
    place: str
    shipped: bool = False


@dataclass(frozen=True, slots=True)
class TierTable:
    """The keys of one tier. ``place`` is the place of its [[tier]], in the base if it has one."""

    place: str
    given: Mapping[str, GivenValue]

    @property
    def name(self) -> str | None:
        """The tier's name; None if it has none or it is not a string."""
        return name if isinstance(name := self.value("name"), str) else None

    def value(self, key: str) -> object:
        """Return the value of ``key``; None if it is not given."""
        return self.given[key].value if key in self.given else None

    def where(self, key: str) -> str:
        """Describe the place and value of ``key``, or say that it is missing."""
        if key not in self.given:
            return f"{self.place}: {key} is missing"
        return f"{self.given[key].place}: {show_option(key, self.given[key].value)}"


@dataclass(slots=True)
class ProfileFile:
    """A file that was read.

    Attributes:
        path: the file.
        tables: its tiers merged with its base's; None if an error prevents reading them.
        bases: the files that it extends, its direct base first.
        problems: a sentence for each problem.
    """

    path: Path
    tables: list[TierTable] | None = None
    bases: tuple[Path, ...] = ()
    problems: list[str] = field(default_factory=list)


def shipped() -> list[str]:
    """Return the names of the shipped profiles: the TOML files beside this module."""
    return sorted(path.stem for path in _SHIPPED_FOLDER.glob("*.toml"))


def find_profile(profile: str, folder: Path) -> Path:
    """Return the file of a shipped name or of a path; a relative path starts at ``folder``.

    Raises:
        ValueError: with the known names, if it is neither.
    """
    if ("/" in profile or profile.endswith(".toml")) and "://" not in profile:
        return folder / profile
    known = shipped()
    if profile in known:
        return _SHIPPED_FOLDER / f"{profile}.toml"
    raise ValueError(
        f"no such profile; shipped are {listed(known)}, and the path of your own file "
        f'has a "/" or ends in ".toml"{nearest(profile, known)}'
    )


def read_file(path: Path, origin: str = "", chain: tuple[Path, ...] = ()) -> ProfileFile:
    """Read the file at ``path`` and the files that it extends.

    Args:
        path: the file.
        origin: a prefix for problems: the place that names this file.
        chain: the files that extend this one.
    """
    real = _real(path)
    if real in chain:
        circle = " extends ".join(map(str, [*chain[chain.index(real) :], real]))
        return ProfileFile(path, problems=[f"{origin}is circular: {circle}"])
    if len(chain) == MAX_LEVELS:
        return ProfileFile(
            path, problems=[f"{origin}is the {MAX_LEVELS + 1}th file that extends another"]
        )
    try:
        text = inputs.read_text(path, LIMIT)
        document = _parsed(text)
    except OSError as error:
        return ProfileFile(path, problems=[f"{origin}cannot read {path}: {error.strerror}"])
    except ValueError as error:  # tomllib's message has the line and the column
        return ProfileFile(
            path, problems=[f"{path} is not TOML: {secrets.escape_unprintable(str(error))}"]
        )
    return _FileReader(path, LineIndex(path, text), document, chain).file


def _real(path: Path) -> Path:
    """Resolve the links in ``path``, to recognise a file; return it unchanged if that fails."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:
        return path


def _parsed(text: str) -> dict[str, object]:
    """Parse TOML. Raises ValueError if it is invalid, too deep or too expensive to parse."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > _MAX_DOTS and not line.lstrip().startswith("#"):
            raise ValueError(f"line {number} has more than {_MAX_DOTS} dots")
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {inputs.DEPTH} levels") from None
    inputs.check_document(document)
    return document


def summary_of(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file; "" without such a comment."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line == "#":
            break
        words.append(line.removeprefix("#").strip())
    sentence = " ".join(words).removeprefix(f"{path.stem}: ").partition(". ")[0]
    return sentence.rstrip(".")


def read_or_raise(path: Path, origin: str = "") -> tuple[ProfileFile, list[TierTable]]:
    """Like ``read_file``, but raises ProfileError if the tables cannot be read."""
    file = read_file(path, origin)
    if file.tables is None:
        raise ProfileError(path.stem, file.problems)
    return file, file.tables


class _FileReader:
    """Reads one parsed document."""

    def __init__(
        self, path: Path, lines: LineIndex, document: Mapping[str, object], chain: tuple[Path, ...]
    ) -> None:
        self.file = ProfileFile(path)
        self._lines = lines
        for key in document:
            if key not in TOP_KEYS:
                self._add_problem(
                    key,
                    "no such key; a profile has [[tier]] tables, and above them "
                    f'"extends" and "without"{nearest(key, TOP_KEYS)}',
                )
        base = self._base_tables(document, chain)
        if base is not None:
            base = self._remaining_tables(document, base)
        own = self._own_tables(document)
        if base is not None and own is not None:
            self.file.tables = merge_tables(base, own)

    def _own_tables(self, document: Mapping[str, object]) -> list[TierTable] | None:
        tables = document.get("tier", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._add_problem("tier", "write tiers under [[tier]]")
            return None
        shipped = _real(self.file.path).parent == _real(_SHIPPED_FOLDER)
        return [
            TierTable(
                self._lines.place(row),
                {
                    key: GivenValue(value, self._lines.place(row, key), shipped)
                    for key, value in table.items()
                },
            )
            for row, table in enumerate(tables)
        ]

    def _base_tables(
        self, document: Mapping[str, object], chain: tuple[Path, ...]
    ) -> Sequence[TierTable] | None:
        """Return the tables of the base, () without ``extends``; None if they cannot be read."""
        if "extends" not in document:
            return ()
        extends, path = document["extends"], self.file.path
        if not isinstance(extends, str):
            self._add_problem(
                f"extends = {show(extends)}", "takes a shipped name, or a path from this file"
            )
            return None
        here = f"{self._lines.place(TOP_LEVEL, 'extends')}: extends = {show(extends)}: "
        try:
            found = find_profile(extends, path.parent)
        except ValueError as error:
            self.file.problems.append(f"{here}{error}")
            return None
        base = read_file(found, here, (*chain, _real(path)))
        self.file.problems += base.problems
        self.file.bases = (found, *base.bases)
        return base.tables

    def _remaining_tables(
        self, document: Mapping[str, object], base: Sequence[TierTable]
    ) -> Sequence[TierTable] | None:
        """Return the tables of ``base`` that ``without`` does not name; None if it is invalid."""
        removed, names = document.get("without", []), [table.name for table in base]
        if not isinstance(removed, list):
            self._add_problem(
                f"without = {show(removed)}", 'takes a list of tiers, such as ["disk"]'
            )
            return None
        if "without" in document and "extends" not in document:
            self._add_problem(
                f"without = {show(removed)}", "removes tiers of a base, but there is no extends"
            )
            return None
        for name in removed:
            if name not in names:
                problem = f"the base has no tier {show(name)}; it has {listed(names)}"
                self._add_problem(f"without = {show(removed)}", f"{problem}{nearest(name, names)}")
        return [table for table in base if table.name not in removed]

    def _add_problem(self, item: str, problem: str) -> None:
        place = self._lines.place(TOP_LEVEL, item.partition(" = ")[0])
        self.file.problems.append(f"{place}: {item}: {problem}")


def merge_tables(base: Sequence[TierTable], own: Sequence[TierTable]) -> list[TierTable]:
    """Merge the tables of a file into those of its base, in the order of the base.

    A table changes the options of the base's tier of the same name. If its kind differs, it
    replaces that tier, because another kind has other options. New tiers come last.
    """
    tables = list(base)
    places = {table.name: at for at, table in enumerate(tables) if table.name is not None}
    for table in own:
        # Each tier of the base matches once: ``read_rows`` reports a second table of one name.
        at = places.pop(table.name, None) if table.name is not None else None
        if at is None:
            tables.append(table)
        elif "kind" in table.given and table.value("kind") != tables[at].value("kind"):
            tables[at] = table
        else:
            tables[at] = TierTable(tables[at].place, {**tables[at].given, **table.given})
    return tables


TOP_LEVEL = -1  # the row number of the keys above the tiers

_HEADER = re.compile(r"""\s*(\[\[?)\s*["']?([A-Za-z0-9_-]+)""")
_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")


class LineIndex:
    """The line numbers of tables and keys. Row 0 is the first [[tier]], TOP_LEVEL is above them."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines: dict[tuple[int, str], int] = {}  # by (row, key); key "" is the header
        rows, row = 0, TOP_LEVEL
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _HEADER.match(line):
                if header.groups() == ("[[", "tier"):
                    row, rows = rows, rows + 1
                    self._lines[row, ""] = number
                else:
                    self._lines.setdefault((TOP_LEVEL, header[2]), number)
            elif key := _KEY.match(line):
                self._lines.setdefault((row, key[1]), number)

    def place(self, row: int, key: str = "") -> str:
        """Return the file and the line of ``key`` in ``row``, or else of the row's header."""
        line = self._lines.get((row, key)) or self._lines.get((row, ""))
        return f"{self._path}, line {line}" if line else str(self._path)
