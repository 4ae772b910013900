"""A tier that hangs for ever neither keeps a process from exiting nor blocks other tiers.

Each test runs a process, and fails if that does not exit.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0  # a process that takes longer is considered hanging

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


def run_script(script: str, *arguments: str) -> tuple[str, str]:
    """Run ``script`` after ``OPEN`` in a process that must succeed; return stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN + script, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("closes", ["closes", "just exits"])
@pytest.mark.parametrize("hangs", ["contains", "load", "store", "close"])
def test_process_with_a_hanging_tier_exits(hangs: str, closes: str) -> None:
    out, err = run_script(TIER, hangs, closes)
    if closes == "closes":
        assert out == "closed True\n"  # the other tier was closed nevertheless
        assert ("tier bad: close hangs" in err) == (hangs == "close")
        assert "tier good" not in err


@pytest.mark.parametrize("closes", ["closes", "just exits"])
@pytest.mark.parametrize("hangs", ["preadv", "pwritev"])
def test_process_with_a_hanging_disk_exits(hangs: str, closes: str, tmp_path: Path) -> None:
    out, err = run_script(DISK, hangs, closes, str(tmp_path))
    if closes == "closes":
        assert out == "closed True\n"  # the hanging call keeps its slots
        assert "tier disk: close hangs" in err


def test_process_with_a_hanging_recorder_exits(tmp_path: Path) -> None:
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
    _, err = run_script(script, "fstat", "closes", str(tmp_path / "trace"))
    assert "hangs; closing without it" in err


def test_call_that_ends_after_close_can_still_write_its_buffers() -> None:
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
    run_script(script, "load", "closes")


def test_stack_closed_at_exit_writes_its_queue_and_closes_its_tiers(tmp_path: Path) -> None:
    script = """
import atexit

class RecordingDisk(DiskTier):
    closed = False

    def close(self):
        super().close()
        self.closed = True

tier = RecordingDisk(block_nbytes=PAGE, path=sys.argv[3], capacity=1 << 20)
bad = FaultyTier()
bad.close = hang
stack = Stack(front, [lower(tier, "disk"), lower(bad, "bad")], profile="test")
put(keys_of("a", 4))

@atexit.register
def last():
    stack.close(flush_s=30)
    disk = stack.stats().lower[0]
    print("stored", disk.stored_blocks, tier.closed)
"""
    out, err = run_script(script, "close", "just exits", str(tmp_path))
    assert out == "stored 4 True\n"
    assert "tier bad: close hangs" in err
