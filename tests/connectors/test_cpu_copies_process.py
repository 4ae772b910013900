"""Page copies and the process they are in: its cores, and what is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

from kvcache.connectors.transfer import cpu

AFFINITY = """
import os, threading
first, second, *_ = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {first})  # before numpy, whose threads inherit it

def elsewhere():
    os.sched_setaffinity(0, {second})
    there.set()
    threading.Event().wait()

there = threading.Event()
other = threading.Thread(target=elsewhere, daemon=True)
other.start()
there.wait()

import numpy as np
from kvcache.connectors.transfer import cpu
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.layout.placement import BlockRun

cpu.MIN_SHARED_NBYTES = 0
memory = np.zeros(2, dtype=np.uint8)
address = memory.ctypes.data
sides = CopyGeometry([BlockRun(address, 1, 1, 1)], slab_address=address + 1, slots=1, slot_nbytes=1)
copier = cpu.CpuCopier(sides, threads=2)
copier.gather([0], [0])
(worker,) = [t for t in threading.enumerate() if t.name.startswith("kvcache-pages")]
copier._pool.submit(int).result()  # it has run its initializer
assert os.sched_getaffinity(worker.native_id) == {first, second}
assert os.sched_getaffinity(0) == {first}
copier.close()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_may_run_wherever_the_process_may() -> None:
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-P", "-c", AFFINITY], env=os.environ | {"PYTHONPATH": path}, check=True
    )


def test_says_what_to_install_when_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    spec = importlib.util.spec_from_file_location("pages_without_numba", cpu.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'kvcache\[torch\]', or 'kvcache\[vllm\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
