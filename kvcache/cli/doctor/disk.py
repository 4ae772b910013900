"""Check the directory of a disk tier: its owner, room and speed.

Invariants: the tier is not opened. The check writes one file without a name, at most 1 % of the
free space; the file system deletes it when it is closed, also after a crash.
"""

from __future__ import annotations

import errno
import mmap
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache.cli.doctor.options import CheckOptions
from kvcache.cli.doctor.result import CheckResult, fail, ok, warn
from kvcache.sizes import format_size

if TYPE_CHECKING:
    from kvcache.profiles.tiers import Row

PIECE_NBYTES = 2 << 20  # of one read or write
_PAGE = 4096
_SHARE = 100  # writes at most 1/100 of the free space


def check(row: Row, options: CheckOptions) -> Iterator[CheckResult]:
    """Check the directory's owner, whether it is writable, its room, and its speed."""
    from kvcache.profiles.tiers import override_of
    from kvcache.tiers.disk.directory import check_usable, shortage
    from kvcache.tiers.disk.lock_file import find_owner
    from kvcache.tiers.disk.safe_open import expand_path

    name = row.name
    try:
        path = expand_path(str(row.options["path"]))
        with suppress(OSError):  # the temporary file below raises it again
            check_usable(path)
    except ValueError as error:
        yield fail(name, str(error), f"correct {override_of(name, 'path')}")
        return
    folder = path
    try:
        folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if pid := find_owner(path):
                yield ok(name, f"{path} is open in process {pid}, a running engine")
            capacity = int(str(row.options["capacity"]))
            if cause := shortage(folder, capacity):
                capacity_option = override_of(name, "capacity")
                yield fail(name, cause, f"a smaller {capacity_option}, or free space at {folder}")
            else:
                yield ok(name, f"{path} has room for {format_size(capacity)}")
            threads = int(str(row.options.get("threads", 4)))
            yield _speed(name, folder, file.fileno(), threads, options)
    except OSError as error:
        yield fail(
            name,
            f"{path} cannot be written: {error.strerror} ({folder})",
            f"make it a directory that user {os.geteuid()} may write, or set "
            f"{override_of(name, 'path')}",
        )


def _speed(name: str, folder: Path, file: int, threads: int, options: CheckOptions) -> CheckResult:
    """Measure reads and writes of the tier's size, and the latency of small reads."""
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    pieces = min(options.disk_nbytes, free // _SHARE) // PIECE_NBYTES
    if not pieces:
        return warn(name, "too little free space to measure the speed", f"free space at {folder}")
    offsets = range(0, pieces * PIECE_NBYTES, PIECE_NBYTES)
    buffer = memoryview(mmap.mmap(-1, PIECE_NBYTES))
    buffer[:] = os.urandom(PIECE_NBYTES)
    with _direct(file) as (target, is_direct), ThreadPoolExecutor(threads) as pool:

        def rate(operation: Callable[[int, list[memoryview], int], int]) -> float:
            _, seconds = options.timed(
                lambda: list(pool.map(lambda offset: operation(target, [buffer], offset), offsets))
            )
            return len(offsets) * PIECE_NBYTES / seconds

        write_rate = rate(os.pwritev)
        if not is_direct:  # drop the file from the page cache, so that reads come from the disk
            os.fdatasync(target)
            os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)
        latency_s = statistics.median(
            options.timed(lambda: os.preadv(target, [buffer[:_PAGE]], offset))[1]  # noqa: B023
            for offset in offsets
        )
        read_rate = rate(os.preadv)
    figures = (
        f"{write_rate / 2**30:.2g} GiB/s written, {read_rate / 2**30:.2g} GiB/s read, "
        f"{latency_s * 1e3:.2g} ms for 4KiB "
        f"({format_size(pieces * PIECE_NBYTES)}, {threads} threads)"
    )
    measured = {
        "write_nbytes_per_s": write_rate, "read_nbytes_per_s": read_rate, "latency_s": latency_s,
    }  # fmt: skip
    if is_direct:
        return ok(name, f"O_DIRECT; {figures}", **measured)
    return warn(
        name,
        f"no O_DIRECT at {folder}, so blocks take page cache too; {figures}",
        "a path on ext4 or xfs",
        **measured,
    )


@contextmanager
def _direct(file: int) -> Iterator[tuple[int, bool]]:
    """Open the file again with O_DIRECT; yield the original where that is not supported."""
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
