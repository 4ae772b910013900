"""Whether the OTLP endpoint that the environment names takes a span. Asked with one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcache.cli.doctor.result import Result, fail, ok, warn
from kvcache.inputs import call_within
from kvcache.secrets import redact

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

PREFIX = "OTEL_EXPORTER_OTLP_"
SPAN = "kvcache.doctor"
_WAIT_S = 5.0
_FOLDERS = {"grpc": ("grpc", 4317), "http/protobuf": ("http", 4318)}  # and the usual port


def check(environ: Mapping[str, str] = os.environ) -> Iterator[Result]:
    """Nothing where the environment says nothing of OTLP; else one result."""
    if any(name.startswith(PREFIX) and value for name, value in environ.items()):
        yield _ask(environ)


def _ask(environ: Mapping[str, str]) -> Result:
    protocol = _said(environ, "PROTOCOL") or "grpc"
    if protocol not in _FOLDERS:
        return fail(
            "otlp",
            f"{PREFIX}PROTOCOL is {protocol!r}",
            f"{PREFIX}PROTOCOL={' or '.join(_FOLDERS)}",
        )
    folder, port = _FOLDERS[protocol]
    where = f"{redact(_said(environ, 'ENDPOINT')) or f'http://localhost:{port}'} ({protocol})"
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return warn("otlp", f"{where}: no span is sent, OTEL_SDK_DISABLED is true", "unset it")
    try:
        exporters: Any = import_module(f"opentelemetry.exporter.otlp.proto.{folder}.trace_exporter")
        span = _probe()
    except ImportError as error:
        return warn(
            "otlp",
            f"{where}: no span is sent, since there is no SDK or exporter ({error})",
            "pip install 'kvcache[otel]'",
        )
    with _heard() as reasons:
        exporter = exporters.OTLPSpanExporter(timeout=_WAIT_S)
        try:
            taken = call_within(2 * _WAIT_S, lambda: exporter.export([span]).name == "SUCCESS")
        except Exception as error:  # noqa: BLE001 - whatever it is, the span did not arrive
            taken = False
            reasons.append(f"{type(error).__name__}: {error}")
        finally:
            with suppress(TimeoutError):
                call_within(_WAIT_S, exporter.shutdown)
    if taken:
        return ok("otlp", f"{where} took a span")
    # The last one may only say that it was given up; the longest has the cause.
    why = f": {redact(max(reasons, key=len))}" if reasons else ""
    return fail(
        "otlp",
        f"{where} took no span{why}",
        f"start a collector there, or set {PREFIX}ENDPOINT (usually port 4317 for grpc, 4318 for "
        f"http/protobuf) and {PREFIX}PROTOCOL",
    )


def _said(environ: Mapping[str, str], name: str) -> str:
    """What the environment says for traces, else for all signals."""
    return environ.get(f"{PREFIX}TRACES_{name}") or environ.get(f"{PREFIX}{name}") or ""


def _probe() -> ReadableSpan:
    """A span that has ended; it is recorded whatever sampler the environment names."""
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    span = TracerProvider(sampler=ALWAYS_ON).get_tracer("kvcache").start_span(SPAN)
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the exporter says while it tries; for the result, and not for the terminal."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("opentelemetry"), Listener()
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagates
