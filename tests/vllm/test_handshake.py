"""The handshake at start: the slot that a block has, and what engines must share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache import Stack
from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.connectors.vllm.messages import Rank, Shard
from kvcache.connectors.vllm.scheduler.handshake import open_sharded_stack
from kvcache.connectors.vllm.worker.early_attach import EarlyAttach
from kvcache.keys import namespace
from kvcache.resume import Needs
from kvcache.sizes import Size
from kvcache.tiers.dram import DramTier
from tests.support.reordering_device import ReorderingDevice

pytestmark = pytest.mark.engine

PAGE = 4096
IDENTITY = {"model": "a", "dtype": "bfloat16"}
ONE_GROUP = (KeptGroup(0, (0,), Needs("all"), 32, 1),)
TWO_GROUPS = (*ONE_GROUP, KeptGroup(1, (1, 2), Needs("window", 64), 32, 1))


class Handshake:
    """Opens stacks of 10 slots, and keeps the arguments of the last one."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.wait_pinned = False
        self.stacks: list[Stack] = []

    def open(
        self, groups: Sequence[KeptGroup], nbytes: Sequence[int], *, ranks: int = 1, **shard: Any
    ) -> Any:
        """Return the stack, the slab with its pieces, and the parts."""
        shards: dict[Rank, Shard] = {
            (0, rank): Shard(tuple(nbytes), host_name(), f"form {rank}" if ranks > 1 else "form")
            for rank in range(ranks)
        }
        if shard:
            shards = {rank: Shard(tuple(nbytes), host_name(), "form", **shard) for rank in shards}
        return self.open_shards(groups, shards)

    def open_shards(self, groups: Sequence[KeptGroup], shards: dict[Rank, Shard]) -> Any:
        """Return the stack, the slab with its pieces, and the parts."""
        parallel: Any = SimpleNamespace(
            world_size=len(shards), data_parallel_size=1, data_parallel_size_local=1
        )
        return open_sharded_stack(
            self._open_stack, shards, parallel, groups, identity=IDENTITY, model="served"
        )

    def _open_stack(self, *, block_nbytes: int, **options: Any) -> Stack:
        self.opened = {"block_nbytes": block_nbytes, **options}
        tier = DramTier(
            block_nbytes=block_nbytes,
            capacity=Size(10 * block_nbytes),
            wait_pinned=self.wait_pinned,
        )
        self.stacks.append(Stack(tier, profile="test"))
        return self.stacks[-1]


@pytest.fixture
def handshake() -> Iterator[Handshake]:
    made = Handshake()
    yield made
    for stack in made.stacks:
        stack.close()


def test_open_sharded_stack_of_one_group_has_a_slot_for_each_block(handshake: Handshake) -> None:
    _, memory, parts = handshake.open(ONE_GROUP, [PAGE], ranks=2)
    assert (parts, len(memory.pieces), handshake.opened["block_nbytes"]) == ((1,), 1, 2 * PAGE)
    fields = {**IDENTITY, "rank (0, 0)": "form 0", "rank (0, 1)": "form 1"}
    assert handshake.opened["namespace"] == namespace(fields)  # as before there were several groups


def test_open_sharded_stack_of_several_groups_names_their_parts(handshake: Handshake) -> None:
    _, memory, parts = handshake.open(TWO_GROUPS, [PAGE, 2 * PAGE, 3 * PAGE])
    assert (parts, handshake.opened["block_nbytes"]) == ((1, 5), PAGE)
    assert {piece.member for piece in memory.pieces if piece.group == 1} == {1, 2}
    first = handshake.opened["namespace"]
    handshake.open(TWO_GROUPS, [PAGE, PAGE, 2 * PAGE])
    assert handshake.opened["namespace"] != first


def test_open_sharded_stack_of_replicas_has_a_namespace_of_its_own(handshake: Handshake) -> None:
    handshake.open(ONE_GROUP, [PAGE], ranks=2, replicas=(1,))
    assert handshake.opened["block_nbytes"] == 2 * PAGE
    apart = handshake.opened["namespace"]
    handshake.open(ONE_GROUP, [PAGE], ranks=2, replicas=(2,))
    assert handshake.opened["block_nbytes"] == PAGE
    assert handshake.opened["namespace"] != apart


def test_open_sharded_stack_logs_what_l1_holds_of_each_group(
    handshake: Handshake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    handshake.open(TWO_GROUPS, [PAGE, 2 * PAGE, 3 * PAGE])
    assert "10 slots of 4096 bytes" in caplog.text
    assert "window 64: 20480 bytes for 32 tokens in 5 slots" in caplog.text


def test_open_sharded_stack_has_the_nodes_of_all_ranks(handshake: Handshake) -> None:
    handshake.open(ONE_GROUP, [PAGE], ranks=2)
    assert handshake.opened["nodes"] == []
    shards = {(0, n): Shard((PAGE,), host_name(), "form", nodes=(2 - n, 3)) for n in range(2)}
    handshake.open_shards(ONE_GROUP, shards)
    assert handshake.opened["nodes"] == [1, 2, 3]


def test_open_sharded_stack_with_wait_pinned_returns_when_the_worker_has_l1(
    handshake: Handshake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device = ReorderingDevice(Random(0))
    worker = EarlyAttach(device)
    handshake.wait_pinned = True
    stack, memory, _ = handshake.open(ONE_GROUP, [PAGE], pipes=worker.pipes)
    assert sum(device.pinned.values()) == memory.slab.slots * memory.slab.slot_nbytes
    assert stack.front.stats().populated_blocks == 10
    assert "1 of 1 ranks have attached all of L1" in caplog.text
    worker.close()


def test_open_sharded_stack_with_wait_pinned_and_a_dead_worker_returns(
    handshake: Handshake, caplog: pytest.LogCaptureFixture
) -> None:
    worker = EarlyAttach(None)
    worker.close()
    handshake.wait_pinned = True
    handshake.open(ONE_GROUP, [PAGE], pipes=worker.pipes)
    assert "cannot be reached" in caplog.text
