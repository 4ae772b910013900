"""Spans, through the OpenTelemetry API alone: the application, or ``OTEL_*``, brings the SDK.

::

    request                                   an engine's, under its caller's span
        lookup | load | prefetch | store      one per operation on its blocks
            tier.contains | tier.load         one per tier that it touches
            copy                              in every worker that copies under it
    tier.store                                later, of its own trace: linked to its store

Always true here:

* One span per operation and one per tier it touches, never one per block.
* Without a recording tracer a span costs a microsecond: nothing is attached to the current context,
  and attributes are put together only for a span that records.
* What is below a span follows its decision: if it is not recorded, they cost nothing.
* While a tier is called, its span is the current one: a tier may add spans and events of its own.
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

_tracer = trace.get_tracer("kvcache")  # a proxy: it finds a provider that is installed later
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
STORED: Final = "kvcache.block.stored"
KNOWN: Final = "kvcache.block.known"
FAILED: Final = "kvcache.block.failed"
SKIPPED: Final = "kvcache.block.skipped"
DROPPED: Final = "kvcache.block.dropped"
EVICTED: Final = "kvcache.block.evicted"
PROMPT_TOKENS: Final = "kvcache.token.prompt"
HIT_TOKENS: Final = "kvcache.token.hit"
OWN_TOKENS: Final = "kvcache.token.engine_hit"
WAITED: Final = "kvcache.wait.duration"
REQUEST_ID: Final = "kvcache.request.id"
GEN_AI_REQUEST_ID: Final = "gen_ai.request.id"  # as vLLM's own spans have it
GEN_AI_MODEL: Final = "gen_ai.request.model"
DIRECTION: Final = "kvcache.copy.direction"
RANK: Final = "kvcache.rank"
CODEC: Final = "kvcache.codec"
PAYLOAD: Final = "kvcache.payload.size"
QUEUED: Final = "kvcache.queue.duration"
SKIP: Final = "kvcache.skip.reason"
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
    """The attribute that has how many tokens came from a tier of this name."""
    return f"kvcache.token.tier.{tier}"


def start(name: str, above: Context | None, begun_ns: int | None = None) -> Span:
    """Begin a span under ``above``, ``None`` being the current one; :func:`end` ends it.

    ``begun_ns`` is when it began, in ns since 1970; ``None`` is now.
    """
    return _tracer.start_span(name, above, start_time=begun_ns)


def below(span: Span, name: str) -> Span:
    """Begin a span under ``span``; it is none where that one is not recorded."""
    if not span.is_recording():
        return INVALID_SPAN
    return _tracer.start_span(name, trace.set_span_in_context(span))


def client(span: Span, name: str, attributes: Attributes) -> Span:
    """As :func:`below`, of a call to a server: by the conventions of what it speaks."""
    if not span.is_recording():
        return INVALID_SPAN
    above = trace.set_span_in_context(span)
    return _tracer.start_span(name, above, SpanKind.CLIENT, attributes)


def after(cause: Span | Context | None, name: str) -> Span:
    """Begin a span of a trace of its own, with a link to its cause, which may have ended.

    Of a context the cause is the span, ``None`` being the current one; without any, no link.
    """
    span = cause if isinstance(cause, Span) else trace.get_current_span(cause)
    whose = span.get_span_context()
    if not whose.trace_flags.sampled and (whose.is_valid or isinstance(cause, Span)):
        return INVALID_SPAN
    return _tracer.start_span(name, Context(), links=[Link(whose)] if whose.is_valid else ())


def beyond(headers: Mapping[str, str], name: str, begun_ns: int | None = None) -> Span:
    """As :func:`start`, under a span of another process, which :func:`carried` the headers."""
    if not headers:
        return INVALID_SPAN
    with _ids_of_our_own():
        return start(name, caller(headers), begun_ns)


def request(headers: Mapping[str, str] | None) -> Span:
    """Begin the span of a request, under its caller's if ``headers`` carry one."""
    unheard = isinstance(_tracer, trace.ProxyTracer) and isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider
    )
    if headers or unheard:
        return start(REQUEST, caller(headers))
    with _ids_of_our_own():
        return start(REQUEST, Context())


@contextmanager
def _ids_of_our_own() -> Iterator[None]:
    """Have a trace or span that begins here an id that no other process gives.

    SDKs draw ids from ``random``, which an engine may seed alike in all its processes, as vLLM
    does: two ranks' spans would be one, and two replicas' traces. What the engine draws stays.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def current() -> Span:
    """The span of what this thread does now."""
    return trace.get_current_span()


def carried(span: Span) -> dict[str, str]:
    """``span`` as W3C Trace Context headers for another process; none where it is not recorded."""
    headers: dict[str, str] = {}
    if span.is_recording():
        _propagator.inject(headers, trace.set_span_in_context(span))
    return headers


def caller(headers: Mapping[str, str] | None) -> Context:
    """The context that ``headers`` carry; without any, that of a trace of its own."""
    return _propagator.extract(headers, Context()) if headers else Context()


@contextmanager
def within(span: Span) -> Iterator[None]:
    """Make ``span`` the current one of this thread, if it is recorded; does not end it."""
    if not span.is_recording():
        yield
        return
    token = context.attach(trace.set_span_in_context(span))
    try:
        yield
    finally:
        context.detach(token)


def end(
    span: Span, attributes: Attributes, *, error: str | None = None, ended_ns: int | None = None
) -> None:
    """End ``span`` with its attributes; ``error`` is what went wrong, in a word.

    ``ended_ns`` is when it ended, in ns since 1970; ``None`` is now.
    """
    if span.is_recording():
        span.set_attributes(attributes)
        if error is not None:
            span.set_attribute(ERROR, error)
            span.set_status(Status(StatusCode.ERROR))
    span.end(ended_ns)
