"""The memory limit and the free memory, from the host and control groups of simulated machines."""

from pathlib import Path

import pytest

from kvcache import host_memory
from kvcache.sizes import parse_size

GIB = 1 << 30
V1_NONE = 9223372036854771712  # what cgroup v1 writes for "no limit"
V2_MOUNT = "30 24 0:26 {mounted} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
OTHERS = """1 1 0:1 / / rw - overlay overlay rw,lowerdir=/a
34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"""


class Machine:
    """A simulated root: 64 GiB of memory, 32 GiB free, and control groups."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write(
            "proc/meminfo", "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 33554432 kB"
        )

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def v2(self, own: str, mounted: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{own}")
        self.write("proc/self/mountinfo", f"{OTHERS}\n{V2_MOUNT.format(mounted=mounted)}")

    def v1(self, own: str, mounted: str = "/") -> None:
        self.v1_group("elsewhere", 1)  # a group of another controller
        self.write(
            "proc/self/cgroup", f"9:name=systemd:{own}\n4:memory:{own}\n1:cpu:/elsewhere\n0::/"
        )
        self.write("proc/self/mountinfo", f"{OTHERS}\n{V1_MOUNT.format(mounted=mounted)}")

    def v2_group(self, path: str, limit_nbytes: object, used: int = 0, cache: int = 0) -> None:
        group = f"sys/fs/cgroup/{path}"
        self.write(f"{group}/memory.max", limit_nbytes)
        self.write(f"{group}/memory.current", used)
        self.write(f"{group}/memory.stat", f"anon 1\nactive_file 3\ninactive_file {cache}")

    def v1_group(self, path: str, limit_nbytes: int, used: int = 0, cache: int = 0) -> None:
        group = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{group}/memory.limit_in_bytes", limit_nbytes)
        self.write(f"{group}/memory.usage_in_bytes", used)
        self.write(f"{group}/memory.stat", f"inactive_file 7\ntotal_inactive_file {cache}")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def expect(machine: Machine, limit: int, source: str) -> None:
    assert host_memory.limit(machine.root) == host_memory.HostMemory(limit, source)


def test_limit_without_control_groups_is_that_of_the_host(machine: Machine) -> None:
    expect(machine, 64 * GIB, "MemTotal in /proc/meminfo")
    assert host_memory.available(machine.root) == host_memory.HostMemory(
        32 * GIB, "MemAvailable in /proc/meminfo"
    )


@pytest.mark.parametrize("groups", [{"pod": 9, "pod/engine": 5}, {"pod": 5, "pod/engine": 9}])
def test_v2_limit_is_the_smallest_of_own_group_and_ancestors(
    machine: Machine, groups: dict[str, int]
) -> None:
    machine.v2("/pod/engine")
    for path, limit_nbytes in groups.items():
        machine.v2_group(path, limit_nbytes * GIB)
    machine.v2_group("other", 1 * GIB)
    smallest = min(groups, key=lambda path: groups[path])
    expect(machine, 5 * GIB, f"/sys/fs/cgroup/{smallest}/memory.max")


def test_limit_ignores_files_above_the_mount(machine: Machine) -> None:
    machine.v2("/pod")
    machine.v2_group("pod", 9 * GIB)
    machine.write("sys/fs/memory.max", 1)
    expect(machine, 9 * GIB, "/sys/fs/cgroup/pod/memory.max")


def test_v2_limit_of_max_is_ignored(machine: Machine) -> None:
    machine.v2("/pod")
    machine.v2_group("pod", "max", used=60 * GIB)
    expect(machine, 64 * GIB, "MemTotal in /proc/meminfo")
    assert host_memory.available(machine.root).nbytes == 32 * GIB


def test_v2_limit_above_that_of_the_host_is_ignored(machine: Machine) -> None:
    machine.v2("/pod")
    machine.v2_group("pod", 100 * GIB)
    expect(machine, 64 * GIB, "MemTotal in /proc/meminfo")


@pytest.mark.parametrize(
    ("own", "mounted", "path"),
    [
        ("/", "/", ""),  # a cgroup namespace of its own
        ("/kubepods/pod7/abc", "/", ""),  # the host's path, the container's mount
        ("/docker/abc", "/docker/abc", ""),  # the mount names the group
        ("/docker/abc/engine", "/docker/abc", "engine"),  # a group nested in it
        ("/../sibling", "/", ""),  # moved out of the namespace it sees
        ("/engine", "/../..", ""),  # the mount lies above the namespace
    ],
)
def test_limit_finds_the_own_group_under_the_mount(
    machine: Machine, own: str, mounted: str, path: str
) -> None:
    machine.v2(own, mounted)
    machine.v2_group(path, 6 * GIB)
    expect(machine, 6 * GIB, f"/sys/fs/cgroup/{path}/memory.max".replace("//", "/"))
    machine.v1(own, mounted)
    machine.v1_group(path, 5 * GIB)
    expect(
        machine,
        5 * GIB,
        f"/sys/fs/cgroup/memory/{path}/memory.limit_in_bytes".replace("//", "/"),
    )


def test_v1_limit_is_the_smallest_and_ignores_huge_ones(machine: Machine) -> None:
    machine.v1("/docker/abc")
    machine.v1_group("", V1_NONE)
    machine.v1_group("docker", 8 * GIB)
    machine.v1_group("docker/abc", V1_NONE)
    expect(machine, 8 * GIB, "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes")
    machine.v1_group("docker", V1_NONE)
    expect(machine, 64 * GIB, "MemTotal in /proc/meminfo")


def test_v2_available_counts_file_cache_as_free(machine: Machine) -> None:
    machine.v2("/pod")
    machine.v2_group("pod", 10 * GIB, used=7 * GIB, cache=2 * GIB)
    free = host_memory.available(machine.root)
    assert free.nbytes == 5 * GIB
    assert free.source == (
        "/sys/fs/cgroup/pod/memory.max less memory.current without inactive_file"
    )


def test_v1_available_counts_file_cache_of_the_subtree_as_free(machine: Machine) -> None:
    machine.v1("/pod")
    machine.v1_group("pod", 10 * GIB, used=7 * GIB, cache=2 * GIB)
    assert host_memory.available(machine.root).nbytes == 5 * GIB


def test_available_is_that_of_the_fullest_ancestor(machine: Machine) -> None:
    machine.v2("/pod/engine")
    machine.v2_group("pod", 20 * GIB, used=19 * GIB)
    machine.v2_group("pod/engine", 10 * GIB, used=1 * GIB)
    assert host_memory.limit(machine.root).nbytes == 10 * GIB
    assert host_memory.available(machine.root).nbytes == 1 * GIB


@pytest.mark.parametrize(("used", "cache", "free"), [(11, 0, 0), (1, 4, 10)])
def test_available_is_between_zero_and_the_limit(
    machine: Machine, used: int, cache: int, free: int
) -> None:
    machine.v2("/pod")
    machine.v2_group("pod", 10 * GIB, used * GIB, cache * GIB)
    assert host_memory.available(machine.root).nbytes == free * GIB


def test_available_of_a_group_without_usage_is_its_limit(machine: Machine) -> None:
    machine.v2("/pod")
    machine.write("sys/fs/cgroup/pod/memory.max", 10 * GIB)
    assert host_memory.available(machine.root).nbytes == 10 * GIB


def test_shortage_begins_after_the_last_free_byte(machine: Machine) -> None:
    assert host_memory.shortage(32 * GIB, machine.root) is None
    assert host_memory.shortage(32 * GIB + 1, machine.root) is not None


def test_shortage_with_huge_pages_begins_after_the_last_one(machine: Machine) -> None:
    assert host_memory.shortage(35 * GIB, machine.root, huge_nbytes=3 * GIB) is None
    message = host_memory.shortage(36 * GIB, machine.root, huge_nbytes=3 * GIB)
    assert message is not None
    assert 'at most "35GiB"' in message


@pytest.mark.parametrize("requested", [7, 12])
def test_shortage_names_both_numbers_their_sources_and_the_maximum(
    machine: Machine, requested: int
) -> None:
    machine.v2("/pod")
    machine.v2_group("pod", 10 * GIB, used=4 * GIB + 5)
    message = host_memory.shortage(requested * GIB, machine.root)
    assert message is not None
    assert f"asks for {requested}GiB" in message
    assert "the 10GiB this container may use (/sys/fs/cgroup/pod/memory.max)" in message
    assert "only 5.99GiB are free now (/sys/fs/cgroup/pod/memory.max less memory.current" in message
    assert 'at most "5.99GiB" or "59%" fits' in message
    for fits in ("5.99GiB", "59%"):
        assert host_memory.shortage(parse_size(fits, 10 * GIB), machine.root) is None


def test_shortage_with_almost_no_memory_names_no_percentage(machine: Machine) -> None:
    machine.v2("/pod")
    machine.v2_group("pod", 10 * GIB, used=10 * GIB - 5000)
    message = host_memory.shortage(GIB, machine.root)
    assert message is not None
    assert 'at most "4.88KiB" fits' in message


def test_available_on_this_machine_is_positive() -> None:
    assert 0 < host_memory.available().nbytes <= host_memory.limit().nbytes
