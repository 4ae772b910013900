"""Where profiles are, and what their files give: the tables of a file, laid over those it extends.

Always true: every value keeps the file and the line it was given in, whichever file of the chain
that was; nothing is checked here but what is above the tiers.

Where things stand in a profile's text, so that a problem can name its line.

Always true: a place names the file, and a line only if scanning the text found one (TOML's parser
does not say, and a table may be written inline).
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
"""Bytes of a profile's file, at most."""
LEVELS = 16
"""Files that extend each other, at most."""

_DOTS = 100  # in a line; the reader of TOML takes minutes over a key of thousands of parts

_SHIPPED = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was written, and where; ``shipped`` if that is a profile of the library's."""

    value: object
    place: str
    shipped: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """One tier as the files give it. ``place`` is where its [[tier]] stands, the base's if any."""

    place: str
    given: Mapping[str, Given]

    @property
    def name(self) -> str | None:
        """Its name, if it has one that can be a name."""
        return name if isinstance(name := self.value("name"), str) else None

    def value(self, key: str) -> object:
        """What was given for ``key``, None if nothing was."""
        return self.given[key].value if key in self.given else None

    def where(self, key: str) -> str:
        """The place of ``key`` and what it was given, or that it is missing."""
        if key not in self.given:
            return f"{self.place}: {key} is missing"
        return f"{self.given[key].place}: {show_option(key, self.given[key].value)}"


@dataclass(slots=True)
class File:
    """A profile's file. ``bases`` are those it extends, its own base first.

    ``tables`` is None where something is so wrong that they cannot be known.
    """

    path: Path
    tables: list[Table] | None = None
    bases: tuple[Path, ...] = ()
    problems: list[str] = field(default_factory=list)


def shipped() -> list[str]:
    """Names of the profiles that come with the library: the TOML files beside this one."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def find(profile: str, folder: Path) -> Path:
    """The file of a shipped name, or of a path, which is one from ``folder`` if it is relative.

    Raises ValueError that says what there is.
    """
    if ("/" in profile or profile.endswith(".toml")) and "://" not in profile:
        return folder / profile
    known = shipped()
    if profile in known:
        return _SHIPPED / f"{profile}.toml"
    raise ValueError(
        f"no such profile; shipped are {listed(known)}, and a path to a file of yours "
        f'has a "/" or ends in ".toml"{nearest(profile, known)}'
    )


def read_file(path: Path, asked: str = "", chain: tuple[Path, ...] = ()) -> File:
    """The file at ``path`` with what it extends. ``asked`` says who wants it, for its problems.

    ``chain`` are the files that extend this one.
    """
    real = _real(path)
    if real in chain:
        circle = " extends ".join(map(str, [*chain[chain.index(real) :], real]))
        return File(path, problems=[f"{asked}goes in a circle: {circle}"])
    if len(chain) == LEVELS:
        return File(path, problems=[f"{asked}is the {LEVELS + 1}th file that extends another"])
    try:
        text = inputs.read_text(path, LIMIT)
        document = _parsed(text)
    except OSError as error:
        return File(path, problems=[f"{asked}cannot read {path}: {error.strerror}"])
    except ValueError as error:  # tomllib's own words have the line and the column
        return File(
            path, problems=[f"{path} is not TOML: {secrets.escape_unprintable(str(error))}"]
        )
    return _Reading(path, Lines(path, text), document, chain).file


def _real(path: Path) -> Path:
    """``path`` without links, by which a file is known again; as it is, if it cannot be a path."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:
        return path


def _parsed(text: str) -> dict[str, object]:
    """The tables of a text. Raises ValueError if it is not TOML, or none that a profile needs."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > _DOTS and not line.lstrip().startswith("#"):
            raise ValueError(f"line {number} has more than {_DOTS} dots")
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {inputs.DEPTH} levels") from None
    inputs.check_document(document)
    return document


def head(path: Path) -> str:
    """The first sentence of the comment that a file begins with, "" if it does with none."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line == "#":
            break
        words.append(line.removeprefix("#").strip())
    sentence = " ".join(words).removeprefix(f"{path.stem}: ").partition(". ")[0]
    return sentence.rstrip(".")


