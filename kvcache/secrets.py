"""Removes secrets from text before a person reads it: in messages, listings, logs and spans.

Two rules define a secret. A value is a secret if its name says so (``password``, ``pw``, ``token``,
``auth_key``, ...): the name of an option, a key in a table, a variable, or a parameter of a URL. In
a URL, everything before the ``@`` is a secret too.

Invariants: these rules hide every value with such a name; they may also hide values that are no
secrets.

How to use it:

* ``hide(name, value)`` for a value that has a name.
* ``redact(text, password)`` for text from outside: a server's error, an exception of a third-party
  class. It removes secrets in URLs, ``name=value`` pairs and each string given as argument, and
  makes the text one line of printable characters, so that a server can neither write to a terminal
  nor forge a log line::

      raise LoginError(redact(str(error), self.password)) from None

* ``read_secret(variable, option)`` for an option that names the variable of a secret.
"""

import os
import re
from collections.abc import Mapping
from itertools import takewhile
from urllib.parse import quote, quote_plus, unquote_plus

HIDDEN = "***"
MAX_CHARS = 500
"""The most characters that ``redact`` returns."""

_START = 8
"""A secret that is cut off after at least this many characters is hidden too."""

_POINTERS = ("_env", "_file")  # the value of such a name is the place of a secret, not a secret
_PART = r"pas+w|pass|pwd|secret|token|credential|auth|jwt|signature"
_WORD = r"(?:^|[^a-z])(?:pw|psw|sig|sas|pin)(?:$|[^a-z])|(?:pw|keys?)$"
_MAY_BE = re.compile(f"{_PART}|{_WORD}", re.IGNORECASE)
_COUNTED = re.compile(
    r"(?:per|block|prefix|prefill|prompt|system|document|input|output|max|min)[-_]tokens?",
    re.IGNORECASE,
)
"""Names that count the tokens of a model's input."""
_USUAL_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")

_PARAMETER = re.compile(r"[?&;#]([^=?&;#\s]+)=")
_URL_IN_TEXT = re.compile(r"(?<![\w+.-])[\w+.-]+://[^\s\"'<>]+")
_NAME_IN_TEXT = re.compile(r"""(?<![\w.-])(?:([\w.-]+)["']?\s?[=:]\s?|(--?[\w-]+)\s+)""")
_VALUE_IN_TEXT = re.compile(
    r"""("[^"]*"|'[^']*'|(?:basic|bearer)\s+\S+|[^\s,;&"')\]}]+)""", re.IGNORECASE
)
_NO_VALUE = ("error", "exception", "warning")  # these names are followed by a sentence


_VARIABLE_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


def with_value(option: str, value: str) -> str:
    """Return the beginning of a message: the option, and its value if that can have no secret.

    A user, a password and parameters come with one of the characters ``@ ? #``.
    """
    return option if set("@?#") & set(value) else f"{option} is {value!r}, which"


def read_secret(variable: str, option: str) -> str:
    """Return the secret in the environment variable ``variable``; "" for no variable.

    Raises:
        ValueError: the variable is not set or empty. The message contains its name only if that
            looks like the name of a variable; otherwise it may be a secret.
    """
    if not variable:
        return ""
    secret = os.environ.get(variable, "")
    if not secret:
        shown = f"{variable!r}" if _VARIABLE_NAME.fullmatch(variable) else "a name"
        raise ValueError(
            f"{option} is {shown}, and this environment variable is not set, or empty; "
            "it takes the name of the variable that has the secret"
        )
    return secret


def may_be_secret(name: str) -> bool:
    """Whether a value of this name is a secret, judged by the name alone."""
    name = _COUNTED.sub("", name)
    return bool(_MAY_BE.search(name)) and not name.lower().endswith(_POINTERS)


def must_hide(name: str, value: object) -> bool:
    """Whether the value of an option or key must not be shown.

    An option that ends in ``_env`` takes the name of a variable. A value that does not look like
    one is hidden: a user may have written the secret there by mistake.
    """
    if name.lower().endswith("_env"):
        return bool(value) and not _USUAL_VARIABLE.fullmatch(str(value))
    return may_be_secret(name) and not isinstance(value, bool)


def hide(name: str, value: object) -> object:
    """Return the value of an option or key without the secrets in it."""
    return HIDDEN if must_hide(name, value) else hide_nested(value)


def hide_nested(value: object) -> object:
    """Return ``value`` without secrets: in tables, values are judged by their keys; URLs are cut.

    The recursion is bounded by the depth that readers of profiles allow (``inputs.DEPTH``).
    """
    if isinstance(value, Mapping):
        return {name: hide(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_nested(inner) for inner in value]
    return hide_in_url(value) if isinstance(value, str) else value


def hide_in_url(text: str) -> str:
    """Return a URL without user, password and everything after the name of a secret parameter.

    A string without ``://`` is returned unchanged.
    """
    if "://" not in text:
        return text
    begin, end = text.index("://") + 3, text.rfind("@")
    if end >= begin:
        text = f"{text[:begin]}{HIDDEN}{text[end:]}"
    for parameter in _PARAMETER.finditer(text):
        if may_be_secret(unquote_plus(parameter[1])):
            # A secret may contain an "&", so everything after it is hidden too.
            return f"{text[: parameter.end()]}{HIDDEN}"
    return text


def redact(text: str, *known: str) -> str:
    """Make text from outside fit to show: one printable line without secrets.

    Args:
        text: the text of a server or a third-party class.
        known: secrets that it may contain, such as the password that the server got. They are also
            removed when quoted for a URL or Python, and when cut off after 8 or more characters.

    Returns:
        at most ``MAX_CHARS`` characters, with control characters as escapes.
    """
    for secret in sorted(filter(None, known), key=len, reverse=True):
        for quoted in (secret, repr(secret)[1:-1], quote(secret, safe=""), quote_plus(secret)):
            text = _hide_beginnings(text, quoted)
    text = _URL_IN_TEXT.sub(lambda match: hide_in_url(match[0]), text)
    line = escape_unprintable(_hide_pairs(text))
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 3]}..."


def _hide_beginnings(text: str, secret: str) -> str:
    """Return ``text`` without ``secret``, also where it is cut off."""
    start, rest_of_secret = secret[:_START], secret[_START:]
    before, *parts = text.split(start)
    kept = [before]
    for part in parts:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(part, rest_of_secret, strict=False))
        kept.append(part[sum(1 for _ in same) :])
    return HIDDEN.join(kept)


def escape_unprintable(text: str) -> str:
    """Return ``text`` with control characters and line breaks as escapes."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _hide_pairs(text: str) -> str:
    """Return ``text`` without the value after each ``name=`` and ``name:`` of a secret."""
    kept, done = [], 0
    for name in _NAME_IN_TEXT.finditer(text):
        label = name[1] or name[2]
        if name.start() < done or label.lower().endswith(_NO_VALUE) or not must_hide(label, "a"):
            continue
        value = _VALUE_IN_TEXT.match(text, name.end())
        if value is not None and must_hide(label, value[0].strip("\"'")):
            kept += [text[done : name.end()], HIDDEN]
            done = value.end()
    return "".join([*kept, text[done:]])
