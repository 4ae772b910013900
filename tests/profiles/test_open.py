"""Opening a profile: a stack with the tiers of the profile, or one error and nothing left open."""

import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvcache.profiles
from kvcache import host_memory, huge_pages
from kvcache.profiles import ProfileError, open_stack
from kvcache.replica import Replica
from tests.support.empty_tiers import Front
from tests.support.failing_parts import FaultyTier

MIB = 1 << 20
DRAM = '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "CAPACITY"\n'
ROOT = Path(kvcache.profiles.__file__).resolve().parent


@pytest.fixture(autouse=True)
def forty_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container may use 40 MiB, of which 10 are free."""

    def limit(root: Path = Path("/")) -> host_memory.HostMemory:
        return host_memory.HostMemory(40 * MIB, "the limit's file")

    def available(root: Path = Path("/")) -> host_memory.HostMemory:
        return host_memory.HostMemory(10 * MIB, "the free memory's file")

    monkeypatch.setattr(host_memory, "limit", limit)
    monkeypatch.setattr(host_memory, "available", available)


def ours(tmp_path: Path, text: str) -> str:
    file = tmp_path / "ours.toml"
    file.write_text(text)
    return str(file)


def test_open_stack_keeps_blocks(tmp_path: Path) -> None:
    profile = ours(tmp_path, DRAM.replace("CAPACITY", "8MiB"))
    with open_stack(profile, block_nbytes=MIB) as stack:
        assert stack.stats().profile == "ours"
        assert stack.block_nbytes == MIB
        assert stack.front.slab.slots == 8
        stack.front.slab.wait_populated()
        with stack.reserve([b"a"]) as lease:
            lease.views[0][:] = b"k" * MIB
        with stack.fetch(stack.match([b"a"]).result()).result() as lease:
            assert bytes(lease.views[0]) == b"k" * MIB


@pytest.mark.parametrize(("free_pages", "capacity"), [(3, 16), (8, 24)])
def test_capacity_may_exceed_the_free_memory_by_the_free_huge_pages(
    free_pages: int, capacity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "free", lambda: free_pages)
    profile = ours(tmp_path, DRAM.replace("CAPACITY", f"{capacity}MiB"))
    with open_stack(profile, block_nbytes=MIB) as stack:
        assert stack.front.slab.slots == capacity
    monkeypatch.setenv("KVCACHE__L1__HUGE_PAGES", "false")
    with pytest.raises(ProfileError, match="are free now"):
        open_stack(profile, block_nbytes=MIB)


def test_variables_select_profile_and_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-only")
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "10%")
    with open_stack(block_nbytes=MIB) as stack:
        assert stack.profile == "l1-only"
        assert stack.front.slab.slots == 4


def test_open_stack_of_replicas_divides_shares_of_memory_and_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvcache")
    disk = f'[[tier]]\nname = "disk"\nkind = "disk"\npath = "{tmp_path}/kv"\ncapacity = "16MiB"\n'
    profile = ours(tmp_path, DRAM.replace("CAPACITY", "20%") + disk)
    with open_stack(profile, block_nbytes=MIB) as alone:
        slots = alone.front.slab.slots
        before = len(caplog.records)
    with ExitStack() as stacks:
        for index in range(2):
            replica = Replica(index, 2)
            stack = open_stack(profile, block_nbytes=MIB, replica=replica)
            stacks.enter_context(stack)
            assert stack.front.slab.slots == slots // 2
        assert (tmp_path / "kv" / "replica-1" / "blocks").exists()
        with pytest.raises(ProfileError, match="has open; every tier needs a directory of its own"):
            open_stack(profile, block_nbytes=MIB, replica=replica)
    said = [record.getMessage() for record in caplog.records[before:]]
    assert any("replica 1 of 2: " in text and 'capacity = "20%"' in text for text in said)
    assert any("replica 1 of 2, with 8MiB of a capacity of 16MiB" in text for text in said)


@pytest.mark.parametrize(
    ("capacity", "asks"), [("50%", "20MiB"), ("11MiB", "11MiB"), ("41MiB", "41MiB")]
)
def test_size_above_free_memory_is_refused(tmp_path: Path, capacity: str, asks: str) -> None:
    profile = ours(tmp_path, DRAM.replace("CAPACITY", capacity))
    with pytest.raises(ProfileError) as caught:
        open_stack(profile, block_nbytes=MIB)
    (problem,) = caught.value.problems
    assert problem.startswith(f'{profile}, line 4: capacity = "{capacity}": asks for {asks}')
    assert "the 40MiB this container may use (the limit's file)" in problem
    assert "only 10MiB are free now (the free memory's file)" in problem
    assert 'at most "10MiB" or "25%" fits' in problem


def test_size_above_free_memory_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "64GiB")
    with pytest.raises(ProfileError, match=r"variable KVCACHE__L1__CAPACITY: .* asks for 64GiB"):
        open_stack(block_nbytes=MIB)


def test_value_error_of_a_constructor_names_file_and_tier(tmp_path: Path) -> None:
    profile = ours(tmp_path, DRAM.replace("CAPACITY", "1MiB"))
    with pytest.raises(ProfileError) as caught:
        open_stack(profile, block_nbytes=2 * MIB)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{profile}, line 4: capacity is 1048576 bytes; ")
    assert "1048576" in problem


class Unmade(FaultyTier):
    """A tier with a constructor that raises."""

    def __init__(self) -> None:
        raise SystemExit("no such\nserver, password=hunter2")


def test_any_exception_of_a_constructor_names_file_and_tier(tmp_path: Path) -> None:
    below = '[[tier]]\nname = "{}"\nkind = "{}"\n'
    file = ours(
        tmp_path,
        DRAM.replace("CAPACITY", "64KiB")
        + below.format("l2", "tests.support.failing_parts:FaultyTier")
        + below.format("l3", f"{__name__}:Unmade"),
    )
    before = set(threading.enumerate())
    with pytest.raises(ProfileError) as raised:
        open_stack(file, block_nbytes=4096)
    text = str(raised.value)
    assert f"{file}, line 8" in text
    assert "SystemExit: no such" in text
    assert "hunter2" not in text
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


class Unreadable(FaultyTier):
    @property
    def call_nbytes(self) -> int:  # type: ignore[override]
        raise ZeroDivisionError("no size")


def test_any_exception_of_an_attribute_names_file_and_tier(tmp_path: Path) -> None:
    lower = f'[[tier]]\nname = "l2"\nkind = "{__name__}:Unreadable"\n'
    text = DRAM.replace("CAPACITY", "1MiB") + lower
    with pytest.raises(ProfileError) as raised:
        open_stack(ours(tmp_path, text), block_nbytes=4096)
    [said] = raised.value.problems
    assert 'tier "l2": ZeroDivisionError: no size' in said


def test_open_tiers_are_closed_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Front] = []

    def close(front: Front) -> None:
        closed.append(front)

    def refuse(front: Front, lower: list[object], *, profile: str, **named: object) -> None:
        raise RuntimeError(profile)

    monkeypatch.setattr(Front, "close", close)
    monkeypatch.setattr(kvcache.profiles, "Stack", refuse)
    text = '[[tier]]\nname = "l1"\nkind = "tests.support.empty_tiers:Front"\nroom = "1MiB"\n'
    with pytest.raises(RuntimeError, match="ours"):
        open_stack(ours(tmp_path, text), block_nbytes=MIB)
    assert len(closed) == 1


def test_package_is_not_importable_by_its_bare_name() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); import profiles",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ImportError: import kvcache.profiles, not profiles" in run.stderr


def test_error_of_a_profile_without_lower_tiers_lists_those_that_can_be_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shipped profile needs a package that is not installed here."""

    def load(name: str | None, *arguments: object, **named: object) -> kvcache.profiles.Profile:
        if name == "l1-redis":
            raise ProfileError(name, ["needs packages"])
        return kvcache.profiles.load.load_profile(name, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(kvcache.profiles, "load_profile", load)
    with pytest.raises(ProfileError, match='"l1-disk"') as raised:
        kvcache.profiles.open_tiers("l1-only", block_nbytes=4096, namespace=b"")
    assert '"l1-redis"' not in str(raised.value)
