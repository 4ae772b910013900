"""Spans, through the OpenTelemetry API alone: the application, or ``OTEL_*``, brings the SDK.

Always true here:

* One span per operation on a request's blocks, never one per block.
* Without a recording tracer a span costs a microsecond: nothing is attached to the current context,
  and attributes are put together only for a span that records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode

_tracer = trace.get_tracer("kvcache")  # a proxy: it finds a provider that is installed later

LOOKUP: Final = "kvcache.lookup"
LOAD: Final = "kvcache.load"
STORE: Final = "kvcache.store"

PROFILE: Final = "kvcache.profile.name"
REQUESTED: Final = "kvcache.block.requested"
HIT: Final = "kvcache.block.hit"
STORED: Final = "kvcache.block.stored"
FAILED: Final = "kvcache.block.failed"
PAYLOAD: Final = "kvcache.payload.size"


def start(name: str, context: Context | None) -> Span:
    """Begin a span under ``context``, ``None`` being the current one; :func:`end` ends it."""
    return _tracer.start_span(name, context)


def end(span: Span, attributes: Mapping[str, str | int], *, error: str | None = None) -> None:
    """End ``span`` with its attributes; ``error`` is what went wrong, in a word."""
    if span.is_recording():
        span.set_attributes(attributes)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR))
    span.end()
