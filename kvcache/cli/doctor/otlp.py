"""Check that the OTLP endpoint of the environment accepts a span."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcache.cli.doctor.result import CheckResult, fail, ok, warn
from kvcache.inputs import call_within
from kvcache.secrets import redact

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

PREFIX = "OTEL_EXPORTER_OTLP_"
SPAN = "kvcache.doctor"
# By protocol: the exporter's package, and the usual port of a collector.
_PROTOCOLS = {"grpc": ("grpc", 4317), "http/protobuf": ("http", 4318)}


def check(
    environ: Mapping[str, str] = os.environ, *, timeout_s: float = 5.0
) -> Iterator[CheckResult]:
    """Yield one result if a variable of OTLP is set, else none.

    ``timeout_s`` is for one attempt to send the span; the exporter may try twice.
    """
    if any(name.startswith(PREFIX) and value for name, value in environ.items()):
        yield _check_endpoint(environ, timeout_s)


def _check_endpoint(environ: Mapping[str, str], timeout_s: float) -> CheckResult:
    protocol = _variable(environ, "PROTOCOL") or "grpc"
    if protocol not in _PROTOCOLS:
        return fail(
            "otlp",
            f"{PREFIX}PROTOCOL is {protocol!r}",
            f"{PREFIX}PROTOCOL={' or '.join(_PROTOCOLS)}",
        )
    package, port = _PROTOCOLS[protocol]
    endpoint = redact(_variable(environ, "ENDPOINT")) or f"http://localhost:{port}"
    where = f"{endpoint} ({protocol})"
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return warn(
            "otlp", f"{where}: OTEL_SDK_DISABLED is true, so spans are not sent", "unset it"
        )
    try:
        module: Any = import_module(f"opentelemetry.exporter.otlp.proto.{package}.trace_exporter")
        span = _ended_span()
    except ImportError as error:
        return warn(
            "otlp",
            f"{where}: the SDK or the exporter is not installed, so spans are not sent ({error})",
            "pip install 'kvcache[otel]'",
        )
    with _captured_log() as messages:
        exporter = module.OTLPSpanExporter(timeout=timeout_s)
        try:
            accepted = call_within(2 * timeout_s, lambda: exporter.export([span]).name == "SUCCESS")
        except Exception as error:  # noqa: BLE001 - any exception means that the span was not sent
            accepted = False
            messages.append(f"{type(error).__name__}: {error}")
        finally:
            with suppress(TimeoutError):
                call_within(timeout_s, exporter.shutdown)
    if accepted:
        return ok("otlp", f"{where} accepted a span")
    # The last message may only say that the exporter gave up; the longest one has the cause.
    cause = f": {redact(max(messages, key=len))}" if messages else ""
    return fail(
        "otlp",
        f"{where} did not accept a span{cause}",
        f"start a collector there, or set {PREFIX}ENDPOINT (usually port 4317 for grpc, 4318 for "
        f"http/protobuf) and {PREFIX}PROTOCOL",
    )


def _variable(environ: Mapping[str, str], name: str) -> str:
    """Return the variable for traces, else the one for all signals."""
    return environ.get(f"{PREFIX}TRACES_{name}") or environ.get(f"{PREFIX}{name}") or ""


def _ended_span() -> ReadableSpan:
    """Return a span that has ended; it is recorded whatever sampler the environment sets."""
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    span = TracerProvider(sampler=ALWAYS_ON).get_tracer("kvcache").start_span(SPAN)
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collect the exporter's log messages, and keep them off the terminal."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("opentelemetry")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
