"""Spans through the OpenTelemetry API alone: the application, or ``OTEL_*``, installs the SDK.

::

    request                                   an engine's request, under the caller's span
        lookup | load | prefetch | store      one per operation of the stack
            tier.contains | tier.load         one per lower tier that the operation calls
            copy                              one per worker that copies for the operation
    tier.store                                write-behind: a trace of its own, linked to its store

Invariants:

* There is one span per operation and one per tier that it calls, never one per block.
* Without a recording tracer a span costs about a microsecond: nothing is attached to the current
  context, and attributes are built only for spans that record.
* A child span is created only if its parent is recorded.
* While a tier is called, its span is the current one, so a tier can add spans and events.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

tracer = trace.get_tracer("kvcache")  # a proxy: it also finds a provider installed later
_propagator = TraceContextTextMapPropagator()

REQUEST: Final = "kvcache.request"
LOOKUP: Final = "kvcache.lookup"
LOAD: Final = "kvcache.load"
PREFETCH: Final = "kvcache.prefetch"
STORE: Final = "kvcache.store"
COPY: Final = "kvcache.copy"
TIER_CONTAINS: Final = "kvcache.tier.contains"
TIER_LOAD: Final = "kvcache.tier.load"
TIER_STORE: Final = "kvcache.tier.store"

PROFILE: Final = "kvcache.profile.name"
TIER: Final = "kvcache.tier.name"
KIND: Final = "kvcache.tier.type"
REQUESTED: Final = "kvcache.block.requested"
HIT: Final = "kvcache.block.hit"
L1_HIT: Final = "kvcache.l1.block.hit"
ASSUMED: Final = "kvcache.block.assumed"
STORED: Final = "kvcache.block.stored"
KNOWN: Final = "kvcache.block.known"
FAILED: Final = "kvcache.block.failed"
SKIPPED: Final = "kvcache.block.skipped"
DROPPED: Final = "kvcache.block.dropped"
EVICTED: Final = "kvcache.block.evicted"
PROMPT_TOKENS: Final = "kvcache.token.prompt"
HIT_TOKENS: Final = "kvcache.token.hit"
ENGINE_HIT_TOKENS: Final = "kvcache.token.engine_hit"
WAITED: Final = "kvcache.wait.duration"
REQUEST_ID: Final = "kvcache.request.id"
GEN_AI_REQUEST_ID: Final = "gen_ai.request.id"  # the name in vLLM's own spans
GEN_AI_MODEL: Final = "gen_ai.request.model"
DIRECTION: Final = "kvcache.copy.direction"
RANK: Final = "kvcache.rank"
CODEC: Final = "kvcache.codec"
PAYLOAD: Final = "kvcache.payload.size"
QUEUED: Final = "kvcache.queue.duration"
SKIP_REASON: Final = "kvcache.skip.reason"
OBJECT_REQUESTS: Final = "kvcache.object.requests"
ERROR: Final = "error.type"
MESSAGE: Final = "exception.message"

SLOWER: Final = "slower_than_computing"
BREAKER_OPEN: Final = "breaker_open"

ADMITTED: Final = "kvcache.request.admitted"
FRAME_REJECTED: Final = "kvcache.frame.rejected"
REASON: Final = "kvcache.frame.reason"
TIER_FAILED: Final = "kvcache.tier.failed"
BREAKER_OPENED: Final = "kvcache.breaker.opened"
BREAKER_CLOSED: Final = "kvcache.breaker.closed"
BLOCKS_DROPPED: Final = "kvcache.blocks.dropped"

Attributes = Mapping[str, str | int | float]


def tier_tokens(tier: str) -> str:
    """Return the name of the attribute that holds the number of tokens found in ``tier``."""
    return f"kvcache.token.tier.{tier}"


def group_tokens(kind: str) -> str:
    """Return the name of the attribute that holds the tokens of a hit that a group needs.

    A request has it if the groups of this kind, such as ``window``, need fewer tokens than the hit.
    """
    return f"kvcache.token.group.{kind}"


def start_span(name: str, parent: Context | None, begun_ns: int | None = None) -> Span:
    """Start a span under ``parent``; ``None`` is the current context. :func:`end_span` ends it.

    ``begun_ns`` is the start time in ns since 1970; ``None`` is now.
    """
    return tracer.start_span(name, parent, start_time=begun_ns)


def start_child(parent: Span, name: str) -> Span:
    """Start a span under ``parent``; return ``INVALID_SPAN`` if ``parent`` is not recorded."""
    if not parent.is_recording():
        return INVALID_SPAN
    return tracer.start_span(name, trace.set_span_in_context(parent))


def start_client_child(parent: Span, name: str, attributes: Attributes) -> Span:
    """Start the span of a call to a server, as :func:`start_child` does.

    ``name`` and ``attributes`` follow OpenTelemetry's conventions for the server's protocol.
    """
    if not parent.is_recording():
        return INVALID_SPAN
    parent_context = trace.set_span_in_context(parent)
    return tracer.start_span(name, parent_context, SpanKind.CLIENT, attributes)


def start_linked(cause: Span | Context | None, name: str) -> Span:
    """Start the root span of a new trace, with a link to the span that caused it.

    Args:
        cause: a span, which may have ended, or the context that has it; ``None`` is the current
            context. If the context has no span, the new span has no link.

    Returns:
        ``INVALID_SPAN`` if the cause is not sampled.
    """
    span = cause if isinstance(cause, Span) else trace.get_current_span(cause)
    linked = span.get_span_context()
    if not linked.trace_flags.sampled and (linked.is_valid or isinstance(cause, Span)):
        return INVALID_SPAN
    return tracer.start_span(name, Context(), links=[Link(linked)] if linked.is_valid else ())


def start_remote_child(headers: Mapping[str, str], name: str, begun_ns: int | None = None) -> Span:
    """Start a span under the span of another process, which sent its :func:`trace_headers`.

    Returns:
        ``INVALID_SPAN`` if ``headers`` is empty.
    """
    if not headers:
        return INVALID_SPAN
    with _unseeded_ids():
        return start_span(name, context_from_headers(headers), begun_ns)


def start_request(headers: Mapping[str, str] | None) -> Span:
    """Start the span of a request, under its caller's span if ``headers`` name one."""
    no_provider = isinstance(tracer, trace.ProxyTracer) and isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider
    )
    if headers or no_provider:
        return start_span(REQUEST, context_from_headers(headers))
    with _unseeded_ids():
        return start_span(REQUEST, Context())


