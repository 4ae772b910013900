"""MooncakeTier in processes of their own: what would freeze, crash or quieten a whole engine."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import mooncake_pool
from tests.support.mooncake_pool import Pool

pytest.importorskip("kvcache.tiers.mooncake")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120  # ends the test of broken code
LIBRARY_TIMEOUT_S = 30  # Mooncake's default for an answer of a master or of a host

PRELUDE = """
import os, signal, sys, threading, time
from kvcache.testing import block_of, keys_of
from kvcache.tiers.mooncake import MooncakeTier
KEYS = keys_of("process", 4)

def store(tier):
    return tier.store(KEYS, [memoryview(block_of(key, 4096)) for key in KEYS])

def load(tier):
    into = [bytearray(4096) for _ in KEYS]
    lengths = tier.load(KEYS, [memoryview(each) for each in into])
    return lengths == [4096] * 4 and into == [block_of(key, 4096) for key in KEYS]
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with mooncake_pool.pool(tmp_path) as pool:
        yield pool


def start(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start a program that uses a tier, without the variables of this process's library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip


@contextmanager
def started(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program, as ``start`` does; kill it at the end."""
    program = start(code, *arguments)
    try:
        yield program
    finally:
        program.kill()
        program.communicate()


def output_of(code: str, *arguments: str, **variables: str) -> list[str]:
    """Run a program; return its lines."""
    program = start(code, *arguments, **variables)
    try:
        output, _ = program.communicate(timeout=PATIENCE_S)
    finally:
        program.kill()
    assert program.returncode == 0, f"exit code {program.returncode}"
    return output.splitlines()


def line_of(program: subprocess.Popen[str]) -> str:
    """Return the next line. Fails after less time than the library waits without our settings."""
    output = program.stdout
    assert output is not None
    assert select.select([output], [], [], LIBRARY_TIMEOUT_S - 5)[0], "the program hangs"
    return output.readline().strip()


def go_on(program: subprocess.Popen[str]) -> None:
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()


TIMEOUTS = """
tier = MooncakeTier(master=sys.argv[1], timeout_s=1.0)
assert all(store(tier))
print("open", flush=True)
sys.stdin.readline()
for call in (lambda: tier.contains(KEYS), lambda: load(tier), lambda: store(tier),
             lambda: tier.remove(KEYS)):
    try:
        call()
    except ConnectionError as error:
        print(error, flush=True)
sys.stdin.readline()
assert load(tier)
print("back", flush=True)
"""


def test_calls_of_a_hanging_master_end_within_the_timeout(pool: Pool) -> None:
    with started(TIMEOUTS, pool.master.address) as program:
        assert line_of(program) == "open"
        with pool.master.stopped():
            go_on(program)
            first, *others = [line_of(program) for _ in range(4)]  # the master still hangs
            assert first == "batch_is_exist returned -901: no answer in time"
            assert others == [f"mooncake at {pool.master.address}: timed out"] * 3
        go_on(program)
        assert line_of(program) == "back"
        assert program.wait(PATIENCE_S) == 0


HELD = """
tier = MooncakeTier(master=sys.argv[1], timeout_s=1.0)
assert all(store(tier))
print("open", flush=True)
sys.stdin.readline()
try:
    load(tier)
except ConnectionError as error:
    print(error, flush=True)
"""


def test_load_from_a_hanging_holder_ends_while_it_hangs(pool: Pool) -> None:
    with started(HELD, pool.master.address) as program:
        assert line_of(program) == "open"
        with pool.holders[0].stopped():
            go_on(program)
            assert line_of(program) == "batch_get_into returned -800: the transfer failed"
        assert program.wait(PATIENCE_S) == 0


LATE = """
tier = MooncakeTier(master=sys.argv[1], timeout_s=0.5)
try:
    tier.contains(KEYS)
except ConnectionError:
    print("failing", flush=True)
sys.stdin.readline()
until = time.monotonic() + 60
while time.monotonic() < until:
    try:
        assert all(store(tier)) and load(tier)
    except ConnectionError:
        time.sleep(0.1)
    else:
        print("recovered", flush=True)
        break
"""


def test_tier_that_starts_while_the_master_hangs_fails_and_recovers(pool: Pool) -> None:
    with ExitStack() as programs:
        with pool.master.stopped():
            program = programs.enter_context(started(LATE, pool.master.address))
            assert line_of(program) == "failing"
        go_on(program)
        assert line_of(program) == "recovered"
        assert program.wait(PATIENCE_S) == 0


CLOSE = """
tier = MooncakeTier(master=sys.argv[1], timeout_s=30.0)
assert all(store(tier))
ended = []
begun = threading.Semaphore(0)
def work():
    begun.release()
    try:
        while True:
            assert load(tier)
            assert tier.contains(KEYS) == [True] * 4
    except ConnectionError as error:
        ended.append(str(error))
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
    begun.acquire()
tier.close()
tier.close()
for thread in threads:
    thread.join()
assert len(ended) == 4 and all("closed" in text for text in ended), ended
for call in (lambda: tier.contains(KEYS), lambda: load(tier), lambda: store(tier),
             lambda: tier.remove(KEYS), lambda: tier.allocate(4096)):
    try:
        call()
    except ConnectionError:
        print("refused")
"""


def test_calls_during_and_after_close_do_not_crash_the_process(pool: Pool) -> None:
    assert output_of(CLOSE, pool.master.address) == ["refused"] * 5


EXIT = """
tier = MooncakeTier(master=sys.argv[1], timeout_s=30.0)
assert all(store(tier))
begun = threading.Semaphore(0)
def work():
    begun.release()
    try:
        while True:
            load(tier)
    except ConnectionError:
        pass
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
    begun.acquire()
if sys.argv[2] == "closed":
    tier.close()
print("exits", flush=True)
"""


@pytest.mark.parametrize("tier", ["open", "closed"])
def test_exit_during_calls_does_not_abort_the_process(pool: Pool, tier: str) -> None:
    assert output_of(EXIT, pool.master.address, tier) == ["exits"]


SIGNALS = """
signal.signal(signal.SIGTERM, lambda *_: print("terminated", flush=True))
tier = MooncakeTier(master=sys.argv[1], timeout_s=30.0)
assert all(store(tier))
os.kill(os.getpid(), signal.SIGTERM)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
tier.close()
"""


def test_signals_reach_the_engine_while_a_client_is_open(pool: Pool) -> None:
    assert output_of(SIGNALS, pool.master.address) == ["terminated", "interrupted"]


FORK = """
tier = MooncakeTier(master=sys.argv[1], timeout_s=30.0)
assert all(store(tier))
closing = tier.close
child = os.fork()
if child == 0:
    try:
        tier.contains(KEYS)
    except RuntimeError as error:
        print(type(error).__name__, flush=True)
    closing()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert load(tier)
print("parent", flush=True)
"""


def test_forked_child_is_refused_and_ends(pool: Pool) -> None:
    assert output_of(FORK, pool.master.address) == ["ForkedError", "parent"]


SETTINGS = """
try:
    MooncakeTier(master="127.0.0.1:1", timeout_s=float(sys.argv[2]))
except ImportError as error:
    print(error)
print(sys.modules["mooncake.store"].AT_IMPORT if "mooncake.store" in sys.modules else "")
"""
NAMES = ("MC_RPC_TIMEOUT_MS", "MC_RPC_CONNECT_TIMEOUT_MS", "MC_TCP_STATUS_TIMEOUT_SEC")
STAND_IN = f"""
import os
AT_IMPORT = " ".join(os.environ.get(name, "none") for name in {NAMES})
class MooncakeDistributedStore: pass
"""


def stand_in(tmp_path: Path, text: str) -> str:
    """Write a package ``mooncake`` that is found first; return the PYTHONPATH for it."""
    package = tmp_path / "stand-in" / "mooncake"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "store.py").write_text(text)
    return f"{package.parent}:{ROOT}"


def test_settings_are_made_before_the_import(tmp_path: Path) -> None:
    path = stand_in(tmp_path, STAND_IN)
    assert output_of(SETTINGS, "", "1.5", PYTHONPATH=path) == ["1500 1500 2"]


def test_settings_of_the_user_stay_and_are_logged(tmp_path: Path) -> None:
    path = stand_in(tmp_path, STAND_IN)
    code = "import logging; logging.basicConfig(stream=sys.stdout, format='%(message)s')" + SETTINGS
    warning, _, settings = output_of(code, "", "1.5", PYTHONPATH=path, MC_RPC_TIMEOUT_MS="700")
    assert "timeout_s has no effect (MC_RPC_TIMEOUT_MS is 700 already)" in warning
    assert settings == "700 1500 2"


def test_library_for_cuda_on_a_machine_without_it_names_the_other_build(tmp_path: Path) -> None:
    path = stand_in(tmp_path, "raise ImportError('libcuda.so.1: cannot open')")
    [text, _] = output_of(SETTINGS, "", "1.5", PYTHONPATH=path)
    assert text == (
        "this build of mooncake needs CUDA; without it: pip uninstall mooncake-transfer-engine, "
        "pip install mooncake-transfer-engine-non-cuda (libcuda.so.1: cannot open)"
    )


def test_library_that_lacks_a_library_of_the_system_names_the_packages(tmp_path: Path) -> None:
    path = stand_in(tmp_path, "raise ImportError('libnuma.so.1: cannot open')")
    [text, _] = output_of(SETTINGS, "", "1.5", PYTHONPATH=path)
    assert text == (
        "mooncake lacks a library of the system; apt-get install libibverbs1 libnuma1 libcurl4 "
        "(libnuma.so.1: cannot open)"
    )
