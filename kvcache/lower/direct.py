"""Direct tiers: the lower tiers of an engine that has host memory of its own, without an L1.

1. Every call blocks and takes a batch. A tier's failure is a miss or a decline, never an exception.
2. A call to a tier lasts until the tier's deadline at most. A tier that missed it, or failed, gets
   no further call of that batch; a load continues with the next tier.
3. When a call returned, no tier reads or writes the caller's memory (``lent_calls``).
4. Calls to a tier have the deadline, the circuit breaker, the counters and the spans that they have
   below L1 (``TierCaller``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import metrics, telemetry
from kvcache.closeable import Closeable
from kvcache.events import BlockEventLog
from kvcache.keys import Branch, parents_of
from kvcache.lower.caller import close_tiers
from kvcache.lower.direct_tier import DirectTier
from kvcache.lower.latency import ComputeModel
from kvcache.lower.lent_calls import run_series
from kvcache.lower.search import blocks_worth_loading, locate_blocks, runs_by_source
from kvcache.process import bind_to_process
from kvcache.stats import StackStats, TierName


class DirectTiers(Closeable):
    """Lower tiers that read and fill the caller's memory. Safe to call from several threads.

    Blocks may differ in size. A buffer is any object with contiguous memory, such as a
    ``memoryview`` or an array.

    Args:
        tiers: the tiers, nearest first.
        profile: the profile's name, for spans and stats.
        block_nbytes: bytes of the largest block.

    Attributes:
        tiers: the tiers.
        compute_model: predicts how long the engine computes blocks.

    Raises:
        RuntimeError: this Python runs without a GIL.
    """

    def __init__(self, tiers: Sequence[DirectTier], *, profile: str, block_nbytes: int) -> None:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise RuntimeError(
                "direct tiers need Python's GIL: without it, a late call of a tier could write "
                "into memory that the caller has reused"
            )
        self.tiers = tuple(tiers)
        self.profile = profile
        self.block_nbytes = block_nbytes
        self.compute_model = ComputeModel()
        metrics.register_stack(self)
        bind_to_process(self)

    @property
    def names(self) -> tuple[TierName, ...]:
        """The name and kind of each tier, nearest first."""
        return tuple(tier.channel.tier_name for tier in self.tiers)

    @property
    def deadline_s(self) -> float:
        """The most seconds that a call waits, if its blocks fit into one call of each tier."""
        return sum(tier.channel.deadline_s for tier in self.tiers)

    @property
    def accepts_calls(self) -> bool:
        """Whether any tier would be called now."""
        return any(tier.channel.accepts_calls for tier in self.tiers)

    def contains(
        self, keys: Sequence[bytes], *, depth: int = 0, parent_span: Span = INVALID_SPAN
    ) -> list[bool]:
        """Return for each key whether some tier holds its block, and a load of it is worth it.

        A tier is asked for the blocks that the tiers before it lack. Blocks that are predicted to
        take longer to load than to compute are reported as not held
        (:meth:`observe_compute`); without measurements, every held block is reported.

        Args:
            keys: of one prompt, in order.
            depth: the number of blocks of the prompt before them; a deeper one takes longer to
                compute.
            parent_span: the parent of the tiers' spans.
        """
        sources: list[int | None] = [None] * len(keys)

        def compute_s(blocks: int) -> float | None:
            return self.compute_model.pessimistic(blocks, depth)

        def on_skip(tier: DirectTier, asked: Sequence[bytes]) -> None:
            tier.record_skip(telemetry.TIER_CONTAINS, len(asked), parent_span)
            tier.remeasure(asked)

        locate_blocks(self.tiers, keys, sources, compute_s, parent_span, on_skip)
        worth = blocks_worth_loading(self.tiers, sources, self.compute_model, depth)
        for source, at, end in runs_by_source(sources, worth):
            if source is not None:
                tier = self.tiers[source - 1]
                tier.record_skip(telemetry.TIER_LOAD, end - at, parent_span)
                tier.remeasure(keys[at:end])
        return [source is not None and at < worth for at, source in enumerate(sources)]

    def load(
        self, keys: Sequence[bytes], into: Sequence[object], *, parent_span: Span = INVALID_SPAN
    ) -> list[bool]:
        """Fill each buffer with its block, from the nearest tier that returns it.

        Args:
            keys: of the blocks.
            into: a writable buffer for each block, of the block's size.
            parent_span: the parent of the tiers' spans.

        Returns:
            for each key, whether the whole buffer was filled. If not, its content is undefined.

        Raises:
            ValueError: a buffer is read-only, empty, not contiguous or larger than
                ``block_nbytes``, or there are more or fewer buffers than keys.
            TypeError: an object has no buffer.
        """
        buffers = self._views(keys, into, writable=True)
        filled = [False] * len(keys)
        missing: Sequence[int] = range(len(keys))
        for tier in self.tiers:
            if not missing:
                break
            for at in tier.load(keys, buffers, missing, parent_span):
                filled[at] = True
            missing = [at for at in missing if not filled[at]]
        return filled

    def store(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[object],
        parent: bytes | None = None,
        *,
        cause: Span = INVALID_SPAN,
    ) -> list[bool]:
        """Store each block in every tier that lacks it; all tiers work at the same time.

        Args:
            keys: consecutive blocks of a chain.
            blocks: a buffer with the bytes of each block.
            parent: the key that ``keys[0]`` continues; ``None`` if there is none or it is unknown.
            cause: the span of the operation that caused this; the tiers' spans link to it.

        Returns:
            for each key, whether at least one tier holds the block now.

        Raises:
            ValueError: as for :meth:`load`, but a buffer may be read-only.
        """
        return self.store_branches([(keys, parent)], blocks, cause=cause)

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[object], *, cause: Span = INVALID_SPAN
    ) -> list[bool]:
        """Store the blocks of several segments, as :meth:`store` does for one.

        Args:
            branches: the keys of each segment, and the key that the first one continues.
            blocks: the bytes of each block, in the order of the concatenated keys.
            cause: as for :meth:`store`.
        """
        keys = [key for branch, _ in branches for key in branch]
        parents = parents_of(branches)
        views = self._views(keys, blocks, writable=False)
        if not keys:
            return []
        spans = [telemetry.start_linked(cause, telemetry.TIER_STORE) for _ in self.tiers]
        all_series = [
            tier.start_store(keys, parents, views, span)
            for tier, span in zip(self.tiers, spans, strict=True)
        ]
        run_series(all_series)
        held = [False] * len(keys)
        for tier, series, span in zip(self.tiers, all_series, spans, strict=True):
            for at in tier.end_store(series, views, span):
                held[at] = True
        return held

    def _views(
        self, keys: Sequence[bytes], buffers: Sequence[object], *, writable: bool
    ) -> list[memoryview]:
        """Return a view of the bytes of each buffer. Raises ValueError for one of a wrong kind."""
        if len(keys) != len(buffers):
            raise ValueError(f"{len(buffers)} buffers for {len(keys)} keys")
        views = []
        for buffer in buffers:
            view = memoryview(buffer)  # type: ignore[arg-type]
            if not view.c_contiguous:
                raise ValueError("a buffer is not contiguous")
            if writable and view.readonly:
                raise ValueError("a buffer to load into is read-only")
            if not 0 < view.nbytes <= self.block_nbytes:
                raise ValueError(
                    f"a buffer of {view.nbytes} bytes; a block has 1 to {self.block_nbytes}"
                )
            views.append(view.cast("B"))
        return views

    def observe_compute(self, blocks: float, seconds: float, depth: float | None = None) -> None:
        """Record that the engine computed ``blocks`` in ``seconds``, as ``Stack`` does.

        Args:
            blocks: blocks that the step computed, over all prompts.
            seconds: the duration of the step.
            depth: the number of blocks before a computed block in its prompt, averaged over the
                computed blocks; ``None`` if one prompt was computed from its first block.
        """
        if blocks > 0:
            self.compute_model.observe(blocks, seconds, depth)

    def clear(self, namespace: bytes | None = None) -> bool:
        """Remove every block of every tier.

        When it returns, these tiers find no earlier block. They forget the earlier blocks in
        parallel, within the longest of their deadlines.

        Args:
            namespace: of the blocks from now on, for processes that share blocks and are cleared
                together: all pass the same one, and it was never used before. ``None`` is random.

        Returns:
            ``True`` if all tiers have done so; a later opening then finds none either.
        """
        pending = [(tier, tier.start_clear(namespace)) for tier in self.tiers]
        forgotten = [tier.finish_clear(call) for tier, call in pending]
        return all(forgotten)

    def stats(self) -> StackStats:
        """The counts at this moment."""
        return StackStats(
            self.profile,
            (),
            tuple(tier.stats() for tier in self.tiers),
            self.names,
        )

    def take_durations(self) -> list[metrics.Duration]:
        """Return the durations of tier calls since this was last called, at most 1024 per tier."""
        return [each for tier in self.tiers for each in tier.channel.health.timer.take()]

    def subscribe_events(self) -> list[tuple[TierName, BlockEventLog]]:
        """Log the events of every tier from now on. A log grows until it is taken.

        A block that a tier removes by itself is logged when the tier is next asked for it.
        """
        logs = []
        for tier in self.tiers:
            logs.append((tier.channel.tier_name, BlockEventLog()))
            tier.channel.events = logs[-1][1]
        return logs

    def close(self, timeout_s: float = 5.0) -> None:
        """Close every tier within ``timeout_s``. Later calls find and store nothing.

        A tier that still hangs is left open, and a warning is logged; its threads do not keep the
        process from exiting. Closing twice is allowed.
        """
        metrics.unregister_stack(self)
        until = time.monotonic() + timeout_s
        close_tiers(self.tiers, time.monotonic(), until)
        for tier in self.tiers:
            tier.channel.control_worker.close(max(0.0, until - time.monotonic()))
