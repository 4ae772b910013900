"""From a profile's name to its checked rows: which tier classes, in which order, which options.

Always true: nothing is opened here. Of a profile that was returned, only the machine can still be
too small and a constructor can refuse; whatever else is wrong is in one ``ProfileError``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcache.profiles import aibrix, variables
from kvcache.profiles.errors import ProfileError
from kvcache.profiles.source import find, read_or_raise
from kvcache.profiles.tiers import Row, override_of, read_rows

DEFAULT = "l1-only"
VARIABLE = "KVCACHE_PROFILE"


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile that was checked, its tiers nearest first.

    ``bases`` are the files it extends, its own base first; ``theirs`` says what became of AIBrix's
    variables, if there were any; ``unknown`` has a sentence for each variable that looks like one
    of kvcache's and is none.
    """

    name: str
    path: Path
    tiers: tuple[Row, ...]
    bases: tuple[Path, ...] = ()
    theirs: aibrix.MigrationReport | None = None
    unknown: tuple[str, ...] = ()


def load_profile(
    profile: str | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    ranks: int = 1,
    replicas: int = 1,
) -> Profile:
    """Read ``profile``, else the one that KVCACHE_PROFILE names, else l1-only.

    ``profile`` is a shipped name, or a path to a TOML file (has a "/" or ends in ".toml").
    AIBrix's variables override the defaults of a shipped profile. ``ranks`` is of the engine;
    AIBrix counts memory for each. A share of memory, such as "50%", is divided by ``replicas``.

    Raises ProfileError with everything that is wrong.
    """
    by = ""
    chosen = profile or environ.get(VARIABLE)
    if profile is None:
        profile, by = chosen or DEFAULT, f"environment variable {VARIABLE}: "
    try:
        path = find(profile, Path.cwd())
    except ValueError as error:
        raise ProfileError(profile, [f"{by}{error}"]) from None
    file, tables = read_or_raise(path, by)
    theirs = aibrix.read(environ, ranks=ranks)
    rows, problems = read_rows(path, tables, environ, theirs.wishes, replicas)
    report, refused = theirs.report(rows)
    problems = [*file.problems, *problems, *theirs.problems, *refused]
    options = (override_of(row.name, option) for row in rows for option in row.takes)
    unknown = variables.unknown(environ, options)
    if problems:  # a misspelt variable may be why
        raise ProfileError(path.stem, [*problems, *unknown])
    return Profile(path.stem, path, tuple(rows), file.bases, report, unknown)
