"""Announces L1 to the workers once it is open, and waits until they have attached it.

Invariants:

* A worker that cannot be reached costs no start: it attaches L1 at its first copy.
* A wait ends when every worker has closed its progress pipe, or after `STALL_S` without progress.
"""

from __future__ import annotations

import logging
import os
import selectors
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Final

from kvcache.connectors.vllm.attach_pipes import Announcement, AttachProgress
from kvcache.connectors.vllm.messages import Rank, Shard
from kvcache.slab import SlabDescriptor

log = logging.getLogger(__name__)

STALL_S: Final = 60.0
"""How long a wait lasts without progress of any worker. An extent takes milliseconds."""

_LOG_EVERY_S: Final = 5.0


def announce(slab: SlabDescriptor, shards: Mapping[Rank, Shard], *, wait: bool = False) -> None:
    """Send the slab's descriptor to all workers, which then attach and pin it.

    Args:
        slab: L1's.
        shards: by rank.
        wait: whether `wait_attached` is called afterwards.
    """
    line = Announcement(slab, wait).to_line()
    for rank, shard in sorted(shards.items()):
        if shard.pipes is None:
            continue
        try:
            fd = shard.pipes.announcement.open(os.O_WRONLY)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)
        except OSError as error:
            log.warning(
                "kvcache: connector: pipeline rank %d, tensor rank %d cannot be reached (%s); "
                "it attaches L1 at its first copy",
                *rank, error,
            )  # fmt: skip


def wait_attached(
    slab: SlabDescriptor, shards: Mapping[Rank, Shard], *, stall_s: float = STALL_S
) -> bool:
    """Wait until the workers have mapped and pinned L1; return whether all have all of it.

    The workers log why they pin no more.
    """
    begun, total = time.monotonic(), slab.slots * slab.slot_nbytes
    ready: dict[Rank, int] = dict.fromkeys(shards, 0)
    with ExitStack() as opened:
        selector = opened.enter_context(selectors.DefaultSelector())
        for rank, shard in shards.items():
            if shard.pipes is not None:
                with suppress(OSError):  # `announce` has logged it
                    fd = shard.pipes.progress.open(os.O_RDONLY)
                    opened.callback(os.close, fd)
                    selector.register(fd, selectors.EVENT_READ, rank)
        logged = progressed = begun
        while selector.get_map():
            for key, _ in selector.select(min(stall_s, _LOG_EVERY_S)):
                progressed = time.monotonic()
                if lines := os.read(key.fd, 1 << 16).splitlines():
                    with suppress(ValueError):  # the worker's user may write anything
                        ready[key.data] = AttachProgress.of(lines[-1]).nbytes
                else:
                    selector.unregister(key.fd)
            now = time.monotonic()
            if now - progressed >= stall_s:
                log.warning(
                    "kvcache: connector: no worker has attached more of L1 for %.0f s; the engine "
                    "starts without it",
                    stall_s,
                )
                break
            if now - logged >= _LOG_EVERY_S:
                logged = now
                log.info(
                    "kvcache: connector: waiting for L1: %.1f of %.1f GiB attached by all %d ranks",
                    min(ready.values()) / 2**30, total / 2**30, len(ready),
                )  # fmt: skip
    complete = sum(nbytes == total for nbytes in ready.values())
    log.info(
        "kvcache: connector: %d of %d ranks have attached all of L1 after %.1f s",
        complete, len(ready), time.monotonic() - begun,
    )  # fmt: skip
    return complete == len(ready)