def read_or_raise(path: Path, asked: str = "") -> tuple[File, list[Table]]:
    """``read_file``, where its tables are needed. Raises ProfileError if they cannot be known."""
    file = read_file(path, asked)
    if file.tables is None:
        raise ProfileError(path.stem, file.problems)
    return file, file.tables


class _Reading:
    """One pass over a document that was parsed."""

    def __init__(
        self, path: Path, lines: Lines, document: Mapping[str, object], chain: tuple[Path, ...]
    ) -> None:
        self.file = File(path)
        self._lines = lines
        for key in document:
            if key not in TOP_KEYS:
                self._wrong(
                    key,
                    "no such key; a profile has [[tier]] tables, and above them "
                    f'"extends" and "without"{nearest(key, TOP_KEYS)}',
                )
        base = self._base(document, chain)
        if base is not None:
            base = self._without(document, base)
        own = self._own(document)
        if base is not None and own is not None:
            self.file.tables = laid_over(base, own)

    def _own(self, document: Mapping[str, object]) -> list[Table] | None:
        tables = document.get("tier", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._wrong("tier", "write tiers under [[tier]]")
            return None
        shipped = _real(self.file.path).parent == _real(_SHIPPED)
        return [
            Table(
                self._lines.place(row),
                {
                    key: Given(value, self._lines.place(row, key), shipped)
                    for key, value in table.items()
                },
            )
            for row, table in enumerate(tables)
        ]

    def _base(
        self, document: Mapping[str, object], chain: tuple[Path, ...]
    ) -> Sequence[Table] | None:
        """The tables of what this file extends, none if it does not; None if it is wrong."""
        if "extends" not in document:
            return ()
        extends, path = document["extends"], self.file.path
        if not isinstance(extends, str):
            self._wrong(
                f"extends = {show(extends)}", "takes a shipped name, or a path from this file"
            )
            return None
        here = f"{self._lines.place(TOP, 'extends')}: extends = {show(extends)}: "
        try:
            found = find(extends, path.parent)
        except ValueError as error:
            self.file.problems.append(f"{here}{error}")
            return None
        base = read_file(found, here, (*chain, _real(path)))
        self.file.problems += base.problems
        self.file.bases = (found, *base.bases)
        return base.tables

    def _without(
        self, document: Mapping[str, object], base: Sequence[Table]
    ) -> Sequence[Table] | None:
        """``base`` less the tiers that this file does without; None if that is wrong."""
        gone, names = document.get("without", []), [table.name for table in base]
        if not isinstance(gone, list):
            self._wrong(f"without = {show(gone)}", 'takes a list of tiers, such as ["disk"]')
            return None
        if "without" in document and "extends" not in document:
            self._wrong(
                f"without = {show(gone)}", "takes away tiers of a base; there is no extends"
            )
            return None
        for name in gone:
            if name not in names:
                there = f"no tier {show(name)} in what it extends; there are {listed(names)}"
                self._wrong(f"without = {show(gone)}", f"{there}{nearest(name, names)}")
        return [table for table in base if table.name not in gone]

    def _wrong(self, what: str, says: str) -> None:
        place = self._lines.place(TOP, what.partition(" = ")[0])
        self.file.problems.append(f"{place}: {what}: {says}")


def laid_over(base: Sequence[Table], own: Sequence[Table]) -> list[Table]:
    """``base`` with ``own`` over it, in the order of ``base``; what is new comes after it.

    A row changes the options of the base's row of the same name. One with another kind replaces it,
    in its place: its options would not be the same ones.
    """
    tables = list(base)
    places = {table.name: at for at, table in enumerate(tables) if table.name is not None}
    for table in own:
        # Each is met once: a second row of one name is somebody's mistake, and is found later.
        at = places.pop(table.name, None) if table.name is not None else None
        if at is None:
            tables.append(table)
        elif "kind" in table.given and table.value("kind") != tables[at].value("kind"):
            tables[at] = table
        else:
            tables[at] = Table(tables[at].place, {**tables[at].given, **table.given})
    return tables


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
