"""SGLang's calls: the lower tiers of a profile as the storage (L3) of HiCache.

SGLang owns the GPU's cache (L1) and a pool of host memory (L2). Its threads call this backend with
batches of pages of that pool: one thread asks, one reads and one writes. ``DirectTiers`` reads and
fills the pool in place.

Invariants:

1. A page is held, loaded or stored if all of its parts are. SGLang ignores the pages after the
   first one that fails, so a failed page never reaches the GPU.
2. Pages that are equal on all ranks (MLA) have one name, and one rank writes them. The name of any
   other page has the rank in it.
3. No call raises for a tier's failure, and a tier that hangs delays a call by its deadline at most.
   When a call has returned, no tier touches the host pool.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from opentelemetry.context import Context
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from kvcache import telemetry
from kvcache.connectors.sglang.host_pages import HostPages, is_replicated
from kvcache.connectors.sglang.identity import server_token
from kvcache.connectors.sglang.opening import open_for_rank
from kvcache.connectors.sglang.options import read_options
from kvcache.connectors.sglang.prefix_hits import count_leading, restorable_prefixes
from kvcache.connectors.sglang.ranks import place_of
from kvcache.connectors.sglang.weight_updates import WeightUpdates, updates
from kvcache.keys import Branch
from kvcache.lower.direct import DirectTiers

log = logging.getLogger(__name__)

KV: Final = "kv"
_SAMPLES: Final = 1024  # of each of SGLang's storage metrics, until SGLang takes them

_clears: Counter[object] = Counter()  # of this process, by namespace and rank
_clears_lock = threading.Lock()


class PageBatch(NamedTuple):
    """Pages of one host pool that one call transfers.

    Attributes:
        pool: SGLang's name of the pool.
        keys: SGLang's hashes of the pages.
        host_indices: the pool's tokens in which the pages lie.
        is_trailing: whether the pool has only the last pages of a prefix.
    """

    pool: Any
    keys: Sequence[str]
    host_indices: Any
    is_trailing: bool = False


class KVCacheStorage(HiCacheStorage):
    """The storage backend that SGLang creates for ``--hicache-storage-backend dynamic``.

    Args:
        storage_config: SGLang's description of this rank; ``extra_config`` has the options.
        kwargs: of SGLang's factory; unused.
        weight_updates: the updates of the weights of this process.

    Raises:
        ValueError: if an option is wrong.
    """

    def __init__(
        self,
        storage_config: HiCacheStorageConfig,
        kwargs: object = None,
        weight_updates: WeightUpdates = updates,
    ) -> None:
        self._config = storage_config
        self._options = read_options(storage_config.extra_config)
        self._updates = weight_updates
        weight_updates.watch(before_start=False)
        self._token = server_token()
        self._pools: dict[str, HostPages] = {}
        self._tiers: DirectTiers | None = None
        self._namespace = b""
        self._opening = threading.Lock()
        names = ("prefetch_pgs", "prefetch_bandwidth", "backup_pgs", "backup_bandwidth")
        self._samples = {name: deque[float](maxlen=_SAMPLES) for name in names}

    # At the start: the host pools, then the tiers

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool of KV."""
        super().register_mem_pool_host(mem_pool_host)
        self._add_pool(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take another host pool of the model. SGLang calls this for the one of KV too."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(host_pool_name) != KV:
            self._add_pool(host_pool, str(host_pool_name))

    def on_host_pools_registered(self) -> None:
        """Open the tiers: from now on the sizes of all blocks are known."""
        self._opened()

    def _add_pool(self, pool: Any, name: str) -> None:
        pages = HostPages(pool, name, place_of(self._config, shared=self._is_shared(pool)))
        largest = max(pages.part_nbytes, default=0)
        if self._tiers is not None and largest > self._tiers.block_nbytes:
            log.warning(
                "kvcache: sglang: host pool %s was registered late and has blocks of %d bytes, "
                "above the %d of the other pools; its pages are not stored",
                name,
                largest,
                self._tiers.block_nbytes,
            )
            return
        self._pools[name] = pages

    def _is_shared(self, pool: object) -> bool:
        return bool(self._config.is_mla_model) and is_replicated(pool)

    def _opened(self) -> DirectTiers:
        """Return the tiers; open them in the first call."""
        with self._opening:
            if self._tiers is None:
                pools = self._pools.values()
                self._tiers, self._namespace = open_for_rank(
                    self._config,
                    self._options,
                    self.mem_pool_host,
                    part_nbytes=[nbytes for pages in pools for nbytes in pages.part_nbytes],
                    shares_pages=any(self._is_shared(pages.pool) for pages in pools),
                    updates=self._updates,
                    token=self._token,
                )
            return self._tiers

    # Lookups

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """Return how many leading pages the tiers hold."""
        return count_leading(self._held(KV, keys))

    def exists(self, key: str) -> bool:
        """Return whether the tiers hold a page."""
        return self.batch_exists([key]) == 1

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Return how many leading pages all pools of the model can restore together."""
        pages = self.batch_exists(keys, extra_info)
        hits: dict[Any, int] = {PoolName.KV: pages} if pages else {}
        restorable = list(range(1, pages + 1))
        for transfer in pool_transfers or []:
            if not restorable:
                break
            held = self._held(str(transfer.name), keys[:pages])
            policy = transfer.hit_policy.value
            lengths = restorable_prefixes(held, policy, len(transfer.keys or ()))
            if lengths is None:
                continue
            if lengths:
                hits[transfer.name] = lengths[-1]
            restorable = [each for each in restorable if each in set(lengths)]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def _held(self, pool: str, keys: Sequence[str]) -> list[bool]:
        """Return for each page whether the tiers hold all of its parts."""
        pages = self._pools.get(pool)
        if pages is None:
            return [False] * len(keys)
        tiers, span = self._opened(), telemetry.start_span(telemetry.LOOKUP, Context())
        parts = tiers.contains(pages.names(keys, self._epoch()), parent_span=span)
        counts = {telemetry.REQUESTED: len(parts), telemetry.HIT: sum(parts)}
        telemetry.end_span(span, {telemetry.PROFILE: tiers.profile, **counts})
        return pages.complete_pages(parts, len(keys))

    # Loads

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: Any,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Fill pages of the host pool of KV; return for each whether all of it was filled."""
        return self._load([PageBatch(KV, keys, host_indices)])[KV]

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[Any, list[bool]]:
        """Fill pages of several host pools; return for each whether all of it was filled."""
        return self._load(
            [PageBatch(each.name, each.keys or [], each.host_indices) for each in transfers]
        )

    def _load(self, batches: Sequence[PageBatch]) -> dict[Any, list[bool]]:
        tiers, epoch, begun = self._opened(), self._epoch(), time.perf_counter()
        span = telemetry.start_span(telemetry.LOAD, Context())
        names: list[bytes] = []
        buffers: list[memoryview] = []
        begins: dict[Any, int] = {}
        results = {batch.pool: [False] * len(batch.keys) for batch in batches}
        for batch in batches:
            if (views := self._views(batch)) is not None:
                begins[batch.pool] = len(names)
                names += self._pools[str(batch.pool)].names(batch.keys, epoch)
                buffers += views
        parts = tiers.load(names, buffers, parent_span=span)
        for batch in batches:
            if batch.pool in begins:
                pages, begin = self._pools[str(batch.pool)], begins[batch.pool]
                results[batch.pool] = pages.complete_pages(parts[begin:], len(batch.keys))
        loaded = sum(len(view) for view, done in zip(buffers, parts, strict=True) if done)
        self._end(span, telemetry.HIT, parts, loaded, tiers)
        self._sample("prefetch", sum(map(sum, results.values())), loaded, begun)
        return results

    # Stores

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: Any,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Store pages of the host pool of KV; return for each whether a tier holds all of it."""
        return self._store([PageBatch(KV, keys, host_indices)], extra_info)[KV]

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[Any, list[bool]]:
        """Store pages of several host pools; return for each whether a tier holds all of it."""
        batches = [
            PageBatch(
                each.name,
                each.keys or [],
                each.host_indices,
                each.hit_policy == PoolHitPolicy.TRAILING_PAGES,
            )
            for each in transfers
        ]
        return self._store(batches, extra_info)

    def _store(
        self, batches: Sequence[PageBatch], extra_info: HiCacheStorageExtraInfo | None
    ) -> dict[Any, list[bool]]:
        tiers, epoch, begun = self._opened(), self._epoch(), time.perf_counter()
        before = ((extra_info.prefix_keys if extra_info else None) or [])[-1:]
        span = telemetry.start_span(telemetry.STORE, Context())
        results = {batch.pool: [False] * len(batch.keys) for batch in batches}
        stored: list[PageBatch] = []
        branches: list[Branch] = []
        buffers: list[memoryview] = []
        for batch in batches:
            if (views := self._views(batch)) is None:
                continue
            pages = self._pools[str(batch.pool)]
            if self._is_shared(pages.pool) and not self._config.is_storage_writer:
                # Another rank stores these pages, which are equal here.
                results[batch.pool] = [True] * len(batch.keys)
                continue
            # A state is useful only with the KV of the pages before it.
            chain = self._pools[KV] if batch.is_trailing else pages
            parents = chain.names(before, epoch)
            branches.append((pages.names(batch.keys, epoch), parents[-1] if parents else None))
            buffers += [view.toreadonly() for view in views]
            stored.append(batch)
        parts = tiers.store_branches(branches, buffers, cause=span)
        begin = 0
        for batch, (names, _) in zip(stored, branches, strict=True):
            pages = self._pools[str(batch.pool)]
            held = parts[begin : begin + len(names)]
            results[batch.pool] = pages.complete_pages(held, len(batch.keys))
            begin += len(names)
        nbytes = sum(len(view) for view, done in zip(buffers, parts, strict=True) if done)
        self._end(span, telemetry.STORED, parts, nbytes, tiers)
        self._sample("backup", sum(map(sum, results.values())), nbytes, begun)
        return results

    # Weights, metrics, reset, end

    def _epoch(self) -> bytes:
        """Return the bytes that updates of the weights add to the names of pages; none before."""
        count = self._updates.count
        return blake2b(f"{self._token} {count}".encode()).digest() if count else b""

    def _views(self, batch: PageBatch) -> list[memoryview] | None:
        """Return the memory of a batch; ``None`` if its pages cannot be transferred."""
        pages = self._pools.get(str(batch.pool))
        views = None if pages is None else pages.views(len(batch.keys), batch.host_indices)
        if views is None:
            log.warning(
                "kvcache: sglang: host pool %s is unknown, or has other memory than %d pages need; "
                "the pages are neither loaded nor stored",
                batch.pool,
                len(batch.keys),
            )
        return views

    @staticmethod
    def _end(
        span: Any, outcome: str, parts: Sequence[bool], nbytes: int, tiers: DirectTiers
    ) -> None:
        counts = {telemetry.REQUESTED: len(parts), outcome: sum(parts), telemetry.PAYLOAD: nbytes}
        telemetry.end_span(span, {telemetry.PROFILE: tiers.profile, **counts})

    def _sample(self, direction: str, pages: int, nbytes: int, begun: float) -> None:
        if self._config.enable_storage_metrics and pages:
            seconds = time.perf_counter() - begun
            self._samples[f"{direction}_pgs"].append(pages)
            self._samples[f"{direction}_bandwidth"].append(nbytes / 2**30 / max(seconds, 1e-9))

    def get_stats(self) -> Any:
        """Return the samples of SGLang's own storage metrics since the last call."""
        if not self._config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        stats = StorageMetrics()
        for name, samples in self._samples.items():
            while samples:
                getattr(stats, name).append(samples.popleft())
        return stats

    def clear(self) -> bool:
        """Have the tiers forget the pages of this server's namespace.

        Returns:
            whether no server that starts later finds one of them.
        """
        tiers, config = self._opened(), self._config
        place = (self._namespace, config.tp_rank, config.pp_rank, config.attn_cp_rank)
        with _clears_lock:
            _clears[place] += 1
            cleared = f"{self._token} {_clears[place]}".encode()
        # All ranks of a server clear, and must find each other's pages afterwards.
        return tiers.clear(blake2b(self._namespace + cleared, digest_size=32).digest())

    def close(self) -> None:
        """Close the tiers. Later calls find and store nothing."""
        with self._opening:
            if self._tiers is not None:
                self._tiers.close()

    # Without interface_v1 SGLang would copy each page to a tensor and call these.

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Raise NotImplementedError: this backend needs SGLang's ``interface_v1``."""
        raise NotImplementedError("pages of SGLang's host pool only: interface_v1 must be 1")

    batch_get = set = batch_set = get
