"""Removes secrets from text before a person reads it: in messages, listings, logs and spans.

Two rules decide what is a secret. A value is one when its name says so (``password``, ``pw``,
``token``, ``auth_key``, ...): an option, a key in a table, a variable, a parameter of a URL. In a
URL, what stands before the ``@`` is one too.

Always true: these rules hide more than secrets, and never less than the names promise.

How to use it:

* ``hide(name, value)`` for a value that has a name.
* ``redact(text, password)`` for text that something else wrote: a server's error, an exception of a
  third-party class. It removes URLs' secrets, ``name=value`` pairs and each string given beside it,
  and makes the text one line of printable characters, so a server cannot write to a terminal or
  forge a log line::

      raise LoginError(redact(str(error), self.password)) from None
"""

import re
from collections.abc import Mapping
from itertools import takewhile
from urllib.parse import quote, quote_plus, unquote_plus

HIDDEN = "***"
MAX_CHARS = 500
"""Characters that ``redact`` keeps of a text."""

_START = 8
"""Characters of a longer secret that give it away."""

_POINTERS = ("_env", "_file")  # these names say where a secret is
_PART = r"pas+w|pass|pwd|secret|token|credential|auth|jwt|signature"
_WORD = r"(?:^|[^a-z])(?:pw|psw|sig|sas|pin)(?:$|[^a-z])|(?:pw|keys?)$"
_MAY_BE = re.compile(f"{_PART}|{_WORD}", re.IGNORECASE)
_COUNTED = re.compile(
    r"(?:per|block|prefix|prefill|prompt|system|document|input|output|max|min)[-_]tokens?",
    re.IGNORECASE,
)
"""Names of the other kind of token, of which a model's input is made."""
_USUAL_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")

_PARAMETER = re.compile(r"[?&;#]([^=?&;#\s]+)=")
_URL_IN_TEXT = re.compile(r"(?<![\w+.-])[\w+.-]+://[^\s\"'<>]+")
_NAME_IN_TEXT = re.compile(r"""(?<![\w.-])(?:([\w.-]+)["']?\s?[=:]\s?|(--?[\w-]+)\s+)""")
_VALUE_IN_TEXT = re.compile(
    r"""("[^"]*"|'[^']*'|(?:basic|bearer)\s+\S+|[^\s,;&"')\]}]+)""", re.IGNORECASE
)
_NO_VALUE = ("error", "exception", "warning")  # what follows such a name is a sentence


def may_be_secret(name: str) -> bool:
    """Whether a value of this name is a secret, as far as a name can tell."""
    name = _COUNTED.sub("", name)
    return bool(_MAY_BE.search(name)) and not name.lower().endswith(_POINTERS)


def must_hide(name: str, value: object) -> bool:
    """Whether ``value`` of an option or key of this name must not be repeated.

    A name that ends in ``_env`` takes the name of a variable. Its value is shown only if it looks
    like one, because it may be the secret itself, in the wrong place.
    """
    if name.lower().endswith("_env"):
        return bool(value) and not _USUAL_VARIABLE.fullmatch(str(value))
    return may_be_secret(name) and not isinstance(value, bool)


def hide(name: str, value: object) -> object:
    """``value`` of an option or key of this name, less the secrets in it."""
    return HIDDEN if must_hide(name, value) else hide_nested(value)


def hide_nested(value: object) -> object:
    """``value``, less the secrets in it: in tables by their keys, in strings that are URLs.

    Tables and lists may be nested as deeply as a reader of profiles lets them be.
    """
    if isinstance(value, Mapping):
        return {name: hide(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_nested(inner) for inner in value]
    return hide_in_url(value) if isinstance(value, str) else value


def hide_in_url(text: str) -> str:
    """``text`` that is a URL, less user and password and whatever follows a secret parameter.

    A string without ``://`` comes back as it is.
    """
    if "://" not in text:
        return text
    begin, end = text.index("://") + 3, text.rfind("@")
    if end >= begin:
        text = f"{text[:begin]}{HIDDEN}{text[end:]}"
    for parameter in _PARAMETER.finditer(text):
        if may_be_secret(unquote_plus(parameter[1])):
            # A secret may hold an "&", so all that follows goes too.
            return f"{text[: parameter.end()]}{HIDDEN}"
    return text


def redact(text: str, *known: str) -> str:
    """``text`` from outside, fit to be shown: one printable line, less its secrets.

    Args:
        text: what a server or a third-party class said.
        known: secrets that it may repeat, such as the password it was given; also removed where
            they are quoted for a URL or for Python, or cut off after eight characters or more.

    Returns:
        At most ``MAX_CHARS`` characters. Control characters are written as escapes.
    """
    for secret in sorted(filter(None, known), key=len, reverse=True):
        for form in (secret, repr(secret)[1:-1], quote(secret, safe=""), quote_plus(secret)):
            text = _without_starts(text, form)
    text = _URL_IN_TEXT.sub(lambda match: hide_in_url(match[0]), text)
    line = escape_unprintable(_without_pairs(text))
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 3]}..."


def _without_starts(text: str, secret: str) -> str:
    """``text``, less ``secret`` and what begins as it does: a server may cut what it repeats."""
    start, more = secret[:_START], secret[_START:]
    first, *rest = text.split(start)
    kept = [first]
    for part in rest:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(part, more, strict=False))
        kept.append(part[sum(1 for _ in same) :])
    return HIDDEN.join(kept)


def escape_unprintable(text: str) -> str:
    """``text`` in one line: control characters, line breaks too, are written as escapes."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _without_pairs(text: str) -> str:
    """``text``, less the value behind each ``name=`` and ``name:`` that is a secret's."""
    kept, at = [], 0
    for name in _NAME_IN_TEXT.finditer(text):
        called = name[1] or name[2]
        if name.start() < at or called.lower().endswith(_NO_VALUE) or not must_hide(called, "a"):
            continue
        value = _VALUE_IN_TEXT.match(text, name.end())
        if value is not None and must_hide(called, value[0].strip("\"'")):
            kept += [text[at : name.end()], HIDDEN]
            at = value.end()
    return "".join([*kept, text[at:]])
