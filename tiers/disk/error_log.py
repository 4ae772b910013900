"""What a disk tier logs about its calls.

* An error of the disk is suppressed, and logged at most once per minute for each kind.
* Declined blocks are counted by reason, and each reason is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvcache.reasons import ReasonCounter
from kvcache.tiers.disk.record_file import KEY_NBYTES

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 60.0  # of errors of the same kind


class DiskErrorLog:
    """Suppresses the errors of one tier's disk.

    Args:
        path: the tier's directory.
        block_nbytes: the bytes of the largest block that the tier takes.
        clock: the current time in seconds.

    Attributes:
        declined: the blocks that the tier declined, by reason.
    """

    def __init__(self, path: Path, block_nbytes: int, clock: Callable[[], float]) -> None:
        self.declined = ReasonCounter()
        self._path = path
        self._block_nbytes = block_nbytes
        self._clock = clock
        self._log_after: dict[tuple[str, int | None], float] = {}  # by verb and error code

    def count_declined(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[memoryview],
        stored: Sequence[bool],
        failed: Collection[bytes],
    ) -> None:
        """Count the blocks of one store that the tier does not hold, and log each new reason.

        Args:
            keys: of the store.
            blocks: of the store.
            stored: whether the tier holds each block now.
            failed: keys of blocks that an error of the disk kept out.
        """
        for key, block, is_stored in zip(keys, blocks, stored, strict=True):
            if is_stored:
                continue
            if len(key) > KEY_NBYTES:
                if self.declined.add("key too long"):
                    log.warning(
                        "kvcache: disk tier at %s: a key has %d bytes (a record holds %d); blocks "
                        "with longer keys are declined", self._path, len(key), KEY_NBYTES,
                    )  # fmt: skip
            elif len(block) > self._block_nbytes:
                if self.declined.add("block too large"):
                    log.warning(
                        "kvcache: disk tier at %s: a block has %d bytes (a slot holds %d); larger "
                        "blocks are declined", self._path, len(block), self._block_nbytes,
                    )  # fmt: skip
            elif not (key and block):
                if self.declined.add("empty"):
                    log.warning(
                        "kvcache: disk tier at %s: a key or a block is empty; such blocks are "
                        "declined", self._path,
                    )  # fmt: skip
            elif key in failed:
                self.declined.add("error")  # which ``suppress`` has logged
            elif self.declined.add("no slot"):
                log.info(
                    "kvcache: disk tier at %s: a block got no slot (all are in use, or the "
                    "eviction policy does not admit it); such blocks are declined", self._path,
                )  # fmt: skip

    @contextmanager
    def suppress(self, verb: str) -> Iterator[None]:
        """Log an error of the disk and suppress it; its blocks are declined or missed."""
        try:
            yield
        except OSError as error:
            now, kind = self._clock(), (verb, error.errno)
            if now >= self._log_after.get(kind, now):
                self._log_after[kind] = now + _LOG_INTERVAL_S
                log.warning(
                    "kvcache: disk tier at %s: %s failed (%s); its blocks are declined or missed",
                    self._path,
                    verb,
                    error,
                )
