"""Spans of the requests that a secondary tier works for, and of its operations for them.

A request's span is below the caller's if ``kv_transfer_params`` of the request has a
``traceparent``: vLLM passes a secondary tier no other header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.connectors.vllm.scheduler.tracing import caller_headers, outer_id

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import ReqContext


class OffloadedRequestSpans:
    """The spans of the requests that have not ended. ``model`` is the model's name."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._spans: dict[str, Span] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def start(self, request: ReqContext) -> None:
        """Start the span of a request."""
        params: dict[str, Any] = request.kv_transfer_params or {}
        span = telemetry.start_request(caller_headers(params))
        self._spans[request.req_id] = span
        if span.is_recording():
            span.set_attributes(
                {
                    telemetry.REQUEST_ID: request.req_id,
                    telemetry.GEN_AI_REQUEST_ID: outer_id(request.req_id),
                    telemetry.GEN_AI_MODEL: self._model,
                }
            )

    def start_operation(self, request_id: str, name: str) -> Span:
        """Start the span of a lookup, load or store for a request."""
        return telemetry.start_child(self._spans.get(request_id, INVALID_SPAN), name)

    def finish(self, request_id: str) -> None:
        """End the span of a request."""
        span = self._spans.pop(request_id, None)
        if span is not None:
            telemetry.end_span(span, {})

    def close(self) -> None:
        """End all spans: the engine shuts down."""
        for request_id in list(self._spans):
            self.finish(request_id)
