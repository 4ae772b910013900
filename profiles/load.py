"""From a profile's name to its checked rows: which tier classes, in which order, which options.

Always true: nothing is opened here. Of a profile that was returned, only the machine can still be
too small and a constructor can refuse; whatever else is wrong is in one ``ProfileError``.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcache.profiles.errors import ProfileError, listed, nearest
from kvcache.profiles.lines import Lines
from kvcache.profiles.rows import Row, read_rows

DEFAULT = "l1-only"
VARIABLE = "KVCACHE_PROFILE"

_SHIPPED = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile that was checked, its tiers nearest first."""

    name: str
    path: Path
    tiers: tuple[Row, ...]


def shipped() -> list[str]:
    """Names of the profiles that come with the library: the TOML files beside this one."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def load_profile(profile: str | None = None, environ: Mapping[str, str] = os.environ) -> Profile:
    """Read ``profile``, else the one that KVCACHE_PROFILE names, else l1-only.

    ``profile`` is a shipped name, or a path to a TOML file (has a "/" or ends in ".toml").
    Raises ProfileError with everything that is wrong.
    """
    by = ""
    if profile is None:
        profile, by = environ.get(VARIABLE) or DEFAULT, f"environment variable {VARIABLE}: "
    path = _find(profile, by)
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ProfileError(path.stem, [f"{by}cannot read {path}: {error.strerror}"]) from error
    except ValueError as error:  # tomllib's own words have the line and the column
        raise ProfileError(path.stem, [f"{path} is not TOML: {error}"]) from error
    rows, problems = read_rows(document, Lines(path, text), environ)
    if problems:
        raise ProfileError(path.stem, problems)
    return Profile(path.stem, path, tuple(rows))


def _find(profile: str, by: str) -> Path:
    if "/" in profile or profile.endswith(".toml"):
        return Path(profile).absolute()
    known = shipped()
    if profile in known:
        return _SHIPPED / f"{profile}.toml"
    problem = (
        f"{by}no such profile; shipped are {listed(known)}, and a path to a file of yours "
        f'has a "/" or ends in ".toml"{nearest(profile, known)}'
    )
    raise ProfileError(profile, [problem])
