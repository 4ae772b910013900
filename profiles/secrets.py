"""Keeps secrets out of profiles: a profile names the variable that has a secret, never the secret.

The names refused here are fewer than the names that ``kvcache.secrets`` hides.
"""

import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlsplit

_POINTERS = ("_env", "_file")  # suffixes of options that name the place of a secret

_SECRET_NAME = re.compile(
    r"(^|_)(password|passwd|passphrase|pass|pwd|pw|secret|token|credentials?|(api|access)_?key)(_|$)"
)
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PASSWORD_IN_URL = re.compile(r"://[^/@]*:[^/@]*@")


def refuse_secret_options(cls: type, names: Iterable[str]) -> None:
    """Raise ValueError if one of ``names``, options of ``cls`` of type str, is that of a secret."""
    for name in names:
        if _SECRET_NAME.search(name) and not name.endswith(_POINTERS):
            raise ValueError(
                f"{cls.__qualname__} takes {name}, but a profile must not hold a secret: replace "
                f"it with {name}_env, the name of an environment variable"
            )


def refuse_secret_value(name: str, value: object) -> None:
    """Raise ValueError if ``value`` of the option ``name`` holds a secret.

    A secret is a URL with a password, or a value of a ``*_env`` option that cannot be the name of a
    variable.
    """
    if name.endswith("_env") and value and not _VARIABLE_NAME.fullmatch(str(value)):
        raise ValueError("takes the name of the environment variable that has the secret")
    if isinstance(value, str) and (_PASSWORD_IN_URL.search(value) or _has_secret(value)):
        raise ValueError(
            "holds a password, but a profile must not hold one; an option such as password_env "
            "takes the name of the environment variable that has it"
        )


def _has_secret(text: str) -> bool:
    """Whether ``text`` is a URL with a parameter that is a secret, by its name."""
    if "://" not in text:
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return False  # the tier that connects to it reports the error
    given = parse_qsl(f"{parts.query}&{parts.fragment}", keep_blank_values=True)
    return any(_SECRET_NAME.search(name.lower()) for name, value in given if value)
