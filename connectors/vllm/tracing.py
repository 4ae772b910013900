"""A span for each request, from its arrival to its end, under that of whoever sent it.

Always true here: a request has one span at most, and what is done for it goes below; where nobody
records, a request costs a microsecond and carries nothing to the workers.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import telemetry

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Requests:
    """The spans of the requests that have arrived and not ended. ``model`` is its served name."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._spans: dict[str, tuple[Span, Context]] = {}

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
        span = telemetry.request(headers)
        self._spans[request.request_id] = span, trace.set_span_in_context(span)
        if span.is_recording():
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
        return self._spans[request.request_id][1]

    def asks(self, request: Request, own_tokens: int) -> Context:
        """The engine has so many tokens of it itself, and asks for more; gives its context."""
        context = self.context(request)
        self._spans[request.request_id][0].set_attribute(telemetry.OWN_TOKENS, own_tokens)
        return context

    def admitted(self, request: Request, hit_tokens: int) -> None:
        """The engine took it, with so many tokens that come from kvcache."""
        span, _ = self._spans.get(request.request_id, (trace.INVALID_SPAN, None))
        span.set_attribute(telemetry.HIT_TOKENS, hit_tokens)
        span.add_event(telemetry.ADMITTED)

    def finished(self, request: Request) -> None:
        """End its span."""
        span, _ = self._spans.pop(request.request_id, (trace.INVALID_SPAN, None))
        span.end()

    def close(self) -> None:
        """End all: nothing will be done for them."""
        while self._spans:
            _, (span, _) = self._spans.popitem()
            span.end()


def _outer_id(request_id: str) -> str:
    """The id that the sender knows: vLLM adds eight digits to it."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") != "0":
        return request_id
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)
