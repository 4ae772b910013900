"""From a profile's name to its checked rows: which tier classes, in which order, which options.

Always true: nothing is opened here. Of a profile that was returned, only the machine can still be
too small and a constructor can refuse; whatever else is wrong is in one ``ProfileError``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcache.profiles import aibrix
from kvcache.profiles.errors import ProfileError
from kvcache.profiles.files import find, read_or_raise
from kvcache.profiles.rows import Row, read_rows

DEFAULT = "l1-only"
VARIABLE = "KVCACHE_PROFILE"


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile that was checked, its tiers nearest first.

    ``bases`` are the files it extends, its own base first; ``theirs`` says what became of AIBrix's
    variables, if there were any.
    """

    name: str
    path: Path
    tiers: tuple[Row, ...]
    bases: tuple[Path, ...] = ()
    theirs: aibrix.Report | None = None


def load_profile(
    profile: str | None = None, environ: Mapping[str, str] = os.environ, *, ranks: int = 1
) -> Profile:
    """Read ``profile``, else the one that KVCACHE_PROFILE names, else l1-only.

    ``profile`` is a shipped name, or a path to a TOML file (has a "/" or ends in ".toml").
    AIBrix's variables win over the file of a profile that nobody chose. ``ranks`` is of the engine;
    AIBrix counts memory for each.

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
    theirs = aibrix.read(environ, chosen=bool(chosen), ranks=ranks)
    rows, problems = read_rows(path, tables, environ, theirs.wishes)
    problems = [*file.problems, *problems, *theirs.problems]
    if problems:
        raise ProfileError(path.stem, problems)
    return Profile(path.stem, path, tuple(rows), file.bases, theirs.report(rows))
