"""Records the requests of a live engine to a file that ``kvcache replay`` reads.

With ``KVCACHE_RECORD=file``, every stack appends a line per request, in the format of
``kvcache.replay.trace``. Several engines may append to one file.

Invariants:

* The file holds times, lengths, and a short hash of each key. No prompt can be read from it, and no
  key that a tier would accept.
* To record a request only puts a tuple into a queue. If the file or the disk is full, or too many
  lines wait, the line is left out. The first such line is logged; a request never fails.
* The file ends with a whole line, and is never larger than its limit.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from kvcache import inputs
from kvcache.guards.calls import TierError, result_of
from kvcache.process import bind_to_process
from kvcache.sizes import format_size, parse_size

VARIABLE: Final = "KVCACHE_RECORD"
LIMIT_VARIABLE: Final = "KVCACHE_RECORD_LIMIT"
LIMIT: Final = "256MiB"
QUEUE_REQUESTS: Final = 1024
"""Requests that may wait to be written; later ones are left out."""
CLOSE_S: Final = 5.0
"""How long ``close`` waits for the queue to be written: an engine must end even if a disk hangs."""
_YIELD_BLOCKS: Final = 64  # the writer yields to request threads after this many blocks, ~0.1 ms
_HASH_NBYTES: Final = 6  # JSON readers take 48-bit integers, and 10 million blocks hardly collide

log = logging.getLogger(__name__)


class Recorder:
    """Receives every request of a stack. This class ignores them."""

    def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
        """Record a request.

        Args:
            keys: its chain, from the first block, without a partial last block: one key per block.
                A model with several groups records its first group, normally full attention.
            tokens: tokens of its prompt; ``None`` if unknown: the tokens of the full blocks count.
        """

    def close(self) -> None:
        """Write the requests that wait. May be called twice."""


NULL_RECORDER: Final = Recorder()
"""A recorder that ignores all requests."""


class GuardedRecorder(Recorder):
    """Wraps a user's recorder: its first exception is logged and ends the recording."""

    def __init__(self, inner: Recorder) -> None:
        self._inner = inner
        self._failed = False

    def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
        if not self._failed:
            self._call(partial(self._inner.record, keys, tokens))

    def close(self) -> None:
        self._call(self._inner.close)

    def _call(self, call: Callable[[], None]) -> None:
        try:
            result_of(call)
        except TierError as error:
            self._failed, kind = True, type(self._inner).__name__
            log.warning("kvcache: recorder %s: failed (%s); it records no more", kind, error)


def guard_recorder(recorder: Recorder) -> Recorder:
    """Return ``recorder``, wrapped in :class:`GuardedRecorder` if it is not of this package."""
    return recorder if type(recorder) in (Recorder, FileRecorder) else GuardedRecorder(recorder)


class FileRecorder(Recorder):
    """Appends a line per request to a file, in a thread of its own.

    Args:
        path: the file; it is made if it does not exist.
        block_tokens: tokens of a block; 0 if unknown: a block counts as one token.
        limit: size in bytes at which the recording ends.
        queue_requests: requests that may wait to be written.

    Raises:
        OSError: if the file cannot be opened for appending, or is not a regular file.
    """

    def __init__(
        self, path: Path, *, block_tokens: int, limit: int, queue_requests: int = QUEUE_REQUESTS
    ) -> None:
        self._path = path
        self._block_tokens = block_tokens or 1
        self._limit = limit
        self._queue_requests = queue_requests
        self._file = FileIO(path, "a", opener=_open_private)
        # A monotonic clock never goes back; from the wall clock at the start it continues the times
        # of an earlier engine in the same file.
        self._zero_ns = time.time_ns() - time.monotonic_ns()
        self._queue: SimpleQueue[tuple[int, int, tuple[bytes, ...]] | None] = SimpleQueue()
        self._skipped = 0  # requests left out because the queue was full
        self._stopped = False  # no further line is written
        self._thread = threading.Thread(target=self._write_all, name="kvcache-record", daemon=True)
        self._thread.start()
        bind_to_process(self)

    def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
        if self._stopped:
            return
        if self._queue.qsize() >= self._queue_requests:
            self._skipped += 1
            return
        at_ms = (self._zero_ns + time.monotonic_ns()) // 1_000_000
        length = len(keys) * self._block_tokens if tokens is None else tokens
        self._queue.put((at_ms, length, tuple(keys)))

    def close(self) -> None:
        if not self._file.closed:
            self._queue.put(None)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                log.warning(
                    "kvcache: recorder: writing to %s hangs; closing without it", self._path
                )
                return
            self._file.close()
            if self._skipped:
                log.warning(
                    "kvcache: recorder: queue full; %d requests are not in %s",
                    self._skipped,
                    self._path,
                )

    # In the writing thread

    def _write_all(self) -> None:
        while (request := self._queue.get()) is not None:
            if self._stopped:
                continue
            line = self.line(*request)
            size = os.fstat(self._file.fileno()).st_size
            if size + len(line) > self._limit:
                self._stop(f"it has {format_size(size)}, the limit {LIMIT_VARIABLE}")
                continue
            try:
                if self._file.write(line) != len(line):
                    os.ftruncate(self._file.fileno(), size)
                    raise OSError("no room for a whole line")
            except OSError as error:
                self._stop(str(error))

    def _stop(self, cause: str) -> None:
        self._stopped = True
        log.warning(
            "kvcache: recorder: writing to %s stopped (%s); later requests are not recorded",
            self._path,
            cause,
        )

    def line(self, at_ms: int, tokens: int, keys: Sequence[bytes]) -> bytes:
        """Return the line of a request."""
        numbers: list[int] = []
        for at, key in enumerate(keys, 1):
            digest = blake2b(key, digest_size=_HASH_NBYTES).digest()
            numbers.append(int.from_bytes(digest, "big"))
            if not at % _YIELD_BLOCKS:
                time.sleep(0)  # releases the interpreter to a thread that serves a request
        fields = {
            "timestamp": at_ms,
            "input_length": tokens,
            "output_length": 0,  # unknown when the request arrives
            "hash_ids": numbers,
            "block_tokens": self._block_tokens,
        }
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _open_private(path: str, flags: int) -> int:
    """Open a regular file; a new file is readable by its owner only, others keep their mode.

    A pipe is refused: opening it would make the engine wait for a reader.
    """
    return inputs.open_file(Path(path), flags, 0o600)


def open_recorder(block_tokens: int, environ: Mapping[str, str] = os.environ) -> Recorder:
    """Return the recorder that the environment configures, or ``NULL_RECORDER`` without one.

    Args:
        block_tokens: tokens of a block; 0 if unknown.
        environ: the variables.

    Raises:
        ValueError: with the variable, its value and the cause.
    """
    path = environ.get(VARIABLE)
    if not path:
        return NULL_RECORDER
    given = environ.get(LIMIT_VARIABLE) or LIMIT
    try:
        limit = parse_size(given)
    except ValueError as error:
        raise ValueError(f'environment variable {LIMIT_VARIABLE}: "{given}": {error}') from None
    try:
        return FileRecorder(Path(path), block_tokens=block_tokens, limit=limit)
    except OSError as error:
        raise ValueError(
            f'environment variable {VARIABLE}: cannot write "{path}": {error.strerror}'
        ) from error
