"""Compares the object tier with obstore alone, boto3 and vLLM's own tier, by medians of pairs.

They take turns on the same S3 server, with as many requests at a time. All store objects that are
new to the server, and all load into memory of the test: that copy is part of every measurement.

boto3 and the package `nixl`, which vLLM's own tier needs, are measured if they are installed:

    pip install boto3
    pip install --no-deps nixl nixl-cu12
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import pytest

pytest.importorskip("obstore")

import obstore

from kvcache.tier import Tier
from kvcache.tiers.framed import Framed
from kvcache.tiers.object import ObjectTier
from tests.support import s3_server
from tests.support.paired_calls import PairedCalls

pytestmark = pytest.mark.bench

NBYTES = 2 << 20  # of a block
TOTAL = 64 << 20  # bytes of one measurement; a server with a busy disk stores slowly
CONNECTIONS = 16  # requests under way
CALLS = 4  # calls of the tier under way, as the profiles have them
ROUNDS = 9
LOADS = 3  # of each round: a load is short


class Blocks(NamedTuple):
    """The blocks that are stored, and memory to load them into."""

    stored: list[memoryview]
    loaded: list[memoryview]


class Candidate(Protocol):
    """Stores the blocks under names of its own, loads them, and deletes them."""

    def store(self) -> None: ...

    def load(self) -> None: ...

    def delete(self) -> None: ...


class TierCandidate:
    """A tier, called as the stack does: with many blocks in each of a few calls."""

    def __init__(self, tier: Tier, pool: ThreadPoolExecutor, blocks: Blocks) -> None:
        self._tier = tier
        self._pool = pool
        self._blocks = blocks
        self._keys = [os.urandom(64) for _ in blocks.stored]

    def _call(
        self,
        call: Callable[[Sequence[bytes], Sequence[memoryview]], object],
        views: Sequence[memoryview],
    ) -> None:
        share = len(views) // CALLS
        starts = range(0, len(views), share)
        keys_of_calls = [self._keys[at : at + share] for at in starts]
        views_of_calls = [views[at : at + share] for at in starts]
        list(self._pool.map(call, keys_of_calls, views_of_calls))

    def store(self) -> None:
        def store(keys: Sequence[bytes], views: Sequence[memoryview]) -> None:
            assert all(self._tier.store(keys, views))

        self._call(store, self._blocks.stored)

    def load(self) -> None:
        def load(keys: Sequence[bytes], views: Sequence[memoryview]) -> None:
            assert self._tier.load(keys, views) == [NBYTES] * len(keys)

        self._call(load, self._blocks.loaded)

    def delete(self) -> None:
        self._tier.remove(self._keys)


class ObstoreCandidate:
    """obstore alone, from as many threads as the tier has connections."""

    def __init__(self, store: Any, pool: ThreadPoolExecutor, blocks: Blocks) -> None:
        self._store = store
        self._pool = pool
        self._blocks = blocks
        self._names = [f"obstore/{os.urandom(16).hex()}" for _ in blocks.stored]

    def store(self) -> None:
        def put(name: str, view: memoryview) -> None:
            obstore.put(self._store, name, view, mode="create", use_multipart=False)

        list(self._pool.map(put, self._names, self._blocks.stored))

    def load(self) -> None:
        def get(name: str, view: memoryview) -> None:
            view[:] = memoryview(obstore.get(self._store, name).bytes())

        list(self._pool.map(get, self._names, self._blocks.loaded))

    def delete(self) -> None:
        list(self._pool.map(lambda name: obstore.delete(self._store, name), self._names))


class Boto3Candidate:
    """boto3, from as many threads."""

    def __init__(self, client: Any, pool: ThreadPoolExecutor, blocks: Blocks) -> None:
        self._client = client
        self._pool = pool
        self._blocks = blocks
        self._names = [f"boto3/{os.urandom(16).hex()}" for _ in blocks.stored]

    def store(self) -> None:
        def put(name: str, view: memoryview) -> None:
            self._client.put_object(
                Bucket=s3_server.BUCKET, Key=name, Body=bytes(view), IfNoneMatch="*"
            )

        list(self._pool.map(put, self._names, self._blocks.stored))

    def load(self) -> None:
        def get(name: str, view: memoryview) -> None:
            body = self._client.get_object(Bucket=s3_server.BUCKET, Key=name)["Body"]
            written = 0
            while count := body.readinto(view[written:]):
                written += count
            assert written == NBYTES

        list(self._pool.map(get, self._names, self._blocks.loaded))

    def delete(self) -> None:
        for name in self._names:
            self._client.delete_object(Bucket=s3_server.BUCKET, Key=name)


class VLLMCandidate:
    """vLLM's own secondary tier on objects, which transfers through NIXL.

    ``memory`` has the stored blocks, then the memory to load into.
    """

    def __init__(self, server: s3_server.Server, memory: memoryview) -> None:
        from vllm.v1.kv_offload.base import ReqContext
        from vllm.v1.kv_offload.tiering.obj.manager import ObjectStoreSecondaryTierManager

        login = s3_server.ADMIN
        self._tier = ObjectStoreSecondaryTierManager(
            OFFLOADING_SPEC,
            memory.cast("B", (2 * TOTAL // NBYTES, NBYTES)),
            "obj",
            store_config={
                "bucket": s3_server.BUCKET,
                "endpoint_override": server.endpoint,
                "access_key": login.access_key,
                "secret_key": login.secret_key,
                "region": "us-east-1",
            },
            prefix="vllm",
            io_threads=CONNECTIONS,
        )
        self._server = server
        self._context = ReqContext("bench")
        self._keys: list[Any] = []

    def renew(self) -> VLLMCandidate:
        """Take new keys, and return itself."""
        from vllm.v1.kv_offload.base import make_offload_key

        self._keys = [make_offload_key(os.urandom(32), 0) for _ in range(TOTAL // NBYTES)]
        return self

    def _transfer(self, submit: Callable[[Any], None], first_row: int) -> None:
        import numpy as np
        from vllm.v1.kv_offload.tiering.base import TransferJob

        rows = np.arange(first_row, first_row + len(self._keys), dtype=np.int32)
        submit(TransferJob(1, self._keys, rows, first_row > 0, self._context))
        while not (results := list(self._tier.get_finished_jobs())):
            time.sleep(0.001)
        assert [result.success for result in results] == [True]

    def store(self) -> None:
        self._transfer(self._tier.submit_store, 0)

    def load(self) -> None:
        self._transfer(self._tier.submit_load, TOTAL // NBYTES)

    def delete(self) -> None:
        for name in self._server.names("vllm"):
            self._server.delete(name)


OFFLOADING_SPEC = SimpleNamespace(
    config=SimpleNamespace(
        groups=[SimpleNamespace(tokens_per_block=16, layer_names=["layer"])],
        parallel=SimpleNamespace(
            tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True
        ),
        canonical_layout=False,
        kv_cache_layout=None,
        model=SimpleNamespace(name="model", dtype="bfloat16"),
        cache=SimpleNamespace(tokens_per_hash=16),
        replicated_layout=False,
    ),
    blocks_per_chunk=1,
    kv_events_config=None,
)  # fmt: skip
"""The part of vLLM's settings from which its tier names the objects."""


