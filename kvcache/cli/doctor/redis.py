"""Check what a Redis server does when its memory is full: evict, or decline new blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcache.cli.doctor.result import CheckResult, ok, warn
from kvcache.cli.redis_server import connected
from kvcache.sizes import format_size

if TYPE_CHECKING:
    from kvcache.profiles.tiers import Row

_FIX = "maxmemory SIZE and maxmemory-policy allkeys-lru in the server's configuration"


def check(row: Row) -> Iterator[CheckResult]:
    """Yield one result for a single server that reports its memory, else none.

    The probe reports a server that cannot be reached.
    """
    try:
        with connected(row.options) as servers:
            memory = servers.memory()
    except ValueError:
        return
    if memory is None:
        return
    used, limit = format_size(memory.used_nbytes), format_size(memory.limit_nbytes)
    if not memory.limit_nbytes:
        yield warn(row.name, f"uses {used} and has no maxmemory, so it grows without limit", _FIX)
    elif memory.when_full == "noeviction":
        yield warn(row.name, f"uses {used} of {limit}; when full it declines new blocks", _FIX)
    elif memory.when_full.startswith("volatile") and not row.options.get("ttl_s"):
        what = f"uses {used} of {limit}; {memory.when_full} evicts nothing without ttl_s"
        yield warn(row.name, what, f"ttl_s in the profile, or {_FIX}")
    else:
        yield ok(row.name, f"uses {used} of {limit}; when full it evicts ({memory.when_full})")
