"""The directory of a disk tier: can it be had, is there room, how fast is it.

Always true: the tier is not opened. What is written is one file without a name, small beside what
is free, and gone when it is closed, also by a crash.
"""

from __future__ import annotations

import errno
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache.cli.doctor.result import Result, fail, ok, warn
from kvcache.sizes import format_size

if TYPE_CHECKING:
    from kvcache.profiles.tiers import Row

_PIECE = 2 << 20
_PIECES = 32  # written and read at most
_PAGE = 4096
_SHARE = 100  # of what is free, the part that is written at most


def check(row: Row) -> Iterator[Result]:
    """Whose it is, whether it can be written, its room, direct I/O, and its speed."""
    from kvcache.profiles.tiers import override_of
    from kvcache.tiers.disk.files import check as check_directory
    from kvcache.tiers.disk.files import shortage
    from kvcache.tiers.disk.locks import holder
    from kvcache.tiers.disk.places import location

    name = row.name
    try:
        path = location(str(row.options["path"]))
        with suppress(OSError):  # said below
            check_directory(path)
    except ValueError as error:
        yield fail(name, str(error), f"correct {override_of(name, 'path')}")
        return
    there = path
    try:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        with _file(there) as file:
            if pid := holder(path):
                yield ok(name, f"{path} is open in process {pid}: an engine that runs")
            capacity = int(str(row.options["capacity"]))
            if why := shortage(there, capacity):
                yield fail(
                    name,
                    why,
                    f"a smaller {override_of(name, 'capacity')}, or free space at {there}",
                )
            else:
                yield ok(name, f"{path} has room for {format_size(capacity)}")
            yield _speed(name, there, file, int(str(row.options.get("threads", 4))))
    except OSError as error:
        yield fail(
            name,
            f"{path} cannot be written: {error.strerror} ({there})",
            f"make it a directory that user {os.geteuid()} may write, or set "
            f"{override_of(name, 'path')}",
        )


@contextmanager
def _file(folder: Path) -> Iterator[int]:
    """A file in ``folder`` that has no name there."""
    try:
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        file, named = tempfile.mkstemp(prefix=".kvcache-doctor-", dir=folder)
        Path(named).unlink()
    try:
        yield file
    finally:
        os.close(file)


def _speed(name: str, folder: Path, file: int, threads: int) -> Result:
    """Write and read pieces as the tier does, and small ones for the latency."""
    space = os.statvfs(folder)
    pieces = min(_PIECES, space.f_bavail * space.f_frsize // _SHARE // _PIECE)
    if not pieces:
        return warn(name, "too little is free to try how fast it is", f"free space at {folder}")
    with _direct(file) as (used, direct), ThreadPoolExecutor(threads) as pool:

        def rate(verb: Callable[[int, list[memoryview], int], int]) -> float:
            begun = time.perf_counter()
            list(pool.map(lambda at: verb(used, [memory], at * _PIECE), range(pieces)))
            return pieces * _PIECE / (time.perf_counter() - begun)

        memory = memoryview(mmap.mmap(-1, _PIECE))
        memory[:] = os.urandom(_PIECE)
        writes = rate(os.pwritev)
        if not direct:  # else it is the page cache that is measured
            os.fdatasync(used)
            os.posix_fadvise(used, 0, 0, os.POSIX_FADV_DONTNEED)
        latencies = []
        for at in range(0, pieces * _PIECE, _PIECE):
            begun = time.perf_counter()
            os.preadv(used, [memory[:_PAGE]], at)
            latencies.append(time.perf_counter() - begun)
        reads, latency = rate(os.preadv), statistics.median(latencies)
    said = (
        f"{writes / 2**30:.2g} GiB/s written, {reads / 2**30:.2g} GiB/s read, "
        f"{latency * 1e3:.2g} ms for 4KiB ({format_size(pieces * _PIECE)}, {threads} threads)"
    )
    measured = {
        "write_nbytes_per_s": writes, "read_nbytes_per_s": reads, "latency_s": latency,
    }  # fmt: skip
    if direct:
        return ok(name, f"O_DIRECT; {said}", **measured)
    return warn(
        name,
        f"no O_DIRECT at {folder}, so blocks take page cache too; {said}",
        "a path on ext4 or xfs",
        **measured,
    )


@contextmanager
def _direct(file: int) -> Iterator[tuple[int, bool]]:
    """The file past the page cache, if its file system can, else as it is; and which it is."""
    opened = None
    try:
        opened = os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        os.preadv(opened, [mmap.mmap(-1, _PAGE)], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        yield file, False
    else:
        yield opened, True
    finally:
        if opened is not None:
            os.close(opened)
