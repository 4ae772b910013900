"""Compares the Redis tier with LMCache's Redis connectors on one server, by medians of pairs.

``KVCACHE_BENCH_LMCACHE_PYTHON`` names a Python with the released package ``lmcache``. It runs
tests/support/lmcache_process.py, which documents the measured calls. kvcache runs as for a user:
frames, which verify each loaded block, on a tier that is called as the stack calls it. The
``redis://`` connector is written in Python. ``resp://`` is written in C++ and does less than
either: it stores the bytes alone and verifies nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache.tiers.framed import Framed
from kvcache.tiers.redis import RedisTier
from tests.bench.test_redis import CONNECTIONS, REDIS, Calls
from tests.support import redis_servers

VARIABLE = "KVCACHE_BENCH_LMCACHE_PYTHON"
PYTHON = os.environ.get(VARIABLE)
DIRECTIONS = ("store", "look", "load")
# LMCache 0.5.6 may wait for ever: it registers a request after sending it, and loses a response
# that arrives before that (batch_exists_sync in native_clients/connector_client_base.py).
LEFT_OUT = {("look", "resp://")}
TOTAL = 64 << 20  # bytes per measurement; short ones are disturbed less by other processes
ROUNDS = 21
pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not REDIS, reason="no redis-server here"),
    pytest.mark.skipif(not PYTHON, reason=f"{VARIABLE} names no Python that has lmcache"),
]


class LMCacheProcess:
    """The process of LMCache: it answers each line with a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or "null")
        assert answer, "the process of LMCache has ended; see its stderr"
        return answer

    def ask(self, way: str) -> tuple[float, float]:
        """Return the seconds of a call, and its CPU seconds."""
        assert self._process.stdin is not None
        print(way, file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["seconds"], answer["cpu_seconds"]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    begun, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - cpu


@contextmanager
def lmcache(url: str, nbytes: int) -> Iterator[LMCacheProcess]:
    script = Path(__file__).parents[1] / "support" / "lmcache_process.py"
    command = [PYTHON or "", str(script), url, str(nbytes), str(TOTAL // nbytes)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield LMCacheProcess(process)
        finally:
            process.kill()


@pytest.mark.parametrize("nbytes", [1 << 20, 2 << 20])
def test_tier_is_no_slower_than_the_python_connector_of_lmcache(
    tmp_path: Path, nbytes: int
) -> None:
    memory = memoryview(mmap.mmap(-1, TOTAL))
    memory[:] = os.urandom(1 << 20) * (TOTAL >> 20)
    views = [memory[at : at + nbytes] for at in range(0, TOTAL, nbytes)]
    spent: dict[str, list[tuple[float, float]]] = {}  # seconds, and CPU seconds of the client

    with (
        redis_servers.server(tmp_path / "redis", binary=Path(REDIS or "")) as server,
        ThreadPoolExecutor(CONNECTIONS) as pool,
        closing(RedisTier(url=server.url, connections=CONNECTIONS, timeout_s=30)) as inner,
        lmcache(server.url, nbytes) as plain,
        lmcache(f"resp://127.0.0.1:{server.port}", nbytes) as native,
    ):
        client = server.client()
        framed = Framed(inner, block_nbytes=nbytes)
        calls = Calls(framed, pool, views)

        def look() -> None:
            assert all(framed.contains(calls.keys))

        verbs = {"store": calls.store, "look": look, "load": calls.load}
        sides: dict[str, Callable[[str], tuple[float, float]]] = {
            "kvcache": lambda way: seconds(verbs[way]),
            "redis://": plain.ask,
            "resp://": native.ask,
        }
        for turn in range(ROUNDS):
            for name, ask in [*sides.items()][:: 1 if turn % 2 else -1]:
                client.flushall()
                for way in DIRECTIONS:
                    if (way, name) in LEFT_OUT:
                        continue
                    spent.setdefault(f"{way} {name}", []).append(ask(way))
                if not turn and name != "kvcache":
                    ask("check")
        versions = ", ".join(f"{name} {number}" for name, number in plain.versions.items())
        print(f"\n{nbytes >> 20} MiB; redis {client.info()['redis_version']}; LMCache: {versions}")

    def ratio(way: str, name: str) -> float:
        pairs = zip(spent[f"{way} {name}"], spent[f"{way} kvcache"], strict=True)
        return median(theirs / ours for (theirs, _), (ours, _) in pairs)

    for what, both in spent.items():
        way, name = what.split()
        taken, cpu = (sorted(each) for each in zip(*both, strict=True))
        speed = "" if way == "look" else f" ({TOTAL / median(taken) / 1e9:.2f} GB/s)"
        print(
            f"{what:14} {median(taken) * 1e3:6.1f} ms{speed}, best {taken[0] * 1e3:6.1f}, "
            f"CPU {median(cpu) * 2**30 / TOTAL:.2f} s/GiB; kvcache {ratio(way, name):.2f} times"
        )
    assert ratio("store", "redis://") >= 1
    assert ratio("look", "redis://") >= 3
    assert ratio("load", "redis://") >= 1
