"""The one error of this room, and how a problem is put into words.

Always true: a ``ProfileError`` lists every problem that was found, not the first one, and repeats
no secret.
"""

import difflib
import json
from collections.abc import Iterable, Sequence

from kvcache import secrets

_SHOWN = 500  # characters of a value


class ProfileError(ValueError):
    """A profile cannot be used. ``problems`` has one sentence for each thing that is wrong."""

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
    """``value`` as a profile would write it, without what may be a secret in it; not endless."""
    text = secrets.escape_unprintable(
        json.dumps(secrets.hide_nested(value), ensure_ascii=False, default=str)
    )
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def show_option(name: str, value: object) -> str:
    """``name = value`` as a profile would write it, without the value if it may be a secret."""
    return f"{name} = {secrets.HIDDEN if secrets.must_hide(name, value) else show(value)}"


def listed(values: Iterable[object]) -> str:
    """``values`` as a profile would write them, with commas between."""
    return ", ".join(show(value) for value in values) or "none"


def nearest(given: object, known: Iterable[object]) -> str:
    """'; did you mean "lru"?' if one of ``known`` looks like ``given``, else nothing."""
    by_lower = {str(value).lower(): value for value in known}
    close = difflib.get_close_matches(str(given).lower(), by_lower, n=1)
    return f"; did you mean {show(by_lower[close[0]])}?" if close else ""
