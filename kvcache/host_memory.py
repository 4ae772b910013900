"""How much memory this process may use, and how much of it is free, with where that is written.

Always true: every answer is the smallest of what the host says and what each control group
from the process's own up to the mounted root says (cgroup v2 and v1, also nested or in a
namespace of its own); ``available()`` is never above ``limit()``. Nothing is cached: memory moves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvcache.sizes import format_size

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """A number of bytes and the file that says so."""

    nbytes: int
    source: str


@dataclass(frozen=True, slots=True)
class _Files:
    """Where one version of cgroup writes its limit, its use, and what of that can be reclaimed."""

    limit: str
    usage: str
    cache: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def limit(root: Path = _ROOT) -> HostMemory:
    """The memory this container may use. ``root`` is where /proc and the cgroup mounts are."""
    return _smallest(
        [HostMemory(_host(root, "MemTotal:"), "MemTotal in /proc/meminfo")]
        + [
            HostMemory(most, _name(root, group / files.limit))
            for group, files, most in _limited_groups(root)
        ]
    )


def available(root: Path = _ROOT) -> HostMemory:
    """How much of ``limit()`` is free now, file cache that can be dropped included."""
    free = [HostMemory(_host(root, "MemAvailable:"), "MemAvailable in /proc/meminfo")]
    for group, files, most in _limited_groups(root):
        used = int(_read(group / files.usage) or 0)
        used -= _field(_read(group / "memory.stat"), files.cache)
        source = f"{_name(root, group / files.limit)} less {files.usage} without {files.cache}"
        free.append(HostMemory(min(max(0, most - used), most), source))
    return _smallest(free)


def shortage(nbytes: int, root: Path = _ROOT) -> str | None:
    """Why ``nbytes`` cannot be had now and how much can, or None if there is room."""
    whole, free = limit(root), available(root)
    fits = min(whole.nbytes, free.nbytes)
    if nbytes <= fits:
        return None
    percent = 100 * fits // whole.nbytes
    return (
        f"asks for {format_size(nbytes)}, but of the {format_size(whole.nbytes)} this container "
        f"may use ({whole.source}) only {format_size(free.nbytes)} are free now ({free.source}); "
        f'at most "{format_size(fits)}"' + (f' or "{percent}%"' if percent else "") + " fits"
    )


def _limited_groups(root: Path) -> Iterator[tuple[Path, _Files, int]]:
    """The process's control groups that have a memory limit, own group first."""
    mounts = _mounts(root)
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _V1 if controllers else _V2
        if files not in mounts:
            continue
        mount, mounted = mounts[files]
        try:
            own = mount / PurePosixPath(path).relative_to(mounted)
        except ValueError:
            own = mount
        # A path that is the host's, under a mount that is the container's, leads nowhere; going up
        # from it still ends at the mount, which then is the process's own group.
        for group in (own, *own.parents):
            most = _read(group / files.limit)
            if most.isdigit():  # "max": no limit
                yield group, files, int(most)
            if group == mount:
                break


def _mounts(root: Path) -> dict[_Files, tuple[Path, str]]:
    """Per cgroup version: where its memory files are mounted, and which group is mounted there."""
    mounts: dict[_Files, tuple[Path, str]] = {}
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, what = line.partition(" - ")
        mounted, point = place.split()[3:5]
        kind, *_, options = what.split()
        if kind == "cgroup2":
            mounts.setdefault(_V2, (root / point.lstrip("/"), mounted))
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts.setdefault(_V1, (root / point.lstrip("/"), mounted))
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
    """What the file says; nothing if it is not there or not ours to read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _smallest(answers: list[HostMemory]) -> HostMemory:
    return min(answers, key=lambda answer: answer.nbytes)


def _name(root: Path, path: Path) -> str:
    return f"/{path.relative_to(root)}"
