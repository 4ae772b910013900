"""From a profile's document and the variables that override it to checked rows, one per tier.

Always true: a row's options have the types of its class's constructor, none that is required is
missing, and every variable that begins with KVCACHE__ was used or is a problem.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcache.lower import Lower
from kvcache.profiles.errors import listed, nearest, show, show_option
from kvcache.profiles.kinds import tier_class
from kvcache.profiles.lines import TOP, Lines
from kvcache.profiles.options import Option, converted, from_text, options_of, takes
from kvcache.tier import FrontTier, Tier
from kvcache.tiers.framed import Framed

OVERRIDE = "KVCACHE__"

_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")  # single separators: "__" ends it in a variable
_FIXED = ("name", "kind")

AROUND = (Framed, Lower)
"""What the stack puts around a tier below the first; their options are set in the tier's row."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An option that was set. ``where`` says in which file and line or variable, and to what."""

    option: Option
    value: object
    where: str


@dataclass(frozen=True, slots=True)
class Row:
    """One tier of a profile. ``where`` says the file and line its row starts in.

    Below the first tier, a row has the options of its class, of the frame around it, and of the
    stack's dealings with it.
    """

    name: str
    kind: str
    cls: type[Tier]
    settings: tuple[Setting, ...]
    where: str

    @property
    def options(self) -> dict[str, object]:
        """All that the file and the environment set."""
        return {setting.option.name: setting.value for setting in self.settings}

    def options_for(self, cls: type) -> dict[str, Any]:
        """Those of them that are keyword arguments of ``cls``."""
        its = options_of(cls)
        return {name: value for name, value in self.options.items() if name in its}


def read_rows(
    document: Mapping[str, object], lines: Lines, environ: Mapping[str, str]
) -> tuple[list[Row], list[str]]:
    """The rows that could be read, and everything that is wrong; the rows count if nothing is."""
    reader = _Reader(lines, environ)
    return reader.rows(document), reader.problems


def _variable(name: str) -> str:
    return name.upper().replace("-", "_")


def _joined(own: dict[str, Option], *around: dict[str, Option]) -> dict[str, Option]:
    joined = dict(own)
    for options in around:
        if taken := sorted(joined.keys() & options.keys()):
            raise ValueError(
                f"its options {listed(taken)} are the stack's own; name them otherwise"
            )
        joined |= options
    return joined


class _Reader:
    """One pass over a document. It goes on after a problem, to find the others."""

    def __init__(self, lines: Lines, environ: Mapping[str, str]) -> None:
        self.problems: list[str] = []
        self._lines = lines
        self._names: list[str] = []
        self._overrides = {
            variable: text for variable, text in environ.items() if variable.startswith(OVERRIDE)
        }

    def rows(self, document: Mapping[str, object]) -> list[Row]:
        for key in document:
            if key != "tier":
                self._wrong(
                    f"{self._lines.place(TOP, key)}: {key}",
                    "no such key; a profile has [[tier]] tables and nothing else"
                    + nearest(key, ["tier"]),
                )
        tables = document.get("tier", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._wrong(f"{self._lines.place(TOP, 'tier')}: tier", "write tiers under [[tier]]")
            return []
        rows = [self._row(number, table) for number, table in enumerate(tables)]
        known = [_variable(name) for name in self._names]
        for variable, text in self._overrides.items():  # the rows took theirs
            self._wrong(
                f"environment variable {show_option(variable, text)}",
                f"no such tier; the form is {OVERRIDE}<TIER>__<OPTION>, and the tiers here are "
                + listed(known)
                + nearest(variable.removeprefix(OVERRIDE).partition("__")[0], known),
            )
        self._check_order(rows)
        return [row for row in rows if row]

    def _check_order(self, rows: Sequence[Row | None]) -> None:
        if not rows:
            self._wrong(self._lines.place(TOP), 'lists no tier; write [[tier]], kind = "dram"')
        if rows and (front := rows[0]) and not issubclass(front.cls, FrontTier):
            self._wrong(
                f"{self._lines.place(0, 'kind')}: kind = {show(front.kind)}",
                'the first tier lends its memory to the engine; "dram" does, '
                f"{front.cls.__qualname__} is no subclass of kvcache.tier.FrontTier",
            )

    def _row(self, number: int, table: Mapping[str, object]) -> Row | None:
        name, kind = self._name(number, table), table.get("kind")
        overrides = self._overrides_of(name)
        try:
            if not isinstance(kind, str):
                raise ValueError('a tier needs a kind, such as "dram" or "pkg.mod:Class"')
            cls = tier_class(kind)
            options = options_of(cls)
            if number:
                options = _joined(options, *map(options_of, AROUND))
        except ValueError as error:
            self._wrong(self._where(number, table, "kind"), str(error))
            return None
        where = f"{self._lines.place(number)}: tier {show(name)}"
        settings: dict[str, Setting] = {}
        seen = set()
        for place, key, given in self._given(number, table, overrides, options):
            seen.add(key)
            here = f"{place}: {show_option(key, given)}"
            if key not in options:
                allowed = f"takes {listed(options)}{nearest(key, options)}"
                self._wrong(here, f"no such option; kind {show(kind)} {allowed}")
                continue
            try:
                value = converted(given, options[key].hint)
            except (ValueError, OverflowError) as error:
                self._wrong(here, str(error))
            else:
                settings[key] = Setting(options[key], value, here)
        for option in options.values():
            if option.required and option.name not in seen:
                needs = f"kind {show(kind)} needs it; it takes {takes(option.hint)}"
                self._wrong(where, f"{option.name} is missing; {needs}")
        return Row(name, kind, cls, tuple(settings.values()), where)

    def _given(
        self,
        number: int,
        table: Mapping[str, object],
        overrides: Mapping[str, str],
        options: Mapping[str, Option],
    ) -> Iterator[tuple[str, str, object]]:
        """What was set: the place, the option's name and the value. Overrides come last, to win."""
        for key, value in table.items():
            if key not in _FIXED:
                yield self._lines.place(number, key), key, value
        names = {_variable(name): name for name in options}
        for variable, text in overrides.items():
            place = f"environment variable {variable}"
            key = variable.removeprefix(OVERRIDE).partition("__")[2]
            if key.lower() in _FIXED:
                self._wrong(f"{place} = {show(text)}", "a tier's name and kind are the profile's")
            elif key in names:
                yield place, names[key], from_text(text, options[names[key]].hint)
            else:
                yield place, key, text

    def _name(self, number: int, table: Mapping[str, object]) -> str:
        name, where = table.get("name"), self._where(number, table, "name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self._wrong(
                where,
                "a tier needs a name of lower-case letters and digits, "
                'with single "-" or "_" between, such as "l1"',
            )
        elif _variable(name) in map(_variable, self._names):
            self._wrong(where, f"two tiers with one name; names here are {listed(self._names)}")
        else:
            self._names.append(name)
        return str(name)

    def _overrides_of(self, name: str) -> dict[str, str]:
        """The variables that speak of this tier, taken away from those left over."""
        prefix = f"{OVERRIDE}{_variable(name)}__"
        mine = [variable for variable in self._overrides if variable.startswith(prefix)]
        return {variable: self._overrides.pop(variable) for variable in mine}

    def _where(self, number: int, table: Mapping[str, object], key: str) -> str:
        says = f"{key} = {show(table[key])}" if key in table else f"{key} is missing"
        return f"{self._lines.place(number, key)}: {says}"

    def _wrong(self, where: str, says: str) -> None:
        self.problems.append(f"{where}: {says}")
