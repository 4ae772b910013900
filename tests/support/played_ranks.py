"""The ranks of a simulated model: real workers of the connector, over the words of `RankMemory`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Shard
from tests.support.model_runners import (
    Batch,
    Steps,
    first_runner_step,
    second_runner_step,
    unconnected_step,
)
from tests.support.played_memory import RankMemory, layer_name
from tests.support.played_models import PlayedModel
from tests.support.reordering_device import ReorderingDevice


@dataclass(frozen=True)
class Copying:
    """How the copies of all ranks run.

    Attributes:
        pace: of the device (`ReorderingDevice`); 0: the engine is on a CPU.
        failing: share of the loads that fail; half as many stores do.
        far: on a device, every load is async; if not, none is that may end within its step.
    """

    pace: int = 0
    failing: float = 0.0
    far: bool = False

    @property
    def is_async(self) -> bool:
        return self.pace > 0

    def open_device(self, random: Random) -> ReorderingDevice | None:
        """Return the device of all ranks; ``None`` for a CPU. Its copies are fast or slow."""
        if not self.is_async:
            return None
        return ReorderingDevice(random, pace=self.pace, shares=(1.0, 0.05, 0.01))


class FailingCopier:
    """A page copier of which some calls raise: a load may have written a part of its blocks."""

    def __init__(
        self,
        copier: Any,
        random: Random,
        failing: float,
        load_failed: Callable[[Collection[int]], None],
        store_failed: Callable[[Collection[int]], None],
    ) -> None:
        self._copier = copier
        self._random = random
        self._failing = failing
        self._load_failed = load_failed
        self._store_failed = store_failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copier, name)

    def scatter(self, slots: Sequence[int], blocks: Sequence[int], *rows: Any, **how: Any) -> Any:
        fails = self._random.random() < self._failing
        if fails and self._random.random() < 0.5:
            self._copier.scatter(slots, blocks, *rows, **how).wait()
        if fails:
            self._load_failed(blocks)
            raise OSError("a load that fails on purpose")
        return self._copier.scatter(slots, blocks, *rows, **how)

    def gather(self, blocks: Sequence[int], slots: Sequence[int], *rows: Any) -> Any:
        copy = self._copier.gather(blocks, slots, *rows)
        if self._random.random() < self._failing / 2:
            copy.wait()
            self._store_failed(slots)
            raise OSError("a store that fails on purpose")
        return copy


class PlayedRank:
    """A rank without a connector.

    Attributes:
        memory: its KV cache.
        errors: of the engine's work, which may run within a call of the connector.
    """

    connector: Any = None
    device: ReorderingDevice | None = None

    def __init__(self, memory: RankMemory) -> None:
        self.memory = memory
        self.errors: list[Exception] = []

    def step(self, output: Any, batch: Batch) -> Steps:
        """Return the steps of a rank (`model_runners`)."""
        return unconnected_step(output)

    def current(self) -> Any:
        """Return a context in which this rank is that of vLLM's process."""
        return nullcontext()

    def wait_for_layer(self, name: str) -> None:
        """Do what a layer's attention does before it reads its blocks."""

    def queue(self, work: Callable[[], object]) -> None:
        """Have the engine do work, after all that it has queued."""

        def safely() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001
                self.errors.append(error)

        if self.device is None:
            safely()
        else:
            self.device.engine_stream().queue.append(safely)

    def close(self) -> None:
        """End all copies."""


class ConnectedPlayedRank(PlayedRank):
    """A rank with a worker of the connector.

    Args:
        memory: its KV cache.
        model: that the engine runs.
        config: vLLM's.
        blocks: of the engine.
        device: of all ranks; ``None`` for the CPU.
        copying: how copies run.
        random: chooses which copies fail.
        slot: returns the bytes of a slot of L1.
        second_runner: whether vLLM's second model runner is played.
    """

    def __init__(
        self,
        memory: RankMemory,
        model: PlayedModel,
        config: Any,
        blocks: int,
        *,
        device: ReorderingDevice | None,
        copying: Copying,
        random: Random,
        slot: Callable[[int], Any],
        second_runner: bool,
    ) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

        from kvcache.connectors.vllm import KVCacheConnector

        super().__init__(memory)
        self.config = config
        self.device = device
        self.drafts = model.drafts > 0
        self.is_last = memory.rank[0] == model.pipeline - 1
        self._copying = copying
        self._random = random
        self._slot = slot
        # A failed load that is reported by its blocks is computed on before vLLM hears of it.
        self._computes_on_failed = len(model.groups) == 1 and model.groups[0].kind == "all"
        cache = worker_cache_config(model, memory, blocks)
        stage, tensor = (SimpleNamespace(rank_in_group=rank) for rank in memory.rank)
        with (
            mock.patch("vllm.distributed.parallel_state.get_pp_group", return_value=stage),
            mock.patch("vllm.distributed.parallel_state.get_tp_group", return_value=tensor),
        ):
            self.connector = KVCacheConnector(config, KVConnectorRole.WORKER, cache)
        self.connector.worker_side.device = device
        self.active: Any = None
        with self.current():
            if second_runner:
                self.active = ActiveKVConnector(config, memory.caches())
            else:
                self.connector.register_kv_caches(memory.caches())

    def shard(self) -> Shard:
        """Return what the worker sends in vLLM's handshake."""
        shard = self.connector.get_handshake_metadata()
        assert isinstance(shard, Shard), shard
        return shard

    def step(self, output: Any, batch: Batch) -> Steps:
        side = self.connector.worker_side
        if self._copying.failing and not isinstance(side.copier, FailingCopier | None):
            side.copier = FailingCopier(
                side.copier,
                self._random,
                self._copying.failing,
                self._spoil_blocks,
                self._spoil_slots,
            )
        play = second_runner_step if self.active is not None else first_runner_step
        return play(self, output, batch)

    @contextmanager
    def current(self) -> Iterator[None]:
        from vllm.distributed.kv_transfer import kv_transfer_state

        with mock.patch.object(kv_transfer_state, "_KV_CONNECTOR_AGENT", self.connector):
            yield

    def wait_for_layer(self, name: str) -> None:
        self.connector.wait_for_layer_load(name)

    def _spoil_blocks(self, blocks: Collection[int]) -> None:
        for block in set(blocks):
            self.queue(partial(self.memory.spoil, block, unsound=self._computes_on_failed))

    def _spoil_slots(self, slots: Collection[int]) -> None:
        for slot in set(slots):
            view = self._slot(slot)
            view[:] = b"\xee" * len(view)

    def close(self) -> None:
        self.connector.shutdown()


def worker_cache_config(model: PlayedModel, memory: RankMemory, blocks: int) -> Any:
    """Return vLLM's config of the KV cache in the process of one rank."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    groups = [
        KVCacheGroupSpec([layer_name(group.index, n) for n in memory.layers[group.index]], spec)
        for group, spec in zip(model.groups, model.specs(), strict=True)
    ]
    return KVCacheConfig(blocks, [], groups)
