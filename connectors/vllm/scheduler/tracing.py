"""A span for each request, from its arrival to its end, under the span of its caller.

Invariants:

1. A request has at most one span; the spans of all operations for the request are below it.
2. The span has the number of tokens from each tier, and the seconds for which the request waited:
   for lower tiers, for an async load, and for the copy of a load within its step.
3. vLLM's own span of the request is in the same trace: under the same caller, or under this span.
4. Without a tracer that records, a request costs a microsecond and adds nothing to the messages to
   the workers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.lower.promotion import Match

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class _RequestSpan:
    """The span of a request, and the values to set at its end.

    Attributes:
        sources: by block of the prompt, the number of the tier that it was promoted from for this
            request; 0 is L1.
        waiting_since: when the request began to wait; ``None`` while it does not.
        waited_s: seconds of the waits that have ended.
    """

    span: Span
    context: Context
    sources: Sequence[int] = ()
    waiting_since: float | None = None
    waited_s: float = 0.0


class RequestSpans:
    """The spans of the requests that have not ended. ``model`` is the served name.

    Attributes:
        tiers: their names in the profile, L1 first.
    """

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.tiers: Sequence[str] = ()
        self.model = model
        self._clock = clock
        self._spans: dict[str, _RequestSpan] = {}  # by request id

    def __len__(self) -> int:
        return len(self._spans)

    def start(self, request: Request) -> None:
        """Start the span of a request. Its headers name the caller's span.

        vLLM passes on the headers of an HTTP request if it traces by itself
        (``--otlp-traces-endpoint``). Otherwise ``kv_transfer_params`` may have a ``traceparent``.
        """
        headers = request.trace_headers
        if not headers:
            headers = caller_headers(request.kv_transfer_params or {})
        span = telemetry.start_request(headers)
        self._spans[request.request_id] = _RequestSpan(span, trace.set_span_in_context(span))
        if span.is_recording():
            if not request.trace_headers:  # otherwise vLLM starts another trace for its own span
                request.trace_headers = telemetry.trace_headers(span)
            span.set_attributes(
                {
                    telemetry.REQUEST_ID: request.request_id,
                    telemetry.GEN_AI_REQUEST_ID: outer_id(request.request_id),
                    telemetry.GEN_AI_MODEL: self.model,
                    telemetry.PROMPT_TOKENS: request.num_prompt_tokens,
                }
            )

    def context(self, request: Request) -> Context:
        """Return the context of a request's span, for the spans below it."""
        if request.request_id not in self._spans:
            self.start(request)
        return self._spans[request.request_id].context

    def set_own_tokens(self, request: Request, tokens: int) -> Context:
        """Set how many tokens the engine has in its own cache, and return the span's context."""
        context = self.context(request)
        self._spans[request.request_id].span.set_attribute(telemetry.ENGINE_HIT_TOKENS, tokens)
        return context

    def start_wait(self, request: Request) -> None:
        """Note that the request waits from now on, unless it waits already."""
        traced = self._spans.get(request.request_id)
        if traced is not None and traced.waiting_since is None:
            traced.waiting_since = self._clock()

    def end_wait(self, request: Request) -> None:
        """Note that the request no longer waits."""
        traced = self._spans.get(request.request_id)
        if traced is not None and traced.waiting_since is not None:
            traced.waited_s += self._clock() - traced.waiting_since
            traced.waiting_since = None

    def end_prefetch(self, request: Request, prefetch: Future[Match], *, parts: int = 1) -> None:
        """End the wait for a prefetch, which is done, and note which tiers its blocks came from.

        ``parts`` is how many keys a block has.
        """
        self.end_wait(request)
        traced = self._spans.get(request.request_id)
        if traced is not None and not prefetch.cancelled() and prefetch.exception() is None:
            traced.sources = prefetch.result().sources[::parts]

    def add_load(self, request: Request, seconds: float, failed_blocks: int) -> None:
        """Add a load that has ended. Its step waited for it, unless the request waits by itself."""
        traced = self._spans.get(request.request_id)
        if traced is None:
            return
        if traced.waiting_since is None:
            traced.waited_s += seconds
        if failed_blocks:
            traced.span.set_attribute(telemetry.FAILED, failed_blocks)

    def admit(
        self, request: Request, hit_tokens: int, own: int, groups: Sequence[KeptGroup]
    ) -> None:
        """Note that vLLM admitted the request, with ``hit_tokens`` from kvcache after ``own`` ones.

        Args:
            request: the request.
            hit_tokens: tokens that are not computed, since kvcache has their blocks.
            own: tokens that the engine has in its own cache.
            groups: the kept groups. Prefetches are traced by blocks of the first one.
        """
        traced = self._spans.get(request.request_id)
        if traced is None or not traced.span.is_recording():
            return
        traced.span.set_attribute(telemetry.HIT_TOKENS, hit_tokens)
        block_tokens, end = groups[0].block_tokens, own + hit_tokens
        sources = traced.sources[own // block_tokens : end // block_tokens]
        for number, tier in enumerate(self.tiers):
            tokens = sources.count(number) * block_tokens
            if not number:  # blocks that no prefetch has seen were in L1
                tokens += hit_tokens - len(sources) * block_tokens
            traced.span.set_attribute(telemetry.tier_tokens(tier), tokens)
        for group in groups:
            needed = end - max(own, min(end, group.needs.first_token(end)))
            if needed != hit_tokens:
                traced.span.set_attribute(telemetry.group_tokens(group.needs.kind), needed)
        traced.span.add_event(telemetry.ADMITTED)

    def finish(self, request: Request) -> None:
        """End the span of a request."""
        self.end_wait(request)
        traced = self._spans.pop(request.request_id, None)
        if traced is not None:
            telemetry.end_span(traced.span, {telemetry.WAITED: traced.waited_s})

    def close(self) -> None:
        """End all spans: the engine shuts down."""
        while self._spans:
            _, traced = self._spans.popitem()
            telemetry.end_span(traced.span, {telemetry.WAITED: traced.waited_s})


def caller_headers(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers in a request's ``kv_transfer_params`` that name the caller's span."""
    names = ("traceparent", "tracestate")
    return {name: params[name] for name in names if isinstance(params.get(name), str)}


def outer_id(request_id: str) -> str:
    """Return the caller's request id: vLLM appends eight hexadecimal digits to it."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") != "0":
        return request_id
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)
