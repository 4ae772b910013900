"""Errors of a tier's disk: suppressed, and logged at most once per minute for each kind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
