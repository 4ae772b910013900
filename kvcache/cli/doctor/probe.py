"""Any tier but a disk's: is it there, and how fast, tried with one block under a name of its own.

Always true: the block is under a namespace that no engine has, and is removed again.
"""

from __future__ import annotations

import inspect
import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

from kvcache.cli.doctor.result import Result, fail, ok, warn
from kvcache.keys import DIGEST_NBYTES, namespace, namespaced_key
from kvcache.secrets import redact

if TYPE_CHECKING:
    from kvcache.profiles.tiers import Row
    from kvcache.tier import Tier

T = TypeVar("T")

BLOCK_NBYTES = 1 << 20  # of the probe, where blocks are not larger
_ROUNDS = 5


def check(row: Row, block_nbytes: int | None) -> Result:
    """Open the tier, have it keep a block, and close it. `block_nbytes` as the engine has it."""
    from kvcache.profiles.tiers import override_of
    from kvcache.tiers.framed import Framed, frame_nbytes

    given = {}
    if "block_nbytes" in inspect.signature(row.cls).parameters:
        if block_nbytes is None:
            return warn(
                row.name,
                "not tried: made for blocks of one size, it could drop what it has for another",
                "--block-bytes, as `kvcache plan` says",
            )
        given = {"block_nbytes": frame_nbytes(block_nbytes)}
    try:
        tier = row.cls(**given, **row.options_for(row.cls))
        size = min(BLOCK_NBYTES, block_nbytes or BLOCK_NBYTES)
        with closing(Framed(tier, block_nbytes=size)) as framed:
            return _asked(row, framed, size)
    except Exception as error:  # noqa: BLE001 - a tier may raise anything, and that is the finding
        why = redact(f"{type(error).__name__}: {error}")
        its = f"{override_of(row.name, '...')}, or {row.where}"
        return fail(
            row.name,
            f"cannot be used: {why}",
            f"start what it needs, or correct its options: {its}",
        )


def _asked(row: Row, tier: Tier, size: int) -> Result:
    space = namespace({"kvcache": "doctor", "nonce": os.urandom(DIGEST_NBYTES).hex()})
    key, block, read = (
        namespaced_key(space, os.urandom(DIGEST_NBYTES)),
        os.urandom(size),
        bytearray(size),
    )
    try:
        _, connect = _timed(lambda: tier.contains([key]))
        latency = statistics.median(_timed(lambda: tier.contains([key]))[1] for _ in range(_ROUNDS))
        [stored], writing = _timed(lambda: tier.store([key], [memoryview(block)]))
        if not stored:
            return warn(
                row.name,
                "answers, and did not take a block",
                f"see whether it is full; {row.where}",
            )
        loads = [_timed(lambda: tier.load([key], [memoryview(read)])) for _ in range(_ROUNDS)]
    finally:
        tier.remove([key])
    if any(lengths != [size] for lengths, _ in loads):  # the frame vouches for the bytes
        return fail(
            row.name,
            "took a block, and did not give the same one back",
            f"see whether it keeps what it is given; {row.where}",
        )
    if tier.contains([key]) != [False]:
        return warn(row.name, "works, but keeps what was removed", f"see why; {row.where}")
    reading = min(seconds for _, seconds in loads)
    return ok(
        row.name,
        f"{latency * 1e3:.2g} ms to ask ({connect * 1e3:.2g} ms at first), "
        f"{size / writing / 2**30:.2g} GiB/s written, {size / reading / 2**30:.2g} GiB/s read",
        latency_s=latency,
        write_nbytes_per_s=size / writing,
        read_nbytes_per_s=size / reading,
    )


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begun
