"""A tier that hangs for ever keeps no process from ending, and takes no tier with it.

Each test runs a process, which fails it by not ending.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG = 60.0  # a process that has not ended by then never does

OPEN = """
import logging, os, sys, threading
from pathlib import Path
from kvcache import Match, Stack
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import FaultyTier

logging.basicConfig(format="%(message)s")
hangs, closes = sys.argv[1], sys.argv[2] == "closes"
hanging = threading.Semaphore(0)

def hang(*_):
    hanging.release()
    threading.Event().wait()

front = DramTier(block_nbytes=PAGE, capacity=Size(64 * PAGE))

def lower(tier, name):
    return LowerTier(tier, name=name, front=front, namespace=b"n" * 32, deadline_s=0.2)

def put(keys):
    with stack.reserve(keys) as lease:
        for key, view in zip(lease.keys, lease.views):
            view[:] = block_of(key, PAGE)
"""

TIER = """
bad, good = FaultyTier(), FaultyTier()
setattr(bad, hangs, hang)
stack = Stack(front, [lower(bad, "bad"), lower(good, "good")], profile="test")
keys = keys_of("a", 4)
if hangs == "contains":
    assert stack.match(keys).result().blocks == 0
elif hangs == "load":
    assert len(stack.fetch(Match(keys, 0, 4, (1,) * 4)).result()) == 0
if hangs == "store":
    put(keys)
if hangs != "close":
    assert hanging.acquire(timeout=30)
if closes:
    stack.close(flush_s=0.1)
    print("closed", good.closed)
"""

DISK = """
tier = DiskTier(block_nbytes=PAGE, path=sys.argv[3], capacity=1 << 20)
stack = Stack(front, [lower(tier, "disk")], profile="test")
keys = keys_of("a", 4)
put(keys)
assert stack.flush(30)
front.clear()
setattr(os, hangs, hang)
if hangs == "preadv":
    assert len(stack.fetch(stack.match(keys).result()).result()) == 0
else:
    put(keys_of("b", 4))
assert hanging.acquire(timeout=30)
if closes:
    stack.close(flush_s=0.1)
    print("closed", stack.stats().pinned_slots > 0)
"""


def ends(script: str, *arguments: str) -> tuple[str, str]:
    """The output and errors of a process that ends well."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN + script, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("closes", ["closes", "just exits"])
@pytest.mark.parametrize("hangs", ["contains", "load", "store", "close"])
def test_a_process_whose_tier_hangs_ends(hangs: str, closes: str) -> None:
    out, err = ends(TIER, hangs, closes)
    if closes == "closes":
        assert out == "closed True\n"  # the other tier is not held up
        assert ("tier bad: close hangs" in err) == (hangs == "close")
        assert "tier good" not in err


@pytest.mark.parametrize("closes", ["closes", "just exits"])
@pytest.mark.parametrize("hangs", ["preadv", "pwritev"])
def test_a_process_whose_disk_hangs_ends(hangs: str, closes: str, tmp_path: Path) -> None:
    out, err = ends(DISK, hangs, closes, str(tmp_path))
    if closes == "closes":
        assert out == "closed True\n"  # the call has the memory that it was given
        assert "tier disk: close hangs" in err


def test_a_process_whose_recording_hangs_ends(tmp_path: Path) -> None:
    script = """
from kvcache.replay import recorder
recorder.CLOSE_S = 0.1
file = recorder.FileRecorder(Path(sys.argv[3]), block_tokens=16, limit=1 << 20)
os.fstat = hang
stack = Stack(front, profile="test", recorder=file)
stack.match(keys_of("a", 2)).result()
assert hanging.acquire(timeout=30)
stack.close()
"""
    _, err = ends(script, "fstat", "closes", str(tmp_path / "trace"))
    assert "hangs; it is left open" in err


def test_a_call_that_ends_after_the_stack_was_closed_has_its_memory() -> None:
    script = """
import gc
go, late = threading.Event(), threading.Semaphore(0)

class Late(FaultyTier):
    def load(self, keys, into):
        hanging.release()
        go.wait()
        for view in into:
            view[:] = b"\\xff" * len(view)
        late.release()
        return [len(view) for view in into]

stack = Stack(front, [lower(Late(), "late")], profile="test")
keys = keys_of("a", 4)
assert len(stack.fetch(Match(keys, 0, 4, (1,) * 4)).result()) == 0
assert hanging.acquire(timeout=30)
stack.close(flush_s=0.1)
gc.collect()
go.set()
assert late.acquire(timeout=30)
"""
    ends(script, "load", "closes")


def test_a_process_that_closes_while_it_exits_ends(tmp_path: Path) -> None:
    script = """
import atexit
tier = DiskTier(block_nbytes=PAGE, path=sys.argv[3], capacity=1 << 20)
bad = FaultyTier()
bad.close = hang
stack = Stack(front, [lower(tier, "disk"), lower(bad, "bad")], profile="test")
put(keys_of("a", 4))

@atexit.register
def last():
    stack.close(flush_s=30)
    down = stack.stats().lower[0]
    print("stored", down.stored_blocks, tier._closed)
"""
    out, err = ends(script, "close", "just exits", str(tmp_path))
    assert out == "stored 4 True\n"
    assert "tier bad: close hangs" in err
