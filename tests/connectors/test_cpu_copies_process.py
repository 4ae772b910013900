"""CPU copies in a process: the CPUs of their threads, and an environment without numba."""

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
os.sched_setaffinity(0, {first})  # before numpy, because its threads inherit it

def wait_on_second():
    os.sched_setaffinity(0, {second})
    waiting.set()
    threading.Event().wait()

waiting = threading.Event()
other = threading.Thread(target=wait_on_second, daemon=True)
other.start()
waiting.wait()

import numpy as np
from kvcache.connectors.transfer import cpu
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.layout.placement import BlockRun

cpu.MIN_SHARED_NBYTES = 0
memory = np.zeros(2, dtype=np.uint8)
address = memory.ctypes.data
geometry = CopyGeometry(
    [BlockRun(address, 1, 1, 1)], slab_address=address + 1, slots=1, slot_nbytes=1
)
both = threading.Barrier(2)  # passed when the pool's thread has run its initializer
copier = cpu.CpuCopier(geometry, threads=2, copy_share=lambda *_: both.wait())
copier.gather([0], [0])
(worker,) = [t for t in threading.enumerate() if t.name.startswith("kvcache-pages")]
assert os.sched_getaffinity(worker.native_id) == {first, second}
assert os.sched_getaffinity(0) == {first}
copier.close()
"""


COMPILED = """
import os, threading
import numpy as np
from numba.core import event
from kvcache.connectors.transfer import cpu
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.layout.placement import BlockRun

main = threading.get_ident()
compiled_in = []  # threads

class Listener(event.Listener):
    def on_start(self, event):
        compiled_in.append(threading.get_ident())

    def on_end(self, event):
        pass

event.register("numba:compile", Listener())
memory = np.arange(2, dtype=np.uint8)
address = memory.ctypes.data
geometry = CopyGeometry(
    [BlockRun(address, 1, 1, 1)], slab_address=address + 1, slots=1, slot_nbytes=1
)
cpu.compile_in_background()
child = os.fork()  # while it is compiled
copier = cpu.CpuCopier(geometry)
copier.gather([0], [0])
copier.scatter([0], [0])
assert memory.tolist() == [0, 0]
copier.close()
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert compiled_in
assert main not in compiled_in
"""


def test_first_copy_compiles_nothing_in_its_thread_also_in_a_forked_child() -> None:
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", "-P", "-c", COMPILED]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=300)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_copy_threads_may_use_all_cpus_of_the_process() -> None:
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-P", "-c", AFFINITY], env=os.environ | {"PYTHONPATH": path}, check=True
    )


def test_import_without_numba_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    spec = importlib.util.spec_from_file_location("pages_without_numba", cpu.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'kvcache\[torch\]', or 'kvcache\[vllm\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
