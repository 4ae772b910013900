"""Text from a server, made safe to print.

Always true: every word of a server that reaches an exception, a log line or a span has passed
:func:`readable`. It has no control character, repeats no secret, and is short.
"""

from __future__ import annotations

from collections.abc import Iterable

HIDDEN = "***"

_LONGEST = 240  # characters: an error of Redis with the arguments that it quotes
_PREFIX = 8  # characters of a longer secret that give it away: Redis cuts the arguments it quotes


def readable(said: bytes | str, secrets: Iterable[str] = ()) -> str:
    """``said`` without control characters and without ``secrets``, cut to a line's length."""
    text = _printable(said.decode(errors="surrogateescape") if isinstance(said, bytes) else said)
    for secret in sorted(map(_printable, secrets), key=len, reverse=True):
        text = _without(text, secret)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _printable(text: str) -> str:
    """``text`` without what a terminal obeys and what hides text: both sides of a match lose it."""
    return "".join(filter(str.isprintable, text))


def _without(text: str, secret: str) -> str:
    """``text`` with each occurrence of ``secret``, or of a beginning of it, hidden."""
    start = secret[:_PREFIX]
    if not start:
        return text
    first, *rest = text.split(start)
    shown = [first]
    for part in rest:
        same = 0
        while same < min(len(part), len(secret) - len(start)):
            if part[same] != secret[len(start) + same]:
                break
            same += 1
        shown.append(part[same:])
    return HIDDEN.join(shown)
