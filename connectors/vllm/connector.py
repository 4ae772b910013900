"""The vLLM connector: ``KVCacheConnector`` takes vLLM's calls to one of two halves, no more.

::

    --kv-transfer-config '{"kv_connector": "KVCacheConnector",
                           "kv_connector_module_path": "kvcache.connectors.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

vLLM makes one instance in the scheduler's process and one in every worker, and imports the class
elsewhere too: importing this module starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

try:
    import vllm
except ImportError as error:
    raise ImportError("the vLLM connector needs vLLM in this environment") from error

from kvcache.connectors.vllm.compat import check_version, log_as_vllm_does

check_version(vllm.__version__)

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvcache.connectors.vllm.layer_sync import kind_of  # noqa: E402
from kvcache.connectors.vllm.messages import Acks, Refusal, Shard, Step  # noqa: E402

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvcache.connectors.vllm.metrics import PromMetrics, Stats
    from kvcache.connectors.vllm.scheduler import SchedulerSide
    from kvcache.connectors.vllm.worker import WorkerSide
    from kvcache.stats import StackStats

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    _HOST: object = CacheHitSource.HOST
except ImportError:  # before 0.32 hits had no source
    _HOST = None


class KVCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps a vLLM engine's KV blocks in the tiers of a kvcache profile."""

    _cache_hit_source = _HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide
        self._worker: WorkerSide
        self._block_pool: BlockPool | None = None  # bound when vLLM's scheduler is made
        log_as_vllm_does()
        if role == KVConnectorRole.SCHEDULER:
            from kvcache.connectors.vllm.identity import identity
            from kvcache.connectors.vllm.scheduler import SchedulerSide

            self._identity = identity(vllm_config, kv_cache_config)
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, self._identity)
        else:
            import torch
            from vllm.distributed.parallel_state import get_pp_group, get_tp_group

            from kvcache.connectors.vllm.compat import warn_unless_recomputing
            from kvcache.connectors.vllm.refusals import refusal
            from kvcache.connectors.vllm.worker import WorkerSide

            self._drafts = vllm_config.speculative_config is not None
            self._refusal = refusal(vllm_config, kv_cache_config)
            rank = (get_pp_group().rank_in_group, get_tp_group().rank_in_group)
            if self._refusal is None and rank == (0, 0):
                warn_unless_recomputing(vllm_config)
            self._worker = WorkerSide(kv_cache_config, rank, torch.get_num_threads())

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what it loses is computed again, and no request waits for it."""
        return False

    # Scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Any, Any]) -> None:
        from kvcache.connectors.vllm.identity import log_sharing

        self._scheduler.open(metadata)
        if (stats := self._scheduler.stats()) is not None:
            log_sharing(self._identity, lower=bool(stats.lower))

    def on_new_request(self, request: Request) -> None:
        self._scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens) and self._scheduler.comes_later(request)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._scheduler.admitted(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        step = self._scheduler.step(scheduler_output)
        self._forget_doubtful()
        return step or KVConnectorMetadata()

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._block_pool = gpu_block_pool

    def _forget_doubtful(self) -> None:
        # vLLM has a request compute them again, and until then gives them to others: to every
        # later request, if this one is aborted or preempted before.
        doubtful = self._scheduler.take_doubtful()
        if doubtful and self._block_pool is not None:
            self._block_pool.evict_blocks(doubtful)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if connector_output.invalid_block_ids:
            self._scheduler.failed(connector_output.invalid_block_ids)
            self._forget_doubtful()
        acks = connector_output.kv_connector_worker_meta
        if isinstance(acks, Acks):
            self._scheduler.acked(acks)

    def has_pending_push_work(self) -> bool:
        """Whether vLLM has to go on stepping, with no request if need be, to hear of copies."""
        return self._scheduler.copying

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.finished(request)
        return False, None

    def reset_cache(self) -> bool:
        self._scheduler.reset()
        if self._block_pool is not None:
            # vLLM cannot reset its own cache while requests run, and would give later ones what
            # was computed before.
            self._block_pool.evict_blocks(set(range(len(self._block_pool.blocks))))
        self._forget_doubtful()
        return True

    def stats(self) -> StackStats | None:
        """What the stack holds and did; ``None`` where nothing can be kept."""
        return self._scheduler.stats()

    def take_events(self) -> Sequence[KVCacheEvent]:
        return self._scheduler.events.take()

    def get_kv_connector_stats(self) -> Stats | None:
        return self._scheduler.report() if hasattr(self, "_scheduler") else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        from kvcache.connectors.vllm.metrics import Stats

        return Stats().aggregate(Stats(data or {}))  # a copy: several loggers get the same data

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> PromMetrics:
        from kvcache.connectors.vllm.metrics import PromMetrics

        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._refusal is None:
            self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> Shard | Refusal | None:
        if self._refusal is not None:
            return Refusal(self._refusal)
        from kvcache.connectors.vllm.identity import kernels

        shard = self._worker.shard()
        return shard and replace(shard, format_id=f"{shard.format_id} {kernels(self._vllm_config)}")

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if isinstance(kv_connector_metadata, Step):
            self._worker.fence(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if (step := self._step()) is not None:
            # A drafter may replay a graph of its own, which asks for no layer that it reads.
            self._worker.load(step, None if self._drafts else kind_of(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        if (step := self._step()) is not None:
            self._worker.store(step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_received() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks()

    def build_connector_worker_meta(self) -> Acks | None:
        return self._worker.take_acks()

    def _step(self) -> Step | None:
        step = self._get_connector_metadata()
        return step if isinstance(step, Step) else None

    # Both

    def shutdown(self) -> None:
        for half in ("_scheduler", "_worker"):
            if hasattr(self, half):
                getattr(self, half).close()
