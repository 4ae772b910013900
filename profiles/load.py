"""Load a profile: from its name to checked rows with tier classes and options.

Invariant: loading opens nothing. After a profile was loaded, opening it can still fail for two
reasons only: the machine has too little memory, or a tier's constructor raises. One
``ProfileError`` lists everything else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcache.profiles import variables
from kvcache.profiles.aibrix import MigrationReport, read_aibrix
from kvcache.profiles.errors import ProfileError
from kvcache.profiles.source import find_profile, read_or_raise
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
