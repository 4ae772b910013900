"""An engine of vLLM's own scheduler and KV cache manager, with simulated workers.

The scheduler is vLLM's, or its async one, with its coordinator, block pool and cache managers over
several KV cache groups. The workers are simulated: they keep vLLM's order within a step, and write
words (`played_memory`) that are wrong if a block that a token attends to is wrong. So models run
that no CPU engine runs, and a wrong byte is seen in the step that reads or publishes it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.groups import kept_groups, may_load_within_step
from kvcache.connectors.vllm.messages import Piece, Shard, Step
from kvcache.connectors.vllm.scheduler.pieces import cut_blocks
from tests.support.played_memory import Prefixes, Rank, RankMemory, WrongKVError
from tests.support.played_models import LONGEST, PlayedModel
from tests.support.played_ranks import ConnectedPlayedRank, PlayedRank
from tests.support.played_runner import PlayedRunner
from tests.support.played_scheduler import Play, open_scheduler, runner_chosen

PAGE = 4096  # bytes; a slot is whole pages


class GroupsEngine:
    """An engine that runs `model`.

    Attributes:
        scheduler: vLLM's.
        side: the connector's scheduler side.
        prefixes: numbers of all token sequences; those of another engine if they share a tier.
        registry: by block hash of vLLM, the tokens up to the end of its block.
    """

    def __init__(
        self,
        model: PlayedModel,
        folder: Path,
        random: Random,
        play: Play,
        *,
        connected: bool = True,
        prefixes: Prefixes | None = None,
    ) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core import kv_cache_utils

        self.model, self.play, self.random = model, play, random
        self.scheduler = open_scheduler(model, play, folder, connected=connected)
        self.cache = self.scheduler.kv_cache_config
        self.hash_tokens = self.scheduler.hash_block_size
        kv_cache_utils.init_none_hash(sha256)
        self._hasher = kv_cache_utils.get_request_block_hasher(self.hash_tokens, sha256)
        self.prefixes = prefixes or Prefixes()
        self.registry: dict[bytes, list[int]] = {}
        self._reports: deque[tuple[Any, Callable[[], Any]]] = deque()
        self._hashed: dict[str, int] = {}
        self._pages: dict[tuple[int, bytes, int, Rank], bytes] = {}
        self._pieces: Sequence[Piece] = ()
        self.requests: dict[str, Any] = {}
        self.steps = self.loads = self.stores = 0
        ranks = [(p, t) for p in range(model.pipeline) for t in range(model.tensor)]
        blocks = self.cache.num_blocks
        self.memory = [RankMemory(model.groups, blocks, rank, model.pipeline) for rank in ranks]
        self.ranks: list[PlayedRank] = [PlayedRank(memory) for memory in self.memory]
        if connected:
            with runner_chosen(play):
                self._connect()
        self.runner = PlayedRunner(
            model,
            self.prefixes,
            self.ranks,
            random,
            lambda name: self.requests[name].all_token_ids,
            is_async=self.scheduler.scheduler_config.async_scheduling,
            second_runner=play.second_runner,
        )

    def _connect(self) -> None:
        connector, copying = self.scheduler.connector, self.play.copying
        self.side: Any = connector.scheduler_side
        device = copying.open_device(self.random)
        workers = [
            ConnectedPlayedRank(
                memory,
                self.model,
                self.scheduler.vllm_config,
                self.cache.num_blocks,
                device=device,
                copying=copying,
                random=self.random,
                slot=self._slot,
                second_runner=self.play.second_runner,
            )
            for memory in self.memory
        ]
        shards = {worker.memory.rank: worker.shard() for worker in workers}
        assert [*shards[0, 0].replicas] in ([], [group.replicas for group in self.model.groups])
        os.environ["KVCACHE__L1__CAPACITY"] = str(self._capacity(shards))
        connector.set_xfer_handshake_metadata_pp_aware(shards)
        is_far = copying.far or not may_load_within_step(self.kept)
        if copying.is_async:
            self.side.pending_loads.prefers_async = lambda blocks, others: is_far
        self.front = self.side.stack.front
        self.front.slab.wait_populated()
        self.ranks = [*workers]

    def _slot(self, slot: int) -> Any:
        return self.front.slab.view(slot)

    def _capacity(self, shards: dict[Rank, Shard]) -> int:
        """Return the bytes of an L1 that holds `slots` times the blocks of the longest request."""
        self.kept = kept_groups(self.cache, self.hash_tokens)
        cut = cut_blocks(shards, self.kept)
        self.parts = cut.parts
        parts = sum(
            parts * (-(-LONGEST // group.block_tokens))
            for parts, group in zip(cut.parts, self.kept, strict=True)
        )
        return int(parts * self.play.slots) * -(-cut.slot_nbytes // PAGE) * PAGE

    # Events

    def ask(self, name: str, tokens: list[int], answer: int, *, session: bool = False) -> Any:
        """Add a request, or the next part of a `session`, which keeps its blocks until then."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
        sampling.update_from_generation_config({}, None)
        request = Request(
            name, list(tokens), sampling, None, block_hasher=self._hasher, resumable=session
        )
        request = self.requests.setdefault(name, request)
        self.scheduler.add_request(request)
        self.register()
        return request

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions that wait for their next part."""
        requests = self.scheduler.requests.values()
        return [r.request_id for r in requests if r.status.name == "WAITING_FOR_STREAMING_REQ"]

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def reset(self, *, preempts: bool) -> None:
        """Reset both caches, as after a change of the weights.

        Unless it `preempts` running requests, they go on with blocks from before.
        """
        try:
            self.scheduler.reset_prefix_cache(reset_running_requests=preempts, reset_connector=True)
        except RuntimeError:  # a request waits for its load
            self.scheduler.reset_prefix_cache(reset_connector=True)
        assert self.front.stats().used_blocks == 0
        self.prefixes.version += 1
        manager = self.scheduler.kv_cache_manager
        starts_again = self.scheduler.failed_recving_kv_req_ids
        self.runner.reset(
            {
                name: {*chain(*manager.get_block_ids(name))} - {0}
                for name in self.scheduler.requests
                if name not in starts_again
            },
            [
                name
                for name, request in self.scheduler.requests.items()
                if request.status.name == "WAITING_FOR_REMOTE_KVS"
            ],
        )

    def lose_own_cache(self) -> None:
        """Have vLLM's own cache lose all blocks that no request has, as if others had filled it."""
        pool = self.scheduler.kv_cache_manager.block_pool
        pool.evict_blocks({block.block_id for block in pool.blocks if not block.ref_cnt})

    def step(self) -> None:
        """Build and run a step, and report one if enough are built."""
        output = self.scheduler.schedule()
        self.steps += 1
        if self.is_connected:
            step: Step = output.kv_connector_metadata
            self._pieces = step.memory.pieces
            self.loads += len(step.loads)
            self.stores += len(step.stores)
        self._reports.append((output, self.runner.run(output)))
        while len(self._reports) > self.play.ahead:
            self.report()
        self._raise_errors()

    def report(self) -> None:
        """Report the first step that is not reported yet."""
        from vllm.v1.outputs import DraftTokenIds

        output, get_output = self._reports.popleft()
        result = get_output()
        failed = getattr(result.kv_connector_output, "failed_recving", ())  # from vLLM 0.30 on
        self.runner.start_again(failed)
        self.scheduler.update_from_output(output, result)
        if self.model.drafts and not self.scheduler.scheduler_config.async_scheduling:
            drafts = self.runner.drafts(result.req_ids)
            self.scheduler.update_draft_token_ids(
                DraftTokenIds(list(drafts), list(drafts.values()))
            )
        self.register()

    def drain(self) -> None:
        """Step until no request and no copy is left."""
        idle = 0
        while self.scheduler.has_requests() or self._reports:
            before = self._progress()
            self.step()
            if not self.scheduler.has_requests():
                while self._reports:
                    self.report()
            waits = self.is_connected and self.side.table_sizes()["prefetches"]
            stands = self._progress() == before and not waits
            if stands and self.ranks[0].device is not None:
                self.ranks[0].device.work(20)  # an engine that waits for copies is slow to step
            idle = idle + 1 if stands else 0
            assert idle < 200, "the engine makes no progress"

    def _progress(self) -> object:
        return [
            (r.request_id, r.num_computed_tokens, r.num_tokens)
            for r in self.scheduler.requests.values()
        ]

    # Checks

    def register(self) -> None:
        """Note the tokens of all block hashes."""
        for name, request in self.requests.items():
            hashes = request.block_hashes
            known = 0 if request.resumable else self._hashed.get(name, 0)
            for at in range(known, len(hashes)):
                tokens = list(request.all_token_ids[: (at + 1) * self.hash_tokens])
                self.registry.setdefault(bytes(hashes[at]), tokens)
            self._hashed[name] = len(hashes)

    def check_l1(self) -> int:
        """Compare every block in L1 with what its key promises; return how many there are."""
        keys = [
            (key, group, part, digest)
            for group, parts in zip(self.kept, self.parts, strict=True)
            for digest, tokens in self.registry.items()
            if len(tokens) % group.block_tokens == 0
            for part in range(parts)
            for key in [digest + bytes((group.index, part)) if group.index or part else digest]
        ]
        held = self.front.contains([key for key, *_ in keys])
        for (key, group, part, digest), there in zip(keys, held, strict=True):
            if not there:
                continue
            with self.front.pin([key]) as lease:
                for slot in lease.slots:
                    self._check_slot(slot, group.index, part, digest)
        return sum(held)

    def _check_slot(self, slot: int, group: int, part: int, digest: bytes) -> None:
        view = self.front.slab.view(slot)
        for number, piece in enumerate(self._pieces):
            if (piece.group, piece.part) != (group, part):
                continue
            for memory in self.memory:
                if (place := piece.ranks.get(memory.rank)) is None:
                    continue
                right = self._expected(digest, piece.member, memory)[place.begin : place.end]
                found = bytes(view[place.offset : place.offset + len(right)])
                if found != right:
                    raise WrongKVError(
                        f"L1 holds wrong bytes of rank {memory.rank}: kept group {group}, "
                        f"part {part}, piece {number}, end {len(self.registry[digest])}"
                    )

    def _expected(self, digest: bytes, member: int, memory: RankMemory) -> bytes:
        """Return the bytes of the block of a group that ends with these tokens."""
        at = (self.prefixes.version, digest, member, memory.rank)
        if at not in self._pages:
            numbers: list[int] = []
            self.prefixes.extend(numbers, self.registry[digest])
            group = self.model.groups[member]
            of_block = np.array(numbers[-group.prefixes :], dtype=np.int64)
            words = memory.words_of(group, of_block)
            self._pages[at] = words.tobytes()
        return self._pages[at]

    def end(self) -> None:
        """Abort all requests, and check that nothing is left."""
        for name in list(self.scheduler.requests):
            self.abort(name)
        self.drain()
        assert self.side.stack.flush(60.0)
        self.check_l1()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.cache.num_blocks - 1
        assert not self.side.requests, self.side.requests
        sizes = self.side.table_sizes()
        assert sizes["jobs"] == sizes["unsent_loads"] == 0, sizes
        assert self.front.stats().pinned_slots == 0

    @property
    def is_connected(self) -> bool:
        return self.ranks[0].connector is not None

    def _raise_errors(self) -> None:
        for rank in self.ranks:
            for error in rank.errors:
                raise error

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.scheduler.shutdown()
