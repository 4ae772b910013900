"""The machine's memory: whether L1 gets what its profile asks for, locked memory, huge pages."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache import host_memory
from kvcache.cli.doctor.result import Result, fail, ok, warn
from kvcache.cli.plan.capacity import copy_rate, cores
from kvcache.sizes import Size, format_size
from kvcache.slab import HUGE_PAGE

if TYPE_CHECKING:
    from kvcache.profiles import Profile
    from kvcache.profiles.tiers import Row

_HUGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_LOCKING = {"mooncake"}  # kinds that register memory with a network card


def memory_checks(profile: Profile | None) -> Iterator[Result]:
    """What there is, and whether the first tier gets its share of it."""
    whole, free = host_memory.limit(), host_memory.available()
    yield ok(
        "memory",
        f"{format_size(whole.nbytes)} for this container ({whole.source}), "
        f"{format_size(free.nbytes)} of it free ({free.source})",
        limit_nbytes=whole.nbytes,
        free_nbytes=free.nbytes,
    )
    if profile is not None:
        yield _front(profile.tiers[0])


def _front(row: Row) -> Result:
    from kvcache.profiles.tiers import override_of

    asked = [
        (setting.option.name, int(str(setting.value)))
        for setting in row.settings
        if setting.option.hint is Size
    ]
    for option, nbytes in asked:
        if shortage := host_memory.shortage(nbytes):
            variable = override_of(row.name, option)
            fits = format_size(min(host_memory.limit().nbytes, host_memory.available().nbytes))
            if nbytes <= host_memory.limit().nbytes and (held := _other_slabs()):
                pids = ", ".join(map(str, held))
                return warn(
                    row.name,
                    f"{option} {shortage}. An L1 of {format_size(sum(held.values()))} is open here "
                    f"(process {pids})",
                    f"none, if that is the engine in question; for a second one {variable}={fits}",
                )
            return fail(
                row.name,
                f"{option} {shortage}",
                f"{variable}={fits} or less, or a container with more memory",
            )
    takes = " and ".join(f"{option} {format_size(nbytes)}" for option, nbytes in asked)
    rate = copy_rate(cores(), nbytes=32 << 20)
    return ok(
        row.name,
        f"{takes or 'no size in its profile'}: there is room; memory is copied at "
        f"{rate / 2**30:.2g} GiB/s by {cores()} threads",
        copy_nbytes_per_s=rate,
    )


def _other_slabs() -> dict[int, int]:
    """The slabs that are open on this host, as far as we may see: their bytes, by process."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for file in (process / "fd").iterdir():
                if file.readlink().name.startswith("memfd:kvcache-"):
                    size = file.stat().st_size
                    found[int(process.name)] = found.get(int(process.name), 0) + size
        except OSError:  # not ours to look at, or gone
            continue
    found.pop(os.getpid(), None)
    return found


def memlock(profile: Profile | None) -> Result:
    """How much memory may be locked, which only who registers it with a network card asks for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    kinds = {row.kind for row in profile.tiers} if profile is not None else set()
    limit = format_size(soft)
    if needing := sorted(kinds & _LOCKING):
        return fail(
            "memlock",
            f"{limit}; {', '.join(needing)} registers all of L1 with the network card",
            "ulimit -l unlimited; in Docker --ulimit memlock=-1, in Kubernetes IPC_LOCK",
        )
    return ok("memlock", f"{limit}, and no tier here locks memory", limit_nbytes=soft)


def huge_pages(profile: Profile | None, folder: Path = _HUGE) -> Result:
    """Whether huge pages were reserved, and whether L1 will have them."""
    reserved, free = _number(folder / "nr_hugepages"), _number(folder / "free_hugepages")
    if not reserved:
        return ok("huge pages", "none reserved, so L1 is in small ones")
    have = f"{free:,} of {reserved:,} huge pages of {format_size(HUGE_PAGE)} are free"
    if profile is None:
        return ok("huge pages", have)
    sizes = [int(str(s.value)) for s in profile.tiers[0].settings if s.option.hint is Size]
    need = -(-sum(sizes) // HUGE_PAGE)
    if need <= free:
        return ok("huge pages", f"{have}; L1 takes {need:,}", reserved=reserved, free=free)
    return warn(
        "huge pages",
        f"{have}, and L1 needs {need:,}: it takes none, and nobody else has that memory",
        f"sysctl vm.nr_hugepages={need + reserved - free}, or 0 to give them back",
        reserved=reserved,
        free=free,
    )


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii")) if path.exists() else 0