@contextmanager
def _unseeded_ids() -> Iterator[None]:
    """Reseed ``random`` from the system while a span gets its ids, and restore its state.

    SDKs draw ids from ``random``. An engine may seed it with one number in all its processes, as
    vLLM does; without this, two ranks would create the same span id, and two replicas the same
    trace id. The numbers that the engine draws do not change.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def current_span() -> Span:
    """Return this thread's current span."""
    return trace.get_current_span()


def trace_headers(span: Span) -> dict[str, str]:
    """Return ``span`` as W3C Trace Context headers; empty if it is not recorded."""
    headers: dict[str, str] = {}
    if span.is_recording():
        _propagator.inject(headers, trace.set_span_in_context(span))
    return headers


def context_from_headers(headers: Mapping[str, str] | None) -> Context:
    """Return the context in ``headers``; without headers an empty one, which begins a trace."""
    return _propagator.extract(headers, Context()) if headers else Context()


@contextmanager
def use_span(span: Span) -> Iterator[None]:
    """Make ``span`` this thread's current span if it is recorded. Does not end it."""
    if not span.is_recording():
        yield
        return
    token = context.attach(trace.set_span_in_context(span))
    try:
        yield
    finally:
        context.detach(token)


def end_span(
    span: Span, attributes: Attributes, *, error: str | None = None, ended_ns: int | None = None
) -> None:
    """Set ``attributes`` on ``span`` and end it.

    Args:
        error: the kind of failure in one word; ``None`` if there was none.
        ended_ns: the end time in ns since 1970; ``None`` is now.
    """
    if span.is_recording():
        span.set_attributes(attributes)
        if error is not None:
            span.set_attribute(ERROR, error)
            span.set_status(Status(StatusCode.ERROR))
    span.end(ended_ns)
