"""Secrets and profiles: a profile names where a secret is, and never holds one.

Always true: what may be a secret is not repeated, in no message and no listing. That goes by names,
so it hides more than secrets; what is refused goes by fewer of them.
"""

import re
from collections.abc import Iterable

HIDDEN = "***"

_POINTERS = ("_env", "_file")  # these names say where a secret is

_MAY_BE = re.compile(r"pas+w|pass|pwd|secret|token|credential|auth|api_?key", re.IGNORECASE)
_IS = re.compile(
    r"(^|_)(password|passwd|pass|pwd|secret|token|credentials?|(api|access)_?key)(_|$)"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USUAL_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_PASSWORD_IN_URL = re.compile(r"://[^/@]*:[^/@]*@")
_USER_IN_URL = re.compile(r"(?<=://).*@")


def hidden(name: str, value: object) -> bool:
    """Whether ``value`` of an option or key of this name is not to be repeated.

    What should name a variable is, unless it looks as such names do: it may be the secret itself.
    """
    if name.lower().endswith("_env"):
        return bool(value) and not _USUAL_VARIABLE.fullmatch(str(value))
    may_be = _MAY_BE.search(name) and not name.lower().endswith(_POINTERS)
    return bool(may_be) and not isinstance(value, bool)


def without(value: object) -> object:
    """``value`` with what is hidden in its tables taken out."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if hidden(name, inner) else without(inner) for name, inner in value.items()
        }
    return [without(inner) for inner in value] if isinstance(value, list) else value


def without_user(text: str) -> str:
    """``text`` with user and password taken out of a URL in it."""
    return _USER_IN_URL.sub(f"{HIDDEN}@", text)


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
    if isinstance(value, str) and _PASSWORD_IN_URL.search(value):
        raise ValueError(
            "holds a password, and a profile is no place for one; an option such as password_env "
            "takes the name of the environment variable that has it"
        )
