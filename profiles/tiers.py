"""Turns the tables of a profile, and the variables that override them, into a checked row per tier.

Invariants:

* The options of a row have the types of its class's constructor, and no required one is missing.
* Every variable with the prefix ``KVCACHE__`` was used, or is a problem.
* A shipped kind wins over an installed one, a class path needs no registration, and only the named
  class is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from kvcache import huge_pages
from kvcache.guards.calls import describe_error, raised_by_signal
from kvcache.lower.tier import LowerTier
from kvcache.profiles import secrets
from kvcache.profiles.errors import listed, nearest, show, show_option
from kvcache.profiles.options import Option, allowed_values, convert, options_of, parse_text
from kvcache.profiles.source import TOP_KEYS, TierTable
from kvcache.profiles.variables import OVERRIDE, overrides
from kvcache.tier import FrontTier, Tier
from kvcache.tiers.framed import Framed

_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")  # single separators: in a variable, "__" ends it
_NOT_OPTIONS = ("name", "kind")

VARIABLE = "environment variable"
"""Begins the place of a value that a variable set."""

WRAPPERS = (Framed, LowerTier)
"""Classes that the stack wraps around a lower tier; the tier's row sets their options too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontOptions:
    """Options of L1 for the stack, in addition to those of its class.

    Args:
        announce: whether L1's blocks are announced to subscribers of the stack's events.
    """

    announce: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that was set for an option.

    Attributes:
        option: the option.
        value: the value, converted to the option's type.
        given: the value as written.
        place: the file and line, or the variable.
        set_by_user: false for the default of a shipped profile.
    """

    option: Option
    value: object
    given: object
    place: str
    set_by_user: bool = True

    @property
    def where(self) -> str:
        """The place, the option and the value as written, for messages."""
        return f"{self.place}: {show_option(self.option.name, self.given)}"


@dataclass(frozen=True, slots=True)
class Row:
    """One tier of a profile.

    Attributes:
        name: the tier's name.
        kind: its kind, as written.
        cls: its class.
        settings: the options that were set.
        where: the file and line of its [[tier]].
        accepted: the options that the row may set: those of the class, and those of ``WRAPPERS``
            for a lower tier, of ``FrontOptions`` for L1.
    """

    name: str
    kind: str
    cls: type[Tier]
    settings: tuple[Setting, ...]
    where: str
    accepted: Mapping[str, Option]

    @property
    def options(self) -> dict[str, object]:
        """The values of the options that were set."""
        return {setting.option.name: setting.value for setting in self.settings}

    def locate(self, error: str) -> str:
        """Prefix an error text of the tier's class with the place of its option.

        The option is the first one that the text names. If the text names none, the place is the
        row, with the variables that changed it. The value is left out: only the class knows
        whether it is a secret.
        """
        by_position = {
            found.start(): setting
            for setting in self.settings
            if (found := re.search(rf"(?<![\w.]){re.escape(setting.option.name)}\b", error))
        }
        if by_position:
            return f"{by_position[min(by_position)].place}: {error}"
        variables = [one.place for one in self.settings if one.place.startswith(VARIABLE)]
        changed = f", changed by {', '.join(variables)}" if variables else ""
        return f"{self.where}{changed}: {error}"

    def huge_nbytes(self, nbytes: int) -> int:
        """Return how many of so many bytes of memory the tier would take in free huge pages."""
        if "huge_pages" not in self.accepted or not self.options.get("huge_pages", True):
            return 0
        return min(huge_pages.free() * huge_pages.HUGE_PAGE, nbytes)

    def options_for(self, cls: type) -> dict[str, Any]:
        """Return the options that are keyword arguments of ``cls``."""
        known = options_of(cls)
        return {name: value for name, value in self.options.items() if name in known}


@dataclass(frozen=True, slots=True)
class RequestedOption:
    """An option that a variable of another library sets.

    It applies to the first tier, or to the tiers ``below`` it. It overrides the default of a
    shipped profile, but neither a user's file nor a ``KVCACHE__`` variable.
    """

    place: str
    option: str
    value: object
    below: bool


def read_rows(
    path: Path,
    tables: Sequence[TierTable],
    environ: Mapping[str, str],
    requests: Sequence[RequestedOption] = (),
    replicas: int = 1,
    *,
    has_front: bool = True,
) -> tuple[list[Row], list[str]]:
    """Return the rows that could be read, and the problems; use the rows only without problems.

    Shares of memory are divided by ``replicas``. With ``has_front`` the first row is L1, else all
    rows are lower tiers.
    """
    reader = _RowReader(path, environ, requests, replicas, has_front=has_front)
    return reader.rows(tables), reader.problems


def override_of(tier: str, option: str) -> str:
    """Return the environment variable that sets an option of a tier."""
    return f"{OVERRIDE}{_variable(tier)}__{_variable(option)}"


def _variable(name: str) -> str:
    return name.upper().replace("-", "_")


def _joined(own: dict[str, Option], *wrappers: dict[str, Option]) -> dict[str, Option]:
    joined = dict(own)
    for options in wrappers:
        if taken := sorted(joined.keys() & options.keys()):
            raise ValueError(
                f"its options {listed(taken)} have names that the stack uses; rename them"
            )
        joined |= options
    return joined


class _RowReader:
    """Reads the tables. It continues after a problem, to find the others."""

    def __init__(
        self,
        path: Path,
        environ: Mapping[str, str],
        requests: Sequence[RequestedOption],
        replicas: int,
        *,
        has_front: bool,
    ) -> None:
        self.problems: list[str] = []
        self._path = path
        self._has_front = has_front
        self._requests = requests
        self._replicas = replicas
        self._names: list[str] = []
        self._overrides = overrides(environ)

    def rows(self, tables: Sequence[TierTable]) -> list[Row]:
        rows = [self._row(number, table) for number, table in enumerate(tables)]
        known = [_variable(name) for name in self._names]
        for variable, text in self._overrides.items():  # variables that no row used
            self._add_problem(
                f"{VARIABLE} {show_option(variable, text)}",
                "no such tier; the form is KVCACHE__<TIER>__<OPTION>, and the tiers here are "
                + listed(known)
                + nearest(variable.removeprefix(OVERRIDE).partition("__")[0], known),
            )
        self._check_order(tables, rows)
        return [row for row in rows if row]

    def _check_order(self, tables: Sequence[TierTable], rows: Sequence[Row | None]) -> None:
        if not self._has_front:
            self._check_lower(tables, rows)
            return
        if not rows:
            self._add_problem(str(self._path), 'lists no tier; write [[tier]], kind = "dram"')
        if rows and (front := rows[0]) and not issubclass(front.cls, FrontTier):
            self._add_problem(
                tables[0].where("kind"),
                'the first tier must lend its memory to the engine, as "dram" does; '
                f"{front.cls.__qualname__} is no subclass of kvcache.tier.FrontTier",
            )

    def _check_lower(self, tables: Sequence[TierTable], rows: Sequence[Row | None]) -> None:
        if not rows:
            self._add_problem(str(self._path), 'lists no tier; write [{"name": ..., "kind": ...}]')
        for table, row in zip(tables, rows, strict=True):
            if row and issubclass(row.cls, FrontTier):
                self._add_problem(
                    table.where("kind"),
                    "is an L1; leave it out, the engine's own host memory takes its place",
                )

    def _row(self, number: int, table: TierTable) -> Row | None:
        name, kind = self._name(table), table.value("kind")
        overrides = self._overrides_of(name)
        try:
            if not isinstance(kind, str):
                # The table may have been meant to change a tier of the base.
                near = nearest(name, [known for known in self._names if known != name])
                raise ValueError(f'a tier needs a kind, such as "dram" or "pkg.mod:Class"{near}')
            cls = tier_class(kind)
            options = options_of(cls)
            below = number or not self._has_front
            wrappers = WRAPPERS if below else (FrontOptions,)
            options = _joined(options, *map(options_of, wrappers))
        except ValueError as error:
            self._add_problem(table.where("kind"), str(error))
            return None
        where = f"{table.place}: tier {show(name)}"
        settings: dict[str, Setting] = {}
        seen = set()
        for place, key, given, set_by_user in self._given_values(number, table, overrides, options):
            seen.add(key)
            here = f"{place}: {show_option(key, given)}"
            if key not in options:
                allowed = f"takes {listed(options)}{nearest(key, options)}"
                if key in TOP_KEYS:
                    allowed += f"; {key} stands above the first [[tier]]"
                self._add_problem(here, f"no such option; kind {show(kind)} {allowed}")
                continue
            try:
                value = convert(given, options[key].hint, self._replicas)
                secrets.refuse_secret_value(key, value)
            except (ValueError, OverflowError) as error:
                self._add_problem(here, str(error))
            else:
                settings[key] = Setting(options[key], value, given, place, set_by_user)
        for option in options.values():
            if option.required and option.name not in seen:
                needs = f"kind {show(kind)} needs it; it takes {allowed_values(option.hint)}"
                self._add_problem(where, f"{option.name} is missing; {needs}")
        return Row(name, kind, cls, tuple(settings.values()), where, options)

    def _given_values(
        self,
        number: int,
        table: TierTable,
        overrides: Mapping[str, str],
        options: Mapping[str, Option],
    ) -> Iterator[tuple[str, str, object, bool]]:
        """Yield (place, option, value, set by the user); of one option the last value wins."""
        requests = [
            request
            for request in self._requests
            if request.below == bool(number) and request.option in options
        ]
        files = [(key, given) for key, given in table.given.items() if key not in _NOT_OPTIONS]
        yield from ((given.place, key, given.value, False) for key, given in files if given.shipped)
        yield from ((each.place, each.option, each.value, True) for each in requests)
        yield from (
            (given.place, key, given.value, True) for key, given in files if not given.shipped
        )
        names = {_variable(name): name for name in options}
        for variable, text in overrides.items():
            place = f"{VARIABLE} {variable}"
            key = variable.removeprefix(OVERRIDE).partition("__")[2]
            if key.lower() in _NOT_OPTIONS:
                self._add_problem(
                    f"{place} = {show(text)}", "only the profile sets the name and kind"
                )
            elif key in names:
                yield place, names[key], parse_text(text, options[names[key]].hint), True
            else:
                yield place, key, text, True

    def _name(self, table: TierTable) -> str:
        name = table.name
        if name is None or not _NAME.fullmatch(name):
            self._add_problem(
                table.where("name"),
                "a tier needs a name of lower-case letters and digits, "
                'with single "-" or "_" between, such as "l1"',
            )
        elif _variable(name) in map(_variable, self._names):
            self._add_problem(
                table.where("name"),
                f"two tiers have this name; the names are {listed(self._names)}",
            )
        else:
            self._names.append(name)
        return str(table.value("name"))

    def _overrides_of(self, name: str) -> dict[str, str]:
        """Remove the variables of this tier from the unused ones, and return them."""
        prefix = f"{OVERRIDE}{_variable(name)}__"
        used = [variable for variable in self._overrides if variable.startswith(prefix)]
        return {variable: self._overrides.pop(variable) for variable in used}

    def _add_problem(self, where: str, problem: str) -> None:
        self.problems.append(f"{where}: {problem}")


GROUP = "kvcache.tiers"
"""Entry-point group in which installed packages register tiers."""

KINDS: dict[str, tuple[str, str | None]] = {
    "dram": ("kvcache.tiers.dram:DramTier", None),
    "disk": ("kvcache.tiers.disk:DiskTier", None),
    "redis": ("kvcache.tiers.redis:RedisTier", "redis"),
    "object": ("kvcache.tiers.object:ObjectTier", "object"),
    "mooncake": ("kvcache.tiers.mooncake:MooncakeTier", "mooncake"),
}
"""Shipped kinds: the class path, and the extra that installs its requirements."""


def known_kinds() -> list[str]:
    """Return the names of kinds: the shipped ones and those of installed packages."""
    return sorted({*KINDS, *entry_points(group=GROUP).names})


def tier_class(kind: str) -> type[Tier]:
    """Return the class of ``kind``. Raises ValueError with the cause or the known kinds."""
    path, extra = _path(kind)
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except BaseException as error:  # a module of another package may raise anything
        if raised_by_signal(error):
            raise
        if extra and isinstance(error, ImportError):
            raise ValueError(f"needs packages: pip install 'kvcache[{extra}]' ({error})") from error
        raised, text = describe_error(error)
        raise ValueError(f"cannot import {path} ({raised}: {text})") from error
    if not (isinstance(found, type) and issubclass(found, Tier)):
        raise ValueError(f"{path} is no subclass of kvcache.tier.Tier")
    if missing := sorted(found.__abstractmethods__):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return found


def _path(kind: str) -> tuple[str, str | None]:
    """Return the class path of ``kind`` and the extra that it needs."""
    if kind in KINDS:
        return KINDS[kind]
    if ":" in kind and "://" not in kind:  # a URL may have a password: do not repeat it
        return kind, None
    installed = entry_points(group=GROUP)
    match sorted({point.value for point in installed if point.name == kind}):
        case [path]:
            return path, None
        case [_, *_] as paths:
            raise ValueError(f"several packages register it; write one of {listed(paths)}")
    known = known_kinds()
    raise ValueError(
        f'no such kind; there are {listed(known)}, or "pkg.mod:Class"{nearest(kind, known)}'
    )