def boto3_client(server: s3_server.Server) -> Any | None:
    """Return a client of boto3, or None where it is not installed."""
    try:
        boto3: Any = import_module("boto3")
        config: Any = import_module("botocore.config")
    except ImportError:
        return None
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3_server.ADMIN.access_key,
        aws_secret_access_key=s3_server.ADMIN.secret_key,
        config=config.Config(
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Server]:
    with s3_server.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def test_tier_reaches_nine_tenths_of_obstore_for_at_most_1_2_times_its_cpu(
    server: s3_server.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.set_login(monkeypatch)
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")  # vLLM's tier asks for it after a transfer
    memory = memoryview(mmap.mmap(-1, 2 * TOTAL))
    source, target = memory[:TOTAL], memory[TOTAL:]
    source[:], target[:] = os.urandom(TOTAL), bytes(TOTAL)
    blocks = Blocks(
        *([each[at : at + NBYTES] for at in range(0, TOTAL, NBYTES)] for each in (source, target))
    )
    turns = random.Random(0)  # no candidate always follows the same other one
    measurements = PairedCalls("obstore", TOTAL)
    boto3 = boto3_client(server)
    inner = ObjectTier(**server.options("tier", connections=CONNECTIONS, timeout_s=60.0))
    with (
        closing(Framed(inner, block_nbytes=NBYTES)) as framed,
        ThreadPoolExecutor(CONNECTIONS) as pool,
        ThreadPoolExecutor(CALLS) as calls,
    ):
        candidates: dict[str, Callable[[], Candidate]] = {
            "obstore": lambda: ObstoreCandidate(server.store(), pool, blocks),
            "tier": lambda: TierCandidate(inner, calls, blocks),
            "framed": lambda: TierCandidate(framed, calls, blocks),
        }
        if boto3 is not None:
            candidates["boto3"] = lambda: Boto3Candidate(boto3, pool, blocks)
        if find_spec("nixl") and find_spec("vllm"):
            candidates["vLLM"] = VLLMCandidate(server, memory).renew
        names = list(candidates)
        for _ in range(ROUNDS):
            opened = {name: make() for name, make in candidates.items()}
            for name in turns.sample(names, len(names)):
                measurements.measure("store", name, opened[name].store)
            for _ in range(LOADS):
                for name in turns.sample(names, len(names)):
                    target[:] = bytes(TOTAL)
                    measurements.measure("load", name, opened[name].load)
                    assert target == source, name
            for candidate in opened.values():
                candidate.delete()

    for direction in ("store", "load"):
        print(f"\n{direction}, {NBYTES >> 20} MiB, {CONNECTIONS} requests at a time: ", end="")
        print(measurements.line(direction))
    for direction in ("store", "load"):
        assert measurements.rate_ratio(direction, "tier") >= 0.9, direction
        assert measurements.cpu_ratio(direction, "tier") <= 1.2, direction
