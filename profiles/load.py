"""Load a profile: from its name to checked rows with tier classes and options.

Invariant: loading opens nothing. After a profile was loaded, opening it can still fail for two
reasons only: the machine has too little memory, or a tier's constructor raises. One
``ProfileError`` lists everything else.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcache import inputs
from kvcache.profiles import variables
from kvcache.profiles.aibrix import MigrationReport, read_aibrix
from kvcache.profiles.errors import ProfileError
from kvcache.profiles.source import GivenValue, TierTable, find_profile, read_or_raise
from kvcache.profiles.tiers import Row, override_of, read_rows

DEFAULT = "l1-only"
VARIABLE = "KVCACHE_PROFILE"


@dataclass(frozen=True, slots=True)
class Profile:
    """A checked profile.

    Attributes:
        name: the file's name without its suffix.
        path: the profile's file.
        tiers: a row per tier, nearest first.
        bases: the files that it extends, its direct base first.
        aibrix: the effect of AIBrix's variables; None if none is set.
        unknown: a sentence for each variable that is named like one of kvcache's but unknown.
    """

    name: str
    path: Path
    tiers: tuple[Row, ...]
    bases: tuple[Path, ...] = ()
    aibrix: MigrationReport | None = None
    unknown: tuple[str, ...] = ()


def load_profile(
    profile: str | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    ranks: int = 1,
    replicas: int = 1,
) -> Profile:
    """Load ``profile``, else the one that KVCACHE_PROFILE names, else l1-only.

    Args:
        profile: a shipped name, or a path to a TOML file (has a "/" or ends in ".toml").
        environ: the environment. AIBrix's variables override the defaults of a shipped profile.
        ranks: the ranks of the engine. AIBrix's capacity is per rank.
        replicas: divides shares of memory, such as "50%".

    Raises:
        ProfileError: with every problem.
    """
    origin = ""
    if profile is None:
        profile, origin = environ.get(VARIABLE) or DEFAULT, f"environment variable {VARIABLE}: "
    try:
        path = find_profile(profile, Path.cwd())
    except ValueError as error:
        raise ProfileError(profile, [f"{origin}{error}"]) from None
    file, tables = read_or_raise(path, origin)
    settings = read_aibrix(environ, ranks=ranks)
    rows, problems = read_rows(path, tables, environ, settings.requests, replicas)
    report, refused = settings.report(rows)
    problems = [*file.problems, *problems, *settings.problems, *refused]
    options = (override_of(row.name, option) for row in rows for option in row.accepted)
    unknown = variables.unknown_variables(environ, options)
    if problems:  # a misspelt variable may be the cause: list those too
        raise ProfileError(path.stem, [*problems, *unknown])
    return Profile(path.stem, path, tuple(rows), file.bases, report, unknown)


def load_tables(
    tables: object,
    environ: Mapping[str, str] = os.environ,
    *,
    origin: str = "tiers",
    replicas: int = 1,
) -> Profile:
    """Load lower tiers that an engine's configuration lists, as a profile without an L1.

    Args:
        tables: a list of mappings, each with the keys that a [[tier]] of a profile has.
        environ: the environment; ``KVCACHE__<TIER>__<OPTION>`` overrides an option.
        origin: where the tables are written, for errors; also the profile's name.
        replicas: divides shares of memory, such as "50%".

    Raises:
        ProfileError: with every problem.
    """
    path = Path(origin)
    if not isinstance(tables, Sequence) or not all(isinstance(each, Mapping) for each in tables):
        raise ProfileError(
            origin, [f'{origin}: write a list of tiers, such as [{{"name": ..., "kind": ...}}]']
        )
    try:
        inputs.check_document(list(tables))
    except ValueError as error:
        raise ProfileError(origin, [f"{origin}: {error}"]) from None
    read = []
    for number, table in enumerate(tables):
        place = f"{origin}[{number}]"
        given = {str(key): GivenValue(value, place) for key, value in table.items()}
        read.append(TierTable(place, given))
    rows, problems = read_rows(path, read, environ, replicas=replicas, has_front=False)
    options = (override_of(row.name, option) for row in rows for option in row.accepted)
    unknown = variables.unknown_variables(environ, options)
    if problems:
        raise ProfileError(origin, [*problems, *unknown])
    return Profile(origin, path, tuple(rows), unknown=unknown)
