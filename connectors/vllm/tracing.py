"""A span for each request, from its arrival to its end, under that of whoever sent it.

Always true here:

* A request has one span at most, and what is done for it goes below.
* The span has how many tokens came from which tier, and the seconds that the request waited for
  them: for lower tiers, for a load that its step did not await, and for the copy of one that did.
* vLLM's own span of the request is in the same trace: under the same caller, or under this span.
* Without a recording tracer a request costs a microsecond and carries nothing to the workers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.lower.promotion import Match

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class _Traced:
    """A request's span, and what it will have.

    Attributes:
        sources: by block of the prompt, the tier that it came up from for this request; 0 is L1.
        since: when the request began to wait, while it waits.
        waited_s: before that.
    """

    span: Span
    context: Context
    sources: Sequence[int] = ()
    since: float | None = None
    waited_s: float = 0.0


class Requests:
    """The spans of the requests that have arrived and not ended. ``model`` is its served name.

    Attributes:
        tiers: their names in the profile, L1 first.
    """

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.tiers: Sequence[str] = ()
        self.model = model
        self._clock = clock
        self._spans: dict[str, _Traced] = {}

    def arrived(self, request: Request) -> None:
        """Begin its span. The caller is named by the request's headers.

        vLLM hands the headers of an HTTP request on where it traces itself
        (``--otlp-traces-endpoint``); else ``kv_transfer_params`` may have a ``traceparent``.
        """
        headers = request.trace_headers
        if not headers:
            given = request.kv_transfer_params or {}
            names = ("traceparent", "tracestate")
            headers = {name: given[name] for name in names if isinstance(given.get(name), str)}
        span = telemetry.start_request(headers)
        self._spans[request.request_id] = _Traced(span, trace.set_span_in_context(span))
        if span.is_recording():
            if not request.trace_headers:  # else vLLM would begin a trace for its own span
                request.trace_headers = telemetry.trace_headers(span)
            span.set_attributes(
                {
                    telemetry.REQUEST_ID: request.request_id,
                    telemetry.GEN_AI_REQUEST_ID: _outer_id(request.request_id),
                    telemetry.GEN_AI_MODEL: self.model,
                    telemetry.PROMPT_TOKENS: request.num_prompt_tokens,
                }
            )

    def context(self, request: Request) -> Context:
        """Under which everything goes that is done for it."""
        if request.request_id not in self._spans:
            self.arrived(request)
        return self._spans[request.request_id].context

    def asks(self, request: Request, own_tokens: int) -> Context:
        """The engine has so many tokens of it itself, and asks for more; gives its context."""
        context = self.context(request)
        self._spans[request.request_id].span.set_attribute(telemetry.ENGINE_HIT_TOKENS, own_tokens)
        return context

    def waits(self, request: Request) -> None:
        """The request waits from now on, if it does not yet."""
        traced = self._spans.get(request.request_id)
        if traced is not None and traced.since is None:
            traced.since = self._clock()

    def goes_on(self, request: Request) -> None:
        """The request waits no more."""
        traced = self._spans.get(request.request_id)
        if traced is not None and traced.since is not None:
            traced.waited_s += self._clock() - traced.since
            traced.since = None

    def prefetched(self, request: Request, coming: Future[Match]) -> None:
        """What lower tiers have of the request has come up, or cannot."""
        self.goes_on(request)
        traced = self._spans.get(request.request_id)
        if traced is not None and not coming.cancelled() and coming.exception() is None:
            traced.sources = coming.result().sources

    def loaded(self, request: Request, seconds: float, failed_blocks: int) -> None:
        """A copy for the request took so long. Its step waited, unless the request waits alone."""
        traced = self._spans.get(request.request_id)
        if traced is None:
            return
        if traced.since is None:
            traced.waited_s += seconds
        if failed_blocks:
            traced.span.set_attribute(telemetry.FAILED, failed_blocks)

    def admitted(self, request: Request, hit_tokens: int, start: int, block_tokens: int) -> None:
        """The engine took it, with so many tokens that come from kvcache, from block ``start``."""
        traced = self._spans.get(request.request_id)
        if traced is None or not traced.span.is_recording():
            return
        traced.span.set_attribute(telemetry.HIT_TOKENS, hit_tokens)
        end = start + hit_tokens // block_tokens
        below = traced.sources[start:end]
        for number, tier in enumerate(self.tiers):
            tokens = below.count(number) * block_tokens
            if not number:
                tokens += hit_tokens - len(below) * block_tokens
            traced.span.set_attribute(telemetry.tier_tokens(tier), tokens)
        traced.span.add_event(telemetry.ADMITTED)

    def finished(self, request: Request) -> None:
        """End its span."""
        self.goes_on(request)
        traced = self._spans.pop(request.request_id, None)
        if traced is not None:
            telemetry.end_span(traced.span, {telemetry.WAITED: traced.waited_s})

    def close(self) -> None:
        """End all: nothing will be done for them."""
        while self._spans:
            _, traced = self._spans.popitem()
            telemetry.end_span(traced.span, {telemetry.WAITED: traced.waited_s})


def _outer_id(request_id: str) -> str:
    """The id that the sender knows: vLLM adds eight digits to it."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") != "0":
        return request_id
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)
