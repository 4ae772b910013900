"""An OTLP collector in this process: it keeps the spans and metrics that other processes export.

A test points the `OTEL_*` variables of a process to it. One server speaks gRPC and one HTTP, on
loopback, on ports that the system chooses. Spans and metrics are kept as plain values, each with
its resource and its scope.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from kvcache.closeable import Closeable

LONG = 60.0  # the most seconds that a test waits for an export that happens

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """A span that has ended. Ids are in hex, `parent_id` is "" for a root span, times are in ns."""

    name: str
    kind: str  # "INTERNAL", "SERVER", ...
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Values
    links: tuple[tuple[str, str], ...]  # trace id and span id
    events: tuple[tuple[str, Values], ...]
    error: bool
    scope: str
    resource: Values


@dataclass(frozen=True, slots=True)
class Metric:
    """One export of one instrument; each point has attributes and a value (a histogram's sum)."""

    name: str
    unit: str
    kind: str  # "sum", "gauge", "histogram", ...
    points: tuple[tuple[Values, float], ...]
    scope: str
    resource: Values


class OtlpCollector(Closeable):
    """Collects until it is closed; `with` closes it. Safe to read while it receives."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._spans: list[Span] = []
        self._metrics: list[Metric] = []
        self._grpc = grpc.server(ThreadPoolExecutor(4))
        trace_grpc.add_TraceServiceServicer_to_server(_Traces(self), self._grpc)  # type: ignore[no-untyped-call]
        metrics_grpc.add_MetricsServiceServicer_to_server(_Metrics(self), self._grpc)  # type: ignore[no-untyped-call]
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._http = _Http(self)
        self._thread = Thread(target=self._http.serve_forever, args=(0.05,))
        self.grpc_endpoint = f"http://127.0.0.1:{port}"
        self.http_endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._grpc.start()
        self._thread.start()

    def endpoint(self, protocol: str) -> str:
        """The endpoint for a value of `OTEL_EXPORTER_OTLP_PROTOCOL`: "grpc" or "http/protobuf"."""
        return {"grpc": self.grpc_endpoint, "http/protobuf": self.http_endpoint}[protocol]

    @property
    def spans(self) -> list[Span]:
        """The spans received so far."""
        with self._changed:
            return self._spans[:]

    @property
    def metrics(self) -> list[Metric]:
        """The metrics received so far."""
        with self._changed:
            return self._metrics[:]

    def wait_spans(self, count: int, timeout: float = LONG) -> list[Span]:
        """Wait until `count` spans were received, and return all spans."""
        return self.wait(lambda spans: len(spans) >= count, timeout)

    def wait(self, enough: Callable[[list[Span]], bool], timeout: float = LONG) -> list[Span]:
        """Wait until `enough` is true of the spans received, and return them.

        Raises:
            AssertionError: after `timeout` seconds, with the names of the spans received.
        """
        with self._changed:
            received = self._changed.wait_for(lambda: enough(self._spans), timeout)
            assert received, f"after {timeout} s only {[span.name for span in self._spans]}"
            return self._spans[:]

    def wait_metrics(
        self, enough: Callable[[list[Metric]], bool], timeout: float = LONG
    ) -> list[Metric]:
        """Wait until `enough` is true of the metrics received, as `wait` does."""
        with self._changed:
            received = self._changed.wait_for(lambda: enough(self._metrics), timeout)
            assert received, f"after {timeout} s only {[metric.name for metric in self._metrics]}"
            return self._metrics[:]

    def add(self, spans: Iterable[Span] = (), metrics: Iterable[Metric] = ()) -> None:
        """Keep the spans and metrics of one export request."""
        with self._changed:
            self._spans += spans
            self._metrics += metrics
            self._changed.notify_all()

    def close(self) -> None:
        """Stop both servers."""
        self._grpc.stop(None).wait()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


# The gRPC services and the HTTP server


class _Traces(trace_grpc.TraceServiceServicer):
    def __init__(self, collector: OtlpCollector) -> None:
        self._collector = collector

    def Export(  # noqa: N802 - gRPC's name
        self, request: trace_service.ExportTraceServiceRequest, context: object
    ) -> trace_service.ExportTraceServiceResponse:
        self._collector.add(spans=_spans(request))
        return trace_service.ExportTraceServiceResponse()


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, collector: OtlpCollector) -> None:
        self._collector = collector

    def Export(  # noqa: N802 - gRPC's name
        self, request: metrics_service.ExportMetricsServiceRequest, context: object
    ) -> metrics_service.ExportMetricsServiceResponse:
        self._collector.add(metrics=_metrics(request))
        return metrics_service.ExportMetricsServiceResponse()


class _Http(ThreadingHTTPServer):
    def __init__(self, collector: OtlpCollector) -> None:
        super().__init__(("127.0.0.1", 0), _ExportHandler)
        self.collector = collector


class _ExportHandler(BaseHTTPRequestHandler):
    server: _Http

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        response: bytes
        if self.headers.get("Content-Type") != "application/x-protobuf":
            self.send_error(415)
            return
        if self.path == "/v1/traces":
            traces = trace_service.ExportTraceServiceRequest.FromString(body)
            self.server.collector.add(spans=_spans(traces))
            response = trace_service.ExportTraceServiceResponse().SerializeToString()
        elif self.path == "/v1/metrics":
            metrics = metrics_service.ExportMetricsServiceRequest.FromString(body)
            self.server.collector.add(metrics=_metrics(metrics))
            response = metrics_service.ExportMetricsServiceResponse().SerializeToString()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Log no requests."""


# From OTLP messages to plain values


def _spans(request: trace_service.ExportTraceServiceRequest) -> list[Span]:
    return [
        Span(
            name=sent.name,
            kind=SpanMessage.SpanKind.Name(sent.kind).removeprefix("SPAN_KIND_"),
            trace_id=sent.trace_id.hex(),
            span_id=sent.span_id.hex(),
            parent_id=sent.parent_span_id.hex(),
            start_ns=sent.start_time_unix_nano,
            end_ns=sent.end_time_unix_nano,
            attributes=_values(sent.attributes),
            links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in sent.links),
            events=tuple((event.name, _values(event.attributes)) for event in sent.events),
            error=sent.status.code == Status.STATUS_CODE_ERROR,
            scope=scoped.scope.name,
            resource=_values(group.resource.attributes),
        )
        for group in request.resource_spans
        for scoped in group.scope_spans
        for sent in scoped.spans
    ]


def _metrics(request: metrics_service.ExportMetricsServiceRequest) -> list[Metric]:
    found = []
    for group in request.resource_metrics:
        for scoped in group.scope_metrics:
            for sent in scoped.metrics:
                kind = sent.WhichOneof("data") or ""
                points = tuple(
                    (_values(point.attributes), _number(point))
                    for point in getattr(sent, kind).data_points
                )
                resource = _values(group.resource.attributes)
                found.append(
                    Metric(sent.name, sent.unit, kind, points, scoped.scope.name, resource)
                )
    return found


def _number(point: Any) -> float:
    if hasattr(point, "sum"):  # a histogram's point
        return float(point.sum)
    return float(getattr(point, point.WhichOneof("value")))


def _values(attributes: Sequence[Any]) -> Values:
    return {pair.key: _value(pair.value) for pair in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
