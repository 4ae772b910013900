"""Finds hits for requests that vLLM has not admitted: in lower tiers in advance, then in L1."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from kvcache.connectors.vllm.scheduler.events import EventSource
from kvcache.connectors.vllm.scheduler.pending_loads import PendingLoads
from kvcache.connectors.vllm.scheduler.request_keys import RequestKeys
from kvcache.connectors.vllm.scheduler.tracing import RequestSpans
from kvcache.lower.promotion import Match
from kvcache.replay.recorder import NULL_RECORDER
from kvcache.stack import Stack

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Lookups:
    """The lookups of an engine's requests.

    Args:
        stack: the stack.
        keys: derives the keys of requests.
        pending_loads: gets the hits.
        spans: the requests' spans.
        events: the stack's KV events.
        within_step: whether a load may end within the step that needs it.

    Attributes:
        prefetches: promotions that have not been waited for, by request id.
    """

    def __init__(
        self,
        stack: Stack,
        keys: RequestKeys,
        pending_loads: PendingLoads,
        spans: RequestSpans,
        events: EventSource,
        *,
        within_step: bool,
    ) -> None:
        self.prefetches: dict[str, Future[Match]] = {}
        self._stack = stack
        self._keys = keys
        self._pending_loads = pending_loads
        self._spans = spans
        self._events = events
        self._within_step = within_step
        self._first = keys.groups[0]
        self._has_states = any(group.is_state for group in keys.groups)

    def add(self, request: Request) -> None:
        """Start to promote the blocks in lower tiers that a request needs."""
        if request.skip_reading_prefix_cache:
            return
        self._spans.start(request)
        context, first = self._spans.context(request), self._first
        top = request.num_tokens - 1
        if self._events.publishes:
            for group in self._keys.groups:
                blocks = range(top // group.block_tokens)
                keys = self._keys.parts_of(request, group, 0, blocks.stop)
                self._events.describe(request, group, blocks, keys)
        if self._stack.recorder is not NULL_RECORDER:
            chain = self._keys.blocks(request, first, 0, top // first.block_tokens)
            self._stack.recorder.record(chain, request.num_prompt_tokens)
        prefetch = self._stack.prefetch_resume(
            self._keys.of(request), top, first.align_tokens, context=context
        )
        if prefetch is not None:
            self.prefetches[request.request_id] = prefetch

    def tokens(self, request: Request, computed: int, *, others: bool) -> int | None:
        """Return how many tokens after the first ``computed`` ones L1 has, and pin their blocks.

        Args:
            request: a request that vLLM may admit.
            computed: tokens that vLLM has in its own cache.
            others: whether other requests run.

        Returns:
            ``None`` while the promotion of the request's blocks continues.
        """
        request_id, first = request.request_id, self._first
        if request.skip_reading_prefix_cache or not self._keys.keeps(request):
            return 0
        if (prefetch := self.prefetches.get(request_id)) is not None:
            if not prefetch.done():  # it has a deadline
                self._spans.start_wait(request)
                return None
            del self.prefetches[request_id]
            self._spans.end_prefetch(request, prefetch, parts=self._keys.parts[0])
        own = computed - computed % first.block_tokens
        if (tokens := self._pending_loads.tokens(request_id, own)) is not None:
            return tokens
        self._pending_loads.cancel(request_id)
        context = self._spans.set_own_tokens(request, computed)
        top = request.num_tokens - 1
        if self._within_step:
            blocks = (request.num_tokens - own) // first.block_tokens
            # After an async load of the whole prompt, vLLM recomputes the last token.
            top += self._pending_loads.prefers_async(blocks, others=others)
        found = self._stack.fetch_resume(
            self._keys.of(request), own, top, first.align_tokens, context=context
        )
        if self._has_states and found.chain_tokens > found.tokens:
            # vLLM ends a step there, and hands off the state that later requests lack.
            request.shared_prefix_boundary = max(request.shared_prefix_boundary, found.chain_tokens)
        if not found.lease.keys:
            found.lease.end()
            return 0
        self._pending_loads.add(request_id, own, found.tokens, found.lease, others=others)
        return found.tokens - own

    def forget(self, request_id: str) -> None:
        """Forget a request that ended. A promotion that runs continues."""
        self._pending_loads.cancel(request_id)
        self.prefetches.pop(request_id, None)
