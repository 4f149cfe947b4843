"""An OTLP/HTTP receiver on loopback, in this process, that keeps what it is sent."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as Python values."""
    return {pair.key: _plain(pair.value) for pair in attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_plain(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)


class Receiver:
    """What came, decoded; `status` is what every export is answered with."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.bodies: list[bytes] = []
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []

    def take(self, path: str, body: bytes) -> int:
        if self.status == 200:
            self.bodies.append(body)
            if path == "/v1/traces":
                self.traces.append(ExportTraceServiceRequest.FromString(body))
            elif path == "/v1/metrics":
                self.metrics.append(ExportMetricsServiceRequest.FromString(body))
            else:
                return 404
        return self.status

    def spans(self) -> list[Span]:
        return [
            span
            for request in self.traces
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def roots(self) -> list[Span]:
        """The spans of requests."""
        return [span for span in self.spans() if span.kind == Span.SPAN_KIND_SERVER]

    def children(self, parent: Span) -> list[Span]:
        """In the order of their beginnings."""
        found = [span for span in self.spans() if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))

    def resources(self) -> list[dict[str, Any]]:
        return [plain(resource.resource.attributes) for r in self.traces for resource in r.resource_spans]

    def newest_metrics(self) -> dict[str, list[Metric]]:
        """By name, the last that each process sent."""
        newest: dict[tuple[str, str], Metric] = {}
        for request in self.metrics:
            for resource in request.resource_metrics:
                instance = plain(resource.resource.attributes)["service.instance.id"]
                for scope in resource.scope_metrics:
                    newest |= {(metric.name, instance): metric for metric in scope.metrics}
        found: dict[str, list[Metric]] = {}
        for (name, _), metric in newest.items():
            found.setdefault(name, []).append(metric)
        return found


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Listens until it is left."""
    receiver = Receiver()

    class Exports(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status = receiver.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Exports) as server:
        server.daemon_threads = True
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield receiver
        finally:
            server.shutdown()
