"""A server that a test starts does not outlive the test run."""

from __future__ import annotations

from pathlib import Path

from tests.support import child_programs
from tests.support.waiting import eventually

RUN = """
import sys, threading
from pathlib import Path
from tests.support.server_process import ServerProcess

server = ServerProcess(Path(sys.argv[1]))
program = "import time; print('serves', flush=True); time.sleep(600)"
thread = threading.Thread(target=server.launch, args=([sys.executable, "-c", program],))
thread.start()
thread.join()
print(server.pid, flush=True)
threading.Event().wait()
"""


def is_alive(pid: int) -> bool:
    """Whether a process has neither ended nor become a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_server_process_ends_when_the_run_is_killed(tmp_path: Path) -> None:
    """It outlives the thread that called ``launch``, and not the process."""
    log = tmp_path / "log"
    run = child_programs.start(RUN, str(log))
    try:
        pid = int(child_programs.read_line(run))
        eventually(lambda: log.read_text() == "serves\n", "the server runs")
        assert is_alive(pid)
    finally:
        child_programs.kill(run)
    eventually(lambda: not is_alive(pid), "the server ends")
