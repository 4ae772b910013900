"""The vLLM connector: ``KVCacheConnector`` passes vLLM's calls to one of two sides.

::

    --kv-transfer-config '{"kv_connector": "KVCacheConnector",
                           "kv_connector_module_path": "kvcache.connectors.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

vLLM constructs one instance in the scheduler's process and one in every worker, and imports the
class in other processes too: importing this module starts nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

try:
    import vllm
except ImportError as error:
    raise ImportError("the vLLM connector needs vLLM in this environment") from error

from kvcache.connectors.vllm.compat import check_vllm, log_as_vllm_does

check_vllm(vllm.__version__)

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvcache.connectors.vllm.messages import Acks, Refusal, Shard, Step  # noqa: E402
from kvcache.connectors.vllm.worker.layer_sync import pass_mode  # noqa: E402

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvcache.connectors.vllm.metrics import PromMetrics, Stats
    from kvcache.connectors.vllm.scheduler.side import SchedulerSide
    from kvcache.connectors.vllm.worker.side import WorkerSide
    from kvcache.stats import StackStats

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    _HOST: object = CacheHitSource.HOST
except ImportError:  # before 0.32 hits had no source
    _HOST = None


class KVCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps a vLLM engine's KV blocks in the tiers of a kvcache profile.

    Attributes:
        scheduler_side: in the scheduler's process; the instance there has no ``worker_side``.
        worker_side: in a worker's process.
        refusal: in a worker: why it keeps no blocks; ``None`` if it does.
    """

    _cache_hit_source = _HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.scheduler_side: SchedulerSide
        self.worker_side: WorkerSide
        self._block_pool: BlockPool | None = None  # bound after vLLM's scheduler is constructed
        log_as_vllm_does()
        if role == KVConnectorRole.SCHEDULER:
            from kvcache.connectors.vllm.compat import replica_of, warn_of_untested_vllm
            from kvcache.connectors.vllm.identity.fields import identity
            from kvcache.connectors.vllm.scheduler.side import SchedulerSide

            if replica_of(vllm_config.parallel_config).index == 0:
                warn_of_untested_vllm(vllm.__version__)
            self._identity = identity(vllm_config, kv_cache_config)
            self.scheduler_side = SchedulerSide(vllm_config, kv_cache_config, self._identity)
        else:
            import torch
            from vllm.distributed.parallel_state import get_pp_group, get_tp_group

            from kvcache.connectors.vllm.compat import warn_unless_recomputing
            from kvcache.connectors.vllm.refusals import refusal
            from kvcache.connectors.vllm.worker.replicas import tensor_replicas
            from kvcache.connectors.vllm.worker.side import WorkerSide

            self._drafts = vllm_config.speculative_config is not None
            self.refusal = refusal(vllm_config, kv_cache_config)
            rank = (get_pp_group().rank_in_group, get_tp_group().rank_in_group)
            if self.refusal is None and rank == (0, 0):
                warn_unless_recomputing(vllm_config)
            replicas = () if self.refusal else tensor_replicas(vllm_config, kv_cache_config)
            self.worker_side = WorkerSide(
                kv_cache_config,
                rank,
                torch.get_num_threads(),
                replicas=replicas,
                defers_stores=not getattr(vllm_config, "use_v2_model_runner", False),
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """False: this is a cache, so vLLM recomputes what it loses and holds no request for it."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        from kvcache.connectors.vllm.layout_request import requested_layout

        # The only sign of `MultiConnector`: it passes the config of an engine with one connector,
        # and vLLM has no current config yet. Without a request from here, copies are only slower.
        frame = inspect.currentframe()
        caller = frame.f_back.f_globals["__name__"] if frame and frame.f_back else ""
        return requested_layout(vllm_config, caller)

    # Scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Any, Any]) -> None:
        from kvcache.connectors.vllm.identity.fields import log_sharing

        self.scheduler_side.open(metadata)
        if (stats := self.scheduler_side.stats()) is not None:
            log_sharing(self._identity, lower=bool(stats.lower))

    def on_new_request(self, request: Request) -> None:
        self.scheduler_side.add_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self.scheduler_side.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens) and self.scheduler_side.is_async(request)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self.scheduler_side.admit(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        step = self.scheduler_side.build_step(scheduler_output)
        self._evict_suspects()
        return step or KVConnectorMetadata()

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._block_pool = gpu_block_pool

    def _evict_suspects(self) -> None:
        # vLLM has a request recompute the blocks of a failed load. Until then other requests would
        # find them in vLLM's prefix cache; later, too, if this one is aborted or preempted first.
        suspects = self.scheduler_side.take_suspects()
        if suspects and self._block_pool is not None:
            self._block_pool.evict_blocks(suspects)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if connector_output.invalid_block_ids:
            self.scheduler_side.fail_loads(connector_output.invalid_block_ids)
            self._evict_suspects()
        acks = connector_output.kv_connector_worker_meta
        if isinstance(acks, Acks):
            self.scheduler_side.end_step(acks)

    def has_pending_push_work(self) -> bool:
        """Whether vLLM has to step, even without requests, so that the workers report copies."""
        return self.scheduler_side.copying

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler_side.finish(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler_side.finish(request)
        return False, None

    def reset_cache(self) -> bool:
        self.scheduler_side.reset()
        if self._block_pool is not None:
            # vLLM does not reset its own prefix cache while requests run. Later requests would find
            # blocks in it that were computed before the reset.
            self._block_pool.evict_blocks(set(range(len(self._block_pool.blocks))))
        self._evict_suspects()
        return True

    def stats(self) -> StackStats | None:
        """Return the counts of the stack; ``None`` if the engine is refused."""
        return self.scheduler_side.stats()

    def take_events(self) -> Sequence[KVCacheEvent]:
        return self.scheduler_side.events.take()

    def get_kv_connector_stats(self) -> Stats | None:
        return self.scheduler_side.report() if hasattr(self, "scheduler_side") else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        from kvcache.connectors.vllm.metrics import Stats

        return Stats().aggregate(Stats(data or {}))  # a copy: several loggers share the data

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
        if self.refusal is None:
            self.worker_side.register(kv_caches)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:  # noqa: ARG003
        """False, so vLLM 0.33 refuses ``--enable-sleep-mode``: it has not run on a GPU yet."""
        return False

    def unregister_kv_caches(self) -> None:
        if self.refusal is None:
            self.worker_side.unregister()

    def restore_kv_caches(self) -> None:
        if self.refusal is None:
            self.worker_side.restore()

    def get_handshake_metadata(self) -> Shard | Refusal | None:
        if self.refusal is not None:
            return Refusal(self.refusal)
        from kvcache.connectors.vllm.identity.fields import kernels

        shard = self.worker_side.shard()
        return shard and replace(shard, format_id=f"{shard.format_id} {kernels(self._vllm_config)}")

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if isinstance(kv_connector_metadata, Step):
            self.worker_side.fence(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if (step := self._step()) is not None:
            # A drafter may replay a CUDA graph of its own, in which no layer waits for its load.
            self.worker_side.load(step, None if self._drafts else pass_mode(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.worker_side.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        if (step := self._step()) is not None:
            self.worker_side.store(step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self.worker_side.take_received() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        results.failed_recving |= self.worker_side.take_failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker_side.take_failed_blocks()

    def build_connector_worker_meta(self) -> Acks | None:
        return self.worker_side.take_acks()

    def _step(self) -> Step | None:
        step = self._get_connector_metadata()
        return step if isinstance(step, Step) else None

    # Both

    def shutdown(self) -> None:
        for side in ("scheduler_side", "worker_side"):
            if hasattr(self, side):
                getattr(self, side).close()
