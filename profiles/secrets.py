"""Secrets and profiles: a profile names where a secret is, and never holds one.

Always true: what is refused here is less than what ``kvcache.secrets`` hides, which goes by more
names.
"""

import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlsplit

_POINTERS = ("_env", "_file")  # these names say where a secret is

_IS = re.compile(
    r"(^|_)(password|passwd|passphrase|pass|pwd|pw|secret|token|credentials?|(api|access)_?key)(_|$)"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PASSWORD_IN_URL = re.compile(r"://[^/@]*:[^/@]*@")


def refuse(cls: type, names: Iterable[str]) -> None:
    """Raise ValueError if one of a class's options, of type str, would be a secret."""
    for name in names:
        if _IS.search(name) and not name.endswith(_POINTERS):
            raise ValueError(
                f"{cls.__qualname__} takes {name}, and a profile is no place for a secret: let "
                f"it take {name}_env, the name of an environment variable"
            )


def check(name: str, value: object) -> None:
    """Raise ValueError if ``value`` of an option has a password in it.

    That is a URL with one, or what should be the name of a variable and cannot be.
    """
    if name.endswith("_env") and value and not _VARIABLE.fullmatch(str(value)):
        raise ValueError("takes the name of an environment variable that has it")
    if isinstance(value, str) and (_PASSWORD_IN_URL.search(value) or _has_secret(value)):
        raise ValueError(
            "holds a password, and a profile is no place for one; an option such as password_env "
            "takes the name of the environment variable that has it"
        )


def _has_secret(text: str) -> bool:
    """Whether a URL has a parameter that is a secret by its name."""
    if "://" not in text:
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return False  # whoever connects to it says what is wrong
    given = parse_qsl(f"{parts.query}&{parts.fragment}", keep_blank_values=True)
    return any(_IS.search(name.lower()) for name, value in given if value)
