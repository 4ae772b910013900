"""Mooncake's library: the import with its settings, and the result codes of its methods.

Invariants:

* The library reads its settings from environment variables, at any time and in threads of its own.
  A variable is therefore set before the library is imported, and never changed afterwards: the
  first tier of a process sets them. A variable that the user set stays.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from importlib.util import find_spec
from typing import Any, Final

if find_spec("mooncake") is None:  # an import would read the settings too early
    raise ModuleNotFoundError("no module named mooncake")

log = logging.getLogger(__name__)

NO_ROOM: Final = -200
INVALID: Final = -600
ABSENT: Final = -704
EXISTS: Final = -705
LEASED: Final = -706
LEASE_ENDED: Final = -707
TRANSFER_FAILED: Final = -800
WRONG_CHECKSUM: Final = -801

RPC_FAILED: Final = frozenset({-900, -901})
"""Codes of a master or a daemon that does not answer."""

UNANSWERED: Final = frozenset({-1, TRANSFER_FAILED, *RPC_FAILED})
"""Codes of a master or a holder that does not answer."""

_TEXTS: Final = {
    -1: "an internal error of Mooncake",
    NO_ROOM: "the pool has no free memory",
    INVALID: "Mooncake refuses the arguments",
    LEASE_ENDED: "the lease of the block ended before its transfer",
    TRANSFER_FAILED: "the transfer failed",
    WRONG_CHECKSUM: "Mooncake's checksum does not match",
    -900: "the connection failed",
    -901: "no answer in time",
    -1700: "the quota of the tenant is used up",
}

_DECLINE_REASONS: Final = {
    NO_ROOM: "no room",
    LEASED: "leased",
    -1700: "quota",
    **dict.fromkeys(UNANSWERED, "no answer"),
}

_lock = threading.Lock()


def describe_code(code: int) -> str:
    """Return a result code with its meaning."""
    return f"{code}: {_TEXTS[code]}" if code in _TEXTS else f"{code}"


def decline_reason(code: int) -> str:
    """Return a short name of a result code, for a count of blocks that were not stored."""
    return _DECLINE_REASONS.get(code, str(code))


def load_library(timeout_s: float) -> Any:
    """Return Mooncake's class of clients.

    Args:
        timeout_s: after how long a call of the master ends.

    Raises:
        ImportError: the package or a shared library that it needs is missing.
    """
    milliseconds = str(math.ceil(timeout_s * 1000))
    settings = {
        "MC_RPC_TIMEOUT_MS": milliseconds,
        "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
        "MC_TCP_STATUS_TIMEOUT_SEC": str(math.ceil(timeout_s)),
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",  # the tier tries again, without holding the GIL
        "MC_LOG_LEVEL": "ERROR",  # otherwise it writes many lines about each client
    }
    with _lock:
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        kept = os.environ["MC_RPC_TIMEOUT_MS"]
        if kept != milliseconds:
            log.warning(
                "kvcache: mooncake: timeout_s has no effect (MC_RPC_TIMEOUT_MS is %s already); "
                "calls of the master end after that many milliseconds",
                kept,
            )
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            if "libcu" in str(error) and "libcurl" not in str(error):
                raise ImportError(
                    "this build of mooncake needs CUDA; without it: pip uninstall "
                    "mooncake-transfer-engine, pip install mooncake-transfer-engine-non-cuda "
                    f"({error})"
                ) from error
            raise ImportError(
                "mooncake lacks a library of the system; apt-get install libibverbs1 libnuma1 "
                f"libcurl4 ({error})"
            ) from error
    return MooncakeDistributedStore
