"""Records what a live engine asks for, so that `kvcache replay` can ask it again.

``KVCACHE_RECORD=file`` has every stack that is opened write a line for each request, in the format
of ``kvcache.replay.trace``; lines are added to a file that is there, by several engines too.

Always true here:

* A file holds times, lengths, and of each key a short hash: nothing that a prompt could be read
  from, and no key that a tier would answer to.
* Whoever is recorded hands over a tuple and goes on. What cannot be written, since the file is full
  or the disk is, or too many wait, is left out: said once in the log, and never an error.
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
QUEUE: Final = 1024  # requests that wait to be written, at most
CLOSE_S: Final = 5.0  # to write what waits
BREATH: Final = 64  # blocks after which a request's thread may run
HASH_NBYTES: Final = 6  # a number that JSON readers take, and that ten million blocks do not share

log = logging.getLogger(__name__)


class Recorder:
    """What is told of every request. This one writes nothing."""

    def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
        """A request asks for the blocks ``keys``, from its first.

        Args:
            keys: its chain, without a partial last block.
            tokens: of its prompt; ``None`` if that is not known, as many as the blocks have.
        """

    def close(self) -> None:
        """Write what waits. Twice is allowed."""


SILENT: Final = Recorder()


class Careful(Recorder):
    """A third-party recorder, of which the first failure ends the recording and nothing else."""

    def __init__(self, inner: Recorder) -> None:
        self._inner = inner
        self._failed = False

    def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
        if not self._failed:
            self._try(partial(self._inner.record, keys, tokens))

    def close(self) -> None:
        self._try(self._inner.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            result_of(call)
        except TierError as error:
            self._failed, kind = True, type(self._inner).__name__
            log.warning("kvcache: recorder %s: failed (%s); it records no more", kind, error)


def careful(recorder: Recorder) -> Recorder:
    """``recorder``, in a :class:`Careful` where it is not of this package."""
    return recorder if type(recorder) in (Recorder, FileRecorder) else Careful(recorder)


class FileRecorder(Recorder):
    """Adds lines to ``path`` until it has ``limit`` bytes.

    Raises:
        OSError: when it cannot be opened for that, or is no regular file.
    """

    def __init__(self, path: Path, *, block_tokens: int, limit: int) -> None:
        self._path = path
        self._block_tokens = block_tokens or 1  # not known: a block counts as one
        self._limit = limit
        self._file = FileIO(path, "a", opener=_private)
        # Time never goes back, and goes on where another engine left off.
        self._zero_ns = time.time_ns() - time.monotonic_ns()
        self._waiting: SimpleQueue[tuple[int, int, tuple[bytes, ...]] | None] = SimpleQueue()
        self._left_out = 0
        self._over = False  # nothing more is written
        self._thread = threading.Thread(target=self._write_all, name="kvcache-record", daemon=True)
        self._thread.start()
        bind_to_process(self)

    def record(self, keys: Sequence[bytes], tokens: int | None = None) -> None:
        if self._over:
            return
        if self._waiting.qsize() >= QUEUE:
            self._left_out += 1
            return
        at_ms = (self._zero_ns + time.monotonic_ns()) // 1_000_000
        length = len(keys) * self._block_tokens if tokens is None else tokens
        self._waiting.put((at_ms, length, tuple(keys)))

    def close(self) -> None:
        if not self._file.closed:
            self._waiting.put(None)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                log.warning("kvcache: recording in %s hangs; it is left open", self._path)
                return
            self._file.close()
            if self._left_out:
                log.warning(
                    "kvcache: %d requests came faster than %s could be written, and are not in it",
                    self._left_out,
                    self._path,
                )

    # In the thread that writes

    def _write_all(self) -> None:
        while (request := self._waiting.get()) is not None:
            if self._over:
                continue
            line = self._line(*request)
            size = os.fstat(self._file.fileno()).st_size
            if size + len(line) > self._limit:
                self._stop(f"it has {format_size(size)}; {LIMIT_VARIABLE} allows more")
                continue
            try:
                if self._file.write(line) != len(line):
                    os.ftruncate(self._file.fileno(), size)
                    raise OSError("there was no room for a whole line")
            except OSError as error:
                self._stop(str(error))

    def _stop(self, why: str) -> None:
        self._over = True
        log.warning("kvcache: no more requests are recorded in %s: %s", self._path, why)

    def _line(self, at_ms: int, tokens: int, keys: Sequence[bytes]) -> bytes:
        numbers: list[int] = []
        for at, key in enumerate(keys, 1):
            digest = blake2b(key, digest_size=HASH_NBYTES).digest()
            numbers.append(int.from_bytes(digest, "big"))
            if not at % BREATH:
                time.sleep(0)  # a request that waits for the interpreter goes first
        fields = {
            "timestamp": at_ms,
            "input_length": tokens,
            "output_length": 0,  # not known yet
            "hash_ids": numbers,
            "block_tokens": self._block_tokens,
        }
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _private(path: str, flags: int) -> int:
    """Open a regular file that only its owner may read, if it is made now; others keep their mode.

    Nothing else is opened: a pipe would make the engine wait for its reader.
    """
    return inputs.open_file(Path(path), flags, 0o600)


def opened(block_tokens: int, environ: Mapping[str, str] = os.environ) -> Recorder:
    """The recorder that the environment asks for, of blocks of so many tokens (0: not known).

    Raises ValueError that names the variable, what it has and what is allowed.
    """
    path = environ.get(VARIABLE)
    if not path:
        return SILENT
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
