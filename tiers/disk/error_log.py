"""What a disk tier logs about its calls.

* An error of the disk is suppressed, and logged at most once per minute for each kind.
* Blocks that no slot or record can hold are declined; the first one of each kind is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvcache.tiers.disk.record_file import KEY_NBYTES

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 60.0  # of errors of the same kind


class DiskErrorLog:
    """Suppresses the errors of one tier's disk.

    Args:
        path: the tier's directory.
        clock: the current time in seconds.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._log_after: dict[tuple[str, int | None], float] = {}  # by verb and error code
        self._key_logged = self._block_logged = False

    def log_declined(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], block_nbytes: int
    ) -> None:
        """Log the first key and the first block that are too large for the tier.

        Args:
            keys: of one store.
            blocks: of one store.
            block_nbytes: the bytes of the largest block that the tier takes.
        """
        longest, largest = max(map(len, keys)), max(map(len, blocks))
        if longest > KEY_NBYTES and not self._key_logged:
            self._key_logged = True
            log.warning(
                "kvcache: disk tier at %s: a key has %d bytes (a record holds %d); blocks with "
                "longer keys are declined",
                self._path,
                longest,
                KEY_NBYTES,
            )
        if largest > block_nbytes and not self._block_logged:
            self._block_logged = True
            log.warning(
                "kvcache: disk tier at %s: a block has %d bytes (a slot holds %d); larger blocks "
                "are declined",
                self._path,
                largest,
                block_nbytes,
            )

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
