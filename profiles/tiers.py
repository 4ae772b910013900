"""From a profile's tables and the variables that override it to checked rows, one per tier.

Always true: a row's options have the types of its class's constructor, none that is required is
missing, and every variable that begins with KVCACHE__ was used or is a problem.

From the ``kind`` in a profile to the tier's class.

Always true: a shipped name wins over an installed one, a class path needs no registration, and
nothing but the class asked for is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from kvcache.guards.calls import describe_error, raised_by_signal
from kvcache.lower.tier import LowerTier
from kvcache.profiles import secrets
from kvcache.profiles.errors import listed, nearest, show, show_option
from kvcache.profiles.options import Option, converted, from_text, options_of, takes
from kvcache.profiles.source import TOP_KEYS, Table
from kvcache.profiles.variables import OVERRIDE, overrides
from kvcache.tier import FrontTier, Tier
from kvcache.tiers.framed import Framed

_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")  # single separators: "__" ends it in a variable
_FIXED = ("name", "kind")

VARIABLE = "environment variable"
"""How the place of a value begins that a variable gave."""

AROUND = (Framed, LowerTier)
"""What the stack puts around a tier below the first; their options are set in the tier's row."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An option that was set: to what, and by which line of which file, or which variable.

    ``chosen`` is false for the default of a shipped profile, which no user wrote.
    """

    option: Option
    value: object
    given: object
    place: str
    chosen: bool = True

    @property
    def where(self) -> str:
        """Its place, and what was given."""
        return f"{self.place}: {show_option(self.option.name, self.given)}"


@dataclass(frozen=True, slots=True)
class Row:
    """One tier of a profile. ``where`` says the file and line its row starts in.

    Below the first tier, a row has the options of its class, of the frame around it, and of the
    stack's dealings with it. ``takes`` has them all, ``settings`` those that were set.
    """

    name: str
    kind: str
    cls: type[Tier]
    settings: tuple[Setting, ...]
    where: str
    takes: Mapping[str, Option]

    @property
    def options(self) -> dict[str, object]:
        """All that the file and the environment set."""
        return {setting.option.name: setting.value for setting in self.settings}

    def blame(self, error: str) -> str:
        """``error`` of the tier's class, with the place of the option that it is about.

        That is the first option that the text names. If it names none, the place is the row, with
        the variables that changed it. The value is the class's to repeat, which knows what may be
        a secret in it.
        """
        at = {
            found.start(): setting
            for setting in self.settings
            if (found := re.search(rf"(?<![\w.]){re.escape(setting.option.name)}\b", error))
        }
        if at:
            return f"{at[min(at)].place}: {error}"
        variables = [one.place for one in self.settings if one.place.startswith(VARIABLE)]
        changed = f", changed by {', '.join(variables)}" if variables else ""
        return f"{self.where}{changed}: {error}"

    def options_for(self, cls: type) -> dict[str, Any]:
        """Those of them that are keyword arguments of ``cls``."""
        its = options_of(cls)
        return {name: value for name, value in self.options.items() if name in its}


@dataclass(frozen=True, slots=True)
class Wish:
    """What another variable than ours asks for: an option of the first tier, or of those below it.

    It overrides the default of a shipped profile, and neither a user's file nor our variables.
    """

    place: str
    option: str
    value: object
    below: bool


def read_rows(
    path: Path,
    tables: Sequence[Table],
    environ: Mapping[str, str],
    wishes: Sequence[Wish] = (),
    replicas: int = 1,
) -> tuple[list[Row], list[str]]:
    """The rows that could be read, and everything that is wrong; the rows count if nothing is.

    They are those of each of ``replicas``.
    """
    reader = _Reader(path, environ, wishes, replicas)
    return reader.rows(tables), reader.problems


def override_of(tier: str, option: str) -> str:
    """The environment variable that sets an option of a tier."""
    return f"{OVERRIDE}{_variable(tier)}__{_variable(option)}"


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
    """One pass over the tables. It goes on after a problem, to find the others."""

    def __init__(
        self, path: Path, environ: Mapping[str, str], wishes: Sequence[Wish], replicas: int
    ) -> None:
        self.problems: list[str] = []
        self._path = path
        self._wishes = wishes
        self._replicas = replicas
        self._names: list[str] = []
        self._overrides = overrides(environ)

    def rows(self, tables: Sequence[Table]) -> list[Row]:
        rows = [self._row(number, table) for number, table in enumerate(tables)]
        known = [_variable(name) for name in self._names]
        for variable, text in self._overrides.items():  # the rows took theirs
            self._wrong(
                f"{VARIABLE} {show_option(variable, text)}",
                "no such tier; the form is KVCACHE__<TIER>__<OPTION>, and the tiers here are "
                + listed(known)
                + nearest(variable.removeprefix(OVERRIDE).partition("__")[0], known),
            )
        self._check_order(tables, rows)
        return [row for row in rows if row]

    def _check_order(self, tables: Sequence[Table], rows: Sequence[Row | None]) -> None:
        if not rows:
            self._wrong(str(self._path), 'lists no tier; write [[tier]], kind = "dram"')
        if rows and (front := rows[0]) and not issubclass(front.cls, FrontTier):
            self._wrong(
                tables[0].where("kind"),
                'the first tier lends its memory to the engine; "dram" does, '
                f"{front.cls.__qualname__} is no subclass of kvcache.tier.FrontTier",
            )

    def _row(self, number: int, table: Table) -> Row | None:
        name, kind = self._name(table), table.value("kind")
        overrides = self._overrides_of(name)
        try:
            if not isinstance(kind, str):
                # Perhaps it was to change a row of what this file extends.
                near = nearest(name, [known for known in self._names if known != name])
                raise ValueError(f'a tier needs a kind, such as "dram" or "pkg.mod:Class"{near}')
            cls = tier_class(kind)
            options = options_of(cls)
            if number:
                options = _joined(options, *map(options_of, AROUND))
        except ValueError as error:
            self._wrong(table.where("kind"), str(error))
            return None
        where = f"{table.place}: tier {show(name)}"
        settings: dict[str, Setting] = {}
        seen = set()
        for place, key, given, chosen in self._given(number, table, overrides, options):
            seen.add(key)
            here = f"{place}: {show_option(key, given)}"
            if key not in options:
                allowed = f"takes {listed(options)}{nearest(key, options)}"
                if key in TOP_KEYS:
                    allowed += f"; {key} stands above the first [[tier]]"
                self._wrong(here, f"no such option; kind {show(kind)} {allowed}")
                continue
            try:
                value = converted(given, options[key].hint, self._replicas)
                secrets.check(key, value)
            except (ValueError, OverflowError) as error:
                self._wrong(here, str(error))
            else:
                settings[key] = Setting(options[key], value, given, place, chosen)
        for option in options.values():
            if option.required and option.name not in seen:
                needs = f"kind {show(kind)} needs it; it takes {takes(option.hint)}"
                self._wrong(where, f"{option.name} is missing; {needs}")
        return Row(name, kind, cls, tuple(settings.values()), where, options)

    def _given(
        self,
        number: int,
        table: Table,
        overrides: Mapping[str, str],
        options: Mapping[str, Option],
    ) -> Iterator[tuple[str, str, object, bool]]:
        """What was set: place, option, value, and if a user chose it. What wins comes later."""
        wishes = [w for w in self._wishes if w.below == bool(number) and w.option in options]
        files = [(key, given) for key, given in table.given.items() if key not in _FIXED]
        yield from ((given.place, key, given.value, False) for key, given in files if given.shipped)
        yield from ((w.place, w.option, w.value, True) for w in wishes)
        yield from (
            (given.place, key, given.value, True) for key, given in files if not given.shipped
        )
        names = {_variable(name): name for name in options}
        for variable, text in overrides.items():
            place = f"{VARIABLE} {variable}"
            key = variable.removeprefix(OVERRIDE).partition("__")[2]
            if key.lower() in _FIXED:
                self._wrong(f"{place} = {show(text)}", "a tier's name and kind are the profile's")
            elif key in names:
                yield place, names[key], from_text(text, options[names[key]].hint), True
            else:
                yield place, key, text, True

    def _name(self, table: Table) -> str:
        name = table.name
        if name is None or not _NAME.fullmatch(name):
            self._wrong(
                table.where("name"),
                "a tier needs a name of lower-case letters and digits, "
                'with single "-" or "_" between, such as "l1"',
            )
        elif _variable(name) in map(_variable, self._names):
            self._wrong(
                table.where("name"),
                f"two tiers with one name; names here are {listed(self._names)}",
            )
        else:
            self._names.append(name)
        return str(table.value("name"))

    def _overrides_of(self, name: str) -> dict[str, str]:
        """The variables that speak of this tier, taken away from those left over."""
        prefix = f"{OVERRIDE}{_variable(name)}__"
        mine = [variable for variable in self._overrides if variable.startswith(prefix)]
        return {variable: self._overrides.pop(variable) for variable in mine}

    def _wrong(self, where: str, says: str) -> None:
        self.problems.append(f"{where}: {says}")


GROUP = "kvcache.tiers"
"""Entry-point group in which an installed package names its tiers."""

KINDS: dict[str, tuple[str, str | None]] = {
    "dram": ("kvcache.tiers.dram:DramTier", None),
    "disk": ("kvcache.tiers.disk:DiskTier", None),
    "redis": ("kvcache.tiers.redis:RedisTier", "redis"),
}
"""Shipped kinds: the class, and the extra that installs what it needs."""


def known_kinds() -> list[str]:
    """The names that can be written for a kind: shipped ones, and those of installed packages."""
    return sorted({*KINDS, *entry_points(group=GROUP).names})


def tier_class(kind: str) -> type[Tier]:
    """The class that ``kind`` means. Raises ValueError that says what is wrong or allowed."""
    path, extra = _path(kind)
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except BaseException as error:  # a module of another package may raise anything
        if raised_by_signal(error):
            raise
        if extra and isinstance(error, ImportError):
            raise ValueError(f"needs more: pip install 'kvcache[{extra}]' ({error})") from error
        raised, text = describe_error(error)
        raise ValueError(f"cannot import {path} ({raised}: {text})") from error
    if not (isinstance(found, type) and issubclass(found, Tier)):
        raise ValueError(f"{path} is no subclass of kvcache.tier.Tier")
    if missing := sorted(found.__abstractmethods__):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return found


def _path(kind: str) -> tuple[str, str | None]:
    """The class path that ``kind`` stands for, and the extra it comes with."""
    if kind in KINDS:
        return KINDS[kind]
    if ":" in kind and "://" not in kind:  # a URL, which may have a password, is not repeated
        return kind, None
    installed = entry_points(group=GROUP)
    match sorted({point.value for point in installed if point.name == kind}):
        case [path]:
            return path, None
        case [_, *_] as paths:
            raise ValueError(f"named by several packages, for {listed(paths)}; write one of these")
    known = known_kinds()
    raise ValueError(
        f'no such kind; there are {listed(known)}, or "pkg.mod:Class"{nearest(kind, known)}'
    )
