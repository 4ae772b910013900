"""Check the clock of an object store, and whether a rule deletes old blocks.

The core of an object tier evicts nothing: a lifecycle rule of the bucket does. The rule itself
cannot be read with the rights of an engine, but old blocks show that there is none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from kvcache.cli.doctor.result import CheckResult, ok, warn
from kvcache.cli.object_store import open_store

if TYPE_CHECKING:
    from kvcache.profiles.tiers import Row

OLD_DAYS = 30
"""The age in days from which a block shows that no rule deletes blocks."""
MAX_SKEW_S = 60.0
"""The difference of clocks from which the check warns; S3 rejects requests from 900 s on."""
_SAMPLE = 1000  # one page of a list
_DAY_S = 86400.0


def check(row: Row, now: Callable[[], float] = time.time) -> Iterator[CheckResult]:
    """Yield a result for the clock if it is wrong, and one for the age of the blocks.

    The probe reports a store that cannot be reached or rejects the credentials: then none.
    """
    name = f"kvcache/1/doctor/{os.urandom(16).hex()}"
    try:
        store = open_store(row.options)
        before = now()
        written = store.write(name, b"kvcache doctor")
        skew_s = written.modified.timestamp() - (before + now()) / 2
        store.delete(name)
    except (ValueError, FileNotFoundError):
        return
    if abs(skew_s) > MAX_SKEW_S:
        side = "behind" if skew_s > 0 else "ahead of"
        yield warn(
            row.name,
            f"this machine's clock is {abs(skew_s):.0f} s {side} the store's; S3 rejects requests "
            "from 900 s on",
            "synchronise the clock of this machine",
            skew_s=skew_s,
        )
    try:
        sample = list(islice(store.list("kvcache/1/block"), _SAMPLE))
    except ValueError as error:
        yield warn(
            row.name,
            f"its objects cannot be listed ({error})",
            "the right to list the bucket, for `kvcache inspect` and this check",
        )
        return
    if not sample:
        yield ok(row.name, "holds no blocks")
        return
    oldest = min(each.modified for each in sample)
    days = (written.modified - oldest).total_seconds() / _DAY_S
    what = f"the oldest of the first {len(sample):,} blocks was written {days:.1f} days ago"
    if days > OLD_DAYS:
        yield warn(
            row.name,
            f"{what}: no lifecycle rule seems to delete blocks",
            "a lifecycle rule of the bucket for kvcache/1/block/ below the prefix, "
            "see docs/object-stores.md",
            oldest_days=days,
        )
    else:
        yield ok(row.name, what, oldest_days=days)
