"""What a caller says of the future of a conversation, with a request::

    "kv_transfer_params": {"kvcache": {"done": true}}

``done``: it will not be continued. ``keep``: seconds for which its blocks should stay. ``soon``:
its next turn comes soon.

Always true here: what is not understood is said once in the log, and is no error of the request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

LONGEST_KEEP_S: Final = 3600.0

_told: set[str] = set()


def hints_of(request: Request) -> dict[str, Any]:
    """The keyword arguments of ``Stack.hint`` that this request asks for; empty for none."""
    given = (request.kv_transfer_params or {}).get("kvcache")
    if given is None:
        return {}
    try:
        return _read(given)
    except ValueError as error:
        if str(error) not in _told and len(_told) < 100:  # it is the callers who choose the words
            _told.add(str(error))
            log.warning("kvcache: kv_transfer_params.kvcache is not understood: %s", error)
        return {}


def _read(given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"it is a {type(given).__name__}; write an object")
    hints: dict[str, Any] = {}
    for name, value in given.items():
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
                raise ValueError("there are done, keep and soon, and no others")
    if hints.get("done") and (hints.get("keep") or hints.get("soon")):
        raise ValueError("done goes with neither keep nor soon")
    return hints
