"""LMCache's side of a comparison: a separate process, in an environment with ``lmcache`` and torch.

``lmcache_side.py URL BLOCK_NBYTES BLOCKS``

What is driven is LMCache's backend for remote storage with the connector that it makes for the URL,
through the calls that its storage manager makes: ``batched_submit_put_task`` with what lies in its
pool of memory, ``batched_contains``, and ``batched_get_blocking`` into that pool, each with all
blocks at once, which is how it is fastest. Nothing of it is replaced.

It says its versions in a line of JSON, then answers every line of its input with one:

* ``store``: puts all blocks under new keys, and waits until the last one is in the server,
* ``look``: asks whether they are there; fails if one is not,
* ``load``: gets them all; fails if one is missing,
* ``check``: as ``load``, and fails if a byte of them is wrong; the time means nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from threading import Semaphore, Thread
from typing import Any

os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ["LMCACHE_LOG_LEVEL"] = "ERROR"

import torch  # the environment above is read by imports
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

TOKENS, KV_HEADS, HEAD_DIM = 16, 8, 128  # of a block; its bytes say how many layers it has
LAYER_NBYTES = 2 * TOKENS * KV_HEADS * HEAD_DIM * 2


class Side:
    """LMCache's backend, and the blocks that it is to put.

    Args:
        url: ``redis://...`` or, for the connector in C++, ``resp://...``.
        block_nbytes: of an object: a multiple of 64 KiB.
        blocks: how many.
    """

    def __init__(self, url: str, block_nbytes: int, blocks: int) -> None:
        pool_nbytes = 2 * blocks * block_nbytes + (64 << 20)  # what is put, and what is got
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=TOKENS,
            local_cpu=True,
            max_local_cpu_size=pool_nbytes / 2**30,
            remote_url=url,
            remote_serde="naive",
            blocking_timeout_secs=60,
            save_unfull_chunk=False,
            extra_config={"save_chunk_meta": False} if url.startswith("resp:") else None,
        )
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(block_nbytes // LAYER_NBYTES, 2, TOKENS, KV_HEADS, HEAD_DIM),
            role="worker",
            chunk_size=TOKENS,
        )
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, daemon=True).start()
        memory = LocalCPUBackend(config, metadata, dst_device="cpu")
        self._backend = RemoteBackend(config, metadata, self._loop, memory, dst_device="cpu")
        if self._backend.connection is None:
            raise SystemExit(f"lmcache made no connection to {url}")
        self._objects: list[Any] = []
        for at in range(blocks):
            one = memory.allocate(metadata.get_shapes()[0], torch.bfloat16, MemoryFormat.KV_2LTD)
            assert one is not None
            assert len(one.byte_array) == block_nbytes
            bytes_of(one)[:] = os.urandom(1 << 16) * (block_nbytes >> 16)
            bytes_of(one)[:8] = at.to_bytes(8, "little")
            self._objects.append(one)
        self._keys: list[Any] = []

    def store(self) -> None:
        first = int.from_bytes(os.urandom(6), "little") << 16
        self._keys = [
            CacheEngineKey("bench", 1, 0, first + at, torch.bfloat16)
            for at in range(len(self._objects))
        ]
        done = Semaphore(0)
        self._backend.batched_submit_put_task(
            self._keys, self._objects, on_complete_callback=lambda _: done.release()
        )
        for _ in self._objects:
            done.acquire()

    def look(self) -> None:
        assert self._backend.batched_contains(self._keys) == len(self._keys), "a block is missing"

    def load(self) -> None:
        for got in self._got():
            got.ref_count_down()

    def check(self) -> None:
        for got, put in zip(self._got(), self._objects, strict=True):
            assert bytes_of(got) == bytes_of(put), "a wrong byte"
            got.ref_count_down()

    def _got(self) -> list[Any]:
        objects: list[Any] = self._backend.batched_get_blocking(self._keys)
        assert None not in objects, "a block is missing"
        return objects


def bytes_of(memory: Any) -> memoryview:
    """The bytes of one of LMCache's objects."""
    return memoryview(memory.byte_array).cast("B")


def versions() -> dict[str, str]:
    said = {}
    for package in ("lmcache", "redis", "hiredis", "torch"):
        try:
            said[package] = version(package)
        except PackageNotFoundError:
            said[package] = "none"
    return said


def main() -> None:
    url, *numbers = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    side = Side(url, *map(int, numbers))
    print(json.dumps(versions()), file=answers, flush=True)
    ways = {"store": side.store, "look": side.look, "load": side.load, "check": side.check}
    for line in sys.stdin:
        begun, cpu = time.perf_counter(), time.process_time()
        ways[line.strip()]()
        taken, cpu = time.perf_counter() - begun, time.process_time() - cpu
        print(json.dumps({"seconds": taken, "cpu_seconds": cpu}), file=answers, flush=True)
    os._exit(0)  # its threads would keep the process


if __name__ == "__main__":
    main()
