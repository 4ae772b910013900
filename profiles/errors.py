"""``ProfileError``, and the functions that format a problem of a profile.

Invariant: a ``ProfileError`` lists every problem that was found, not only the first one, and
contains no secret.
"""

import difflib
import json
from collections.abc import Iterable, Sequence

from kvcache import secrets

_MAX_SHOWN = 500  # characters of a value


class ProfileError(ValueError):
    """A profile cannot be used.

    Attributes:
        profile: the name or path of the profile.
        problems: one sentence per problem.
    """

    def __init__(self, profile: str, problems: Sequence[str]) -> None:
        super().__init__(profile, problems)
        self.profile = profile
        self.problems = tuple(map(secrets.escape_unprintable, problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"profile {show(self.profile)}: {self.problems[0]}"
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        return f"profile {show(self.profile)}: {len(self.problems)} problems:{lines}"


def show(value: object) -> str:
    """Format ``value`` as in a profile, shortened and without anything that may be a secret."""
    text = secrets.escape_unprintable(
        json.dumps(secrets.hide_nested(value), ensure_ascii=False, default=str)
    )
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def show_option(name: str, value: object) -> str:
    """Format ``name = value`` as in a profile; a value that may be a secret is hidden."""
    return f"{name} = {secrets.HIDDEN if secrets.must_hide(name, value) else show(value)}"


def listed(values: Iterable[object]) -> str:
    """Format ``values`` as in a profile, separated by commas; "none" if there are none."""
    return ", ".join(show(value) for value in values) or "none"


def nearest(given: object, known: Iterable[object]) -> str:
    """Return '; did you mean "lru"?' if a value of ``known`` resembles ``given``, else ""."""
    by_lower = {str(value).lower(): value for value in known}
    close = difflib.get_close_matches(str(given).lower(), by_lower, n=1)
    return f"; did you mean {show(by_lower[close[0]])}?" if close else ""
