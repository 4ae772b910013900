"""Check this machine's memory: the container's limit, room for L1, locked memory."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache import host_memory
from kvcache.cli.doctor.options import CheckOptions
from kvcache.cli.doctor.result import CheckResult, fail, ok, warn
from kvcache.cli.plan.capacity import copy_rate, cores
from kvcache.sizes import Size, format_size

if TYPE_CHECKING:
    from kvcache.profiles import Profile
    from kvcache.profiles.tiers import Row


def memory_checks(profile: Profile | None, options: CheckOptions) -> Iterator[CheckResult]:
    """Yield the memory of this container, and whether the first tier fits into it."""
    limit, free = host_memory.limit(), host_memory.available()
    yield ok(
        "memory",
        f"{format_size(limit.nbytes)} for this container ({limit.source}), "
        f"{format_size(free.nbytes)} of it free ({free.source})",
        limit_nbytes=limit.nbytes,
        free_nbytes=free.nbytes,
    )
    if profile is not None:
        yield _front_tier(profile.tiers[0], options)


def _front_tier(row: Row, options: CheckOptions) -> CheckResult:
    from kvcache.profiles.tiers import override_of

    sizes = memory_sizes(row)
    for option, nbytes in sizes.items():
        if shortage := host_memory.shortage(nbytes, huge_nbytes=row.huge_nbytes(nbytes)):
            variable = override_of(row.name, option)
            limit = host_memory.limit().nbytes
            fitting = format_size(min(limit, host_memory.available().nbytes))
            if nbytes <= limit and (slabs := slabs_of_other_processes(options.proc)):
                return warn(
                    row.name,
                    f"{option} {shortage}. An L1 of {format_size(slabs.total())} is open here "
                    f"(process {', '.join(map(str, slabs))})",
                    f"none, if that is the engine in question; for a second one "
                    f"{variable}={fitting}",
                )
            return fail(
                row.name,
                f"{option} {shortage}",
                f"{variable}={fitting} or less, or a container with more memory",
            )
    requested = " and ".join(f"{option} {format_size(nbytes)}" for option, nbytes in sizes.items())
    rate = copy_rate(cores(), nbytes=options.copy_nbytes, clock=options.clock)
    return ok(
        row.name,
        f"{requested or 'no size in its profile'}: there is room; memory is copied at "
        f"{rate / 2**30:.2g} GiB/s by {cores()} threads",
        copy_nbytes_per_s=rate,
    )


def memory_sizes(row: Row) -> dict[str, int]:
    """Return the memory sizes in the row's options, by option."""
    return {
        setting.option.name: int(str(setting.value))
        for setting in row.settings
        if setting.option.hint is Size
    }


def slabs_of_other_processes(proc: Path) -> Counter[int]:
    """Return the bytes of slabs that other processes of this host have open, by process id.

    Processes of other users cannot be read, and are left out.
    """
    found: Counter[int] = Counter()
    for process in proc.glob("[0-9]*"):
        try:
            for file in (process / "fd").iterdir():
                if file.readlink().name.startswith("memfd:kvcache-"):
                    found[int(process.name)] += file.stat().st_size
        except OSError:  # another user's process, or one that has ended
            continue
    found.pop(os.getpid(), None)
    return found


def _locks_memory(row: Row) -> bool:
    """Whether a tier registers memory with a network card, which locks it."""
    return row.kind == "mooncake" and row.options.get("protocol") == "rdma"


def locked_memory(profile: Profile | None) -> CheckResult:
    """Check how much memory a process may lock, which only tiers over RDMA need."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    limit = format_size(soft)
    rows = profile.tiers if profile is not None else ()
    if locking := [row.name for row in rows if _locks_memory(row)]:
        return fail(
            "memlock",
            f"{limit}; {', '.join(locking)} registers its memory with the network card",
            "ulimit -l unlimited; in Docker --ulimit memlock=-1, in Kubernetes IPC_LOCK",
        )
    return ok("memlock", f"{limit}, and no tier here locks memory", limit_nbytes=soft)
