"""Hints: a caller's advice about the future of a conversation, sent with a request::

    "kv_transfer_params": {"kvcache": {"done": true}}

``done``: the conversation ends. ``keep``: seconds for which its blocks should stay in L1. ``soon``:
its next turn comes soon.

An invalid hint is logged once and ignored. It does not fail the request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

LONGEST_KEEP_S: Final = 3600.0

MOST_LOGGED: Final = 100  # callers choose the words of a hint, and so of the reason


class HintReader:
    """Reads the hints of an engine's requests, and logs each kind of invalid hint once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def read(self, request: Request) -> dict[str, Any]:
        """Return the keyword arguments of ``Stack.hint`` that a request asks for."""
        hint = (request.kv_transfer_params or {}).get("kvcache")
        if hint is None:
            return {}
        try:
            return _parse(hint)
        except ValueError as error:
            self._log(str(error))
            return {}

    def _log(self, reason: str) -> None:
        if reason not in self._logged and len(self._logged) < MOST_LOGGED:
            self._logged.add(reason)
            log.warning("kvcache: hints: invalid kv_transfer_params.kvcache (%s); ignored", reason)


def _parse(hint: object) -> dict[str, Any]:
    if not isinstance(hint, dict):
        raise ValueError(f"it is a {type(hint).__name__}, not an object")
    hints: dict[str, Any] = {}
    for name, value in hint.items():
        match name:
            case "done" | "soon" if isinstance(value, bool):
                hints[name] = value
            case "keep" if type(value) in (int, float) and 0 <= value <= LONGEST_KEEP_S:
                hints[name] = float(value)
            case "done" | "soon":
                raise ValueError(f"{name} takes true or false")
            case "keep":
                raise ValueError(f"keep takes seconds, {LONGEST_KEEP_S:.0f} at most")
            case _:
                raise ValueError("the hints are done, keep and soon")
    if hints.get("done") and (hints.get("keep") or hints.get("soon")):
        raise ValueError("done excludes keep and soon")
    return hints
