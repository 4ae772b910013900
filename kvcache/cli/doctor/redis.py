"""What a Redis server does when it is full: whether it will go on taking blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcache.cli.doctor.result import Result, ok, warn
from kvcache.cli.redis_server import connected
from kvcache.sizes import format_size

if TYPE_CHECKING:
    from kvcache.profiles.tiers import Row

_FIX = "maxmemory SIZE and maxmemory-policy allkeys-lru in the server's configuration"


def check(row: Row) -> Iterator[Result]:
    """One result, where there is one server and it tells. What cannot be asked is the probe's."""
    try:
        with connected(row.options) as servers:
            memory = servers.memory()
    except ValueError:
        return
    if memory is None:
        return
    used, limit = format_size(memory.used_nbytes), format_size(memory.limit_nbytes)
    if not memory.limit_nbytes:
        yield warn(row.name, f"has {used} and no maxmemory: it grows for as long as it can", _FIX)
    elif memory.when_full == "noeviction":
        yield warn(row.name, f"has {used} of {limit}; when full it declines new blocks", _FIX)
    elif memory.when_full.startswith("volatile") and not row.options.get("ttl_s"):
        why = f"has {used} of {limit}; {memory.when_full} lets nothing leave without ttl_s"
        yield warn(row.name, why, f"ttl_s in the profile, or {_FIX}")
    else:
        yield ok(row.name, f"has {used} of {limit}; {memory.when_full} makes room when it is full")
