"""Check a lower tier that is not a disk: is it reachable, does it keep a block, how fast is it.

Invariant: the block is in a namespace that no engine uses, and the check removes it.
"""

from __future__ import annotations

import inspect
import os
import statistics
from contextlib import closing
from typing import TYPE_CHECKING

from kvcache.cli.doctor.options import CheckOptions
from kvcache.cli.doctor.result import CheckResult, fail, ok, warn
from kvcache.keys import DIGEST_NBYTES, namespace, namespaced_key
from kvcache.secrets import redact

if TYPE_CHECKING:
    from kvcache.profiles.tiers import Row
    from kvcache.tier import Tier

BLOCK_NBYTES = 1 << 20  # of the probe, unless the engine's blocks are smaller
_ROUNDS = 5


def check(row: Row, block_nbytes: int | None, options: CheckOptions) -> CheckResult:
    """Open the tier, store, load and remove one block, and close it.

    ``block_nbytes`` is the size of the engine's blocks, or None if it is not known.
    """
    from kvcache.profiles.tiers import override_of
    from kvcache.tiers.framed import Framed, frame_nbytes

    sizes = {}
    if "block_nbytes" in inspect.signature(row.cls).parameters:
        if block_nbytes is None:
            return warn(
                row.name,
                "not checked: opened with another block size, it could drop its blocks",
                "--block-bytes, as `kvcache plan` prints it",
            )
        sizes = {"block_nbytes": frame_nbytes(block_nbytes)}
    try:
        tier = row.cls(**sizes, **row.options_for(row.cls))
        probe_nbytes = min(BLOCK_NBYTES, block_nbytes or BLOCK_NBYTES)
        with closing(Framed(tier, block_nbytes=probe_nbytes)) as framed:
            return _measure(row, framed, probe_nbytes, options)
    except Exception as error:  # noqa: BLE001 - a tier's class may raise anything
        cause = redact(f"{type(error).__name__}: {error}")
        place = f"{override_of(row.name, '...')}, or {row.where}"
        return fail(
            row.name,
            f"cannot be used: {cause}",
            f"start what it needs, or correct its options: {place}",
        )


def _measure(row: Row, tier: Tier, nbytes: int, options: CheckOptions) -> CheckResult:
    """Measure one block of ``nbytes`` bytes in ``tier``."""
    own_namespace = namespace({"kvcache": "doctor", "nonce": os.urandom(DIGEST_NBYTES).hex()})
    key = namespaced_key(own_namespace, os.urandom(DIGEST_NBYTES))
    block, buffer = os.urandom(nbytes), bytearray(nbytes)
    timed = options.timed
    try:
        _, connect_s = timed(lambda: tier.contains([key]))
        latency_s = statistics.median(
            timed(lambda: tier.contains([key]))[1] for _ in range(_ROUNDS)
        )
        [stored], store_s = timed(lambda: tier.store([key], [memoryview(block)]))
        if not stored:
            return warn(
                row.name,
                "answers, but declined a block",
                f"check whether it is full, has no memory yet, or may only be read; {row.where}",
            )
        loads = [timed(lambda: tier.load([key], [memoryview(buffer)])) for _ in range(_ROUNDS)]
    finally:
        tier.remove([key])
    if any(lengths != [nbytes] for lengths, _ in loads):  # the frame verified the bytes
        return fail(
            row.name,
            "stored a block, but did not return the same bytes",
            f"check whether it keeps blocks unchanged; {row.where}",
        )
    if tier.contains([key]) != [False]:
        return warn(row.name, "works, but keeps removed blocks", f"find the cause; {row.where}")
    load_s = min(seconds for _, seconds in loads)
    return ok(
        row.name,
        f"{latency_s * 1e3:.2g} ms per lookup ({connect_s * 1e3:.2g} ms for the first), "
        f"{nbytes / store_s / 2**30:.2g} GiB/s written, {nbytes / load_s / 2**30:.2g} GiB/s read",
        latency_s=latency_s,
        write_nbytes_per_s=nbytes / store_s,
        read_nbytes_per_s=nbytes / load_s,
    )
