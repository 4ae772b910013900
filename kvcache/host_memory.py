"""The memory that this process may use and the free part of it, with the files that report them.

Invariants: every result is the smallest of the host's number and those of the control groups, from
the process's own group up to the mounted root (cgroup v2 and v1, also nested or in a cgroup
namespace). ``available()`` is never above ``limit()``. Nothing is cached, since memory use changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvcache.sizes import format_size

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """A number of bytes and the file it was read from."""

    nbytes: int
    source: str


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """The files of a controller: limit and usage, and the reclaimable field of memory.stat."""

    controller: str
    limit: str
    usage: str
    cache: str = ""


@dataclass(frozen=True, slots=True)
class _Controller:
    """A controller's files in the two versions of cgroups."""

    v1: _CgroupFiles
    v2: _CgroupFiles


_MEMORY = _Controller(
    _CgroupFiles("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    _CgroupFiles("memory", "memory.max", "memory.current", "inactive_file"),
)
_HUGE_PAGES = _Controller(
    _CgroupFiles("hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.usage_in_bytes"),
    _CgroupFiles("hugetlb", "hugetlb.2MB.max", "hugetlb.2MB.current"),
)


def limit(root: Path = _ROOT) -> HostMemory:
    """The memory that this container may use. ``root`` has /proc and the cgroup mounts."""
    return _smallest(
        [HostMemory(_host(root, "MemTotal:"), "MemTotal in /proc/meminfo")]
        + [
            HostMemory(limit_nbytes, _name(root, group / files.limit))
            for group, files, limit_nbytes in _limited_groups(root)
        ]
    )


def available(root: Path = _ROOT) -> HostMemory:
    """The part of ``limit()`` that is free now, including file cache that can be dropped."""
    free = [HostMemory(_host(root, "MemAvailable:"), "MemAvailable in /proc/meminfo")]
    for group, files, limit_nbytes in _limited_groups(root):
        used = int(_read(group / files.usage) or 0)
        used -= _field(_read(group / "memory.stat"), files.cache)
        source = f"{_name(root, group / files.limit)} less {files.usage} without {files.cache}"
        free.append(HostMemory(min(max(0, limit_nbytes - used), limit_nbytes), source))
    return _smallest(free)


def free_huge_pages(root: Path = _ROOT) -> int | None:
    """The bytes in huge pages of 2 MiB that the control groups still allow; None: no limit."""
    return min(
        (
            limit_nbytes - int(_read(group / files.usage) or 0)
            for group, files, limit_nbytes in _limited_groups(root, _HUGE_PAGES)
        ),
        default=None,
    )


def shortage(nbytes: int, root: Path = _ROOT, *, huge_nbytes: int = 0) -> str | None:
    """Why ``nbytes`` cannot be allocated now, and how many bytes can; ``None`` if they can.

    ``huge_nbytes`` of them are in free huge pages, which are not a part of ``available()``.
    """
    total, free = limit(root), available(root)
    fits = min(total.nbytes, free.nbytes) + huge_nbytes
    if nbytes <= fits:
        return None
    percent = 100 * fits // total.nbytes
    return (
        f"asks for {format_size(nbytes)}, but of the {format_size(total.nbytes)} this container "
        f"may use ({total.source}) only {format_size(free.nbytes)} are free now ({free.source}); "
        f'at most "{format_size(fits)}"'
        + (f' or "{percent}%"' if 0 < percent <= 100 else "")
        + " fits"
    )


def _limited_groups(
    root: Path, controller: _Controller = _MEMORY
) -> Iterator[tuple[Path, _CgroupFiles, int]]:
    """Yield the process's control groups that have a limit, its own group first."""
    mounts = _mounts(root, controller)
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller.v1.controller not in controllers.split(","):
            continue
        files = controller.v1 if controllers else controller.v2
        if files not in mounts:
            continue
        mount, mounted = mounts[files]
        try:
            own_group = mount / PurePosixPath(path).relative_to(mounted)
        except ValueError:
            own_group = mount
        # A host's path does not exist under a container's mount. Its parents lead to the mount,
        # which is then the process's own group.
        for group in (own_group, *own_group.parents):
            text = _read(group / files.limit)
            if text.isdigit():  # "max": no limit
                yield group, files, int(text)
            if group == mount:
                break


def _mounts(root: Path, controller: _Controller) -> dict[_CgroupFiles, tuple[Path, str]]:
    """For each cgroup version: the mount point of the files, and the group mounted there."""
    mounts: dict[_CgroupFiles, tuple[Path, str]] = {}
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        mounted, point = mount.split()[3:5]
        kind, *_, options = filesystem.split()
        if kind == "cgroup2":
            mounts.setdefault(controller.v2, (root / point.lstrip("/"), mounted))
        elif kind == "cgroup" and controller.v1.controller in options.split(","):
            mounts.setdefault(controller.v1, (root / point.lstrip("/"), mounted))
    return mounts


def _host(root: Path, name: str) -> int:
    return 1024 * _field((root / "proc/meminfo").read_text(), name)


def _field(text: str, name: str) -> int:
    """The number after ``name`` at the start of a line; 0 if no line has it."""
    for line in text.splitlines():
        match line.split():
            case [first, number, *_] if first == name:
                return int(number)
    return 0


def _read(path: Path) -> str:
    """The text of the file; empty if it does not exist or cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _smallest(candidates: list[HostMemory]) -> HostMemory:
    return min(candidates, key=lambda each: each.nbytes)


def _name(root: Path, path: Path) -> str:
    return f"/{path.relative_to(root)}"
