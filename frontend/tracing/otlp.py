"""Traces and histograms over OTLP/HTTP: the one module that knows OpenTelemetry, imported only where it is asked for.

What a request costs here is making its spans, once, at its end. Queues are bounded, threads of the SDK's own send; an
endpoint that is down costs spans and log lines (one a kind), no request (P8). The SDK's environment variables hold for
whatever no flag says: OTEL_EXPORTER_OTLP_* (headers, time-outs), OTEL_TRACES_SAMPLER, OTEL_BSP_* (queue sizes),
OTEL_METRIC_EXPORT_INTERVAL, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from frontend.tracing.spans import Trace

FLUSH_S: Final = 2.0  # what the last spans may take at the end of the process
# Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
DURATIONS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKENS: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
OUTPUT_TOKENS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
METRIC_ATTRIBUTES: Final = (
    "gen_ai.operation.name",
    "gen_ai.provider.name",
    "gen_ai.request.model",
    "gen_ai.response.model",
)
LOGGERS: Final = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.metrics._internal.export",
)


class Telemetry:
    """Takes traces, and sends them as spans, as histograms, or both. `instance` names this process among its like."""

    def __init__(
        self, *, instance: str, address: str, port: int, traces_endpoint: str | None, metrics_endpoint: str | None
    ) -> None:
        self._faults = _Faults()
        self._server: dict[str, str | int] = {"server.address": address, "server.port": port}
        self._context = TraceContextTextMapPropagator()
        service = os.environ.get("OTEL_SERVICE_NAME", "wholebatch")
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._providers: list[TracerProvider | MeterProvider] = []
        self._exporters: list[_Spans | _Metrics] = []
        self._tracer = None
        self._histograms = None
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_OnceAKind())
        if traces_endpoint is not None:
            spans = _Spans(OTLPSpanExporter(signal_url(traces_endpoint, "traces")), self._faults)
            tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
            tracers.add_span_processor(BatchSpanProcessor(spans))
            self._tracer = tracers.get_tracer("wholebatch")
            self._providers.append(tracers)
            self._exporters.append(spans)
        if metrics_endpoint is not None:
            metrics = _Metrics(OTLPMetricExporter(signal_url(metrics_endpoint, "metrics")), self._faults)
            reader = PeriodicExportingMetricReader(metrics)
            meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
            self._histograms = _Histograms(meters)
            self._providers.append(meters)
            self._exporters.append(metrics)

    def tell(self, trace: Trace) -> None:
        """Record one request that is over. Blocks on nothing."""
        context = self._spans(trace)
        if self._histograms is not None:
            attributes: dict[str, Any] = {name: trace.attributes[name] for name in METRIC_ATTRIBUTES} | self._server
            if trace.error_type is not None:
                attributes["error.type"] = trace.error_type
            self._histograms.record(trace, attributes, context)

    def take_faults(self) -> int:
        """Exports that failed since the last time this was asked."""
        return self._faults.take()

    async def close(self) -> None:
        """Send what is queued, but not for longer than FLUSH_S: an endpoint that is down holds up no end."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            for provider in self._providers:
                provider.shutdown()
            with suppress(RuntimeError):  # the loop may have ended, without these spans
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), FLUSH_S)
        except TimeoutError:
            for exporter in self._exporters:
                exporter.shutdown()  # ends its wait for the next attempt, so that its threads end too

    def _spans(self, trace: Trace) -> Context | None:
        """The request's span and its children. Returns the context that names it."""
        if self._tracer is None:
            return None
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            f"{trace.context.operation} {trace.context.model}".rstrip(),
            context=self._context.extract(trace.context.trace_headers),
            kind=SpanKind.SERVER,
            attributes={**trace.attributes, **self._server},
            start_time=_unix_ns(trace.begin, offset_ns),
        )
        if trace.error_type is not None:
            span.set_attribute("error.type", trace.error_type)
        if trace.has_failed:
            span.set_status(Status(StatusCode.ERROR))
        context = set_span_in_context(span)
        for stage in trace.stages:
            child = self._tracer.start_span(stage.name, context, start_time=_unix_ns(stage.begin, offset_ns))
            child.end(_unix_ns(stage.end, offset_ns))
        span.end(_unix_ns(trace.end, offset_ns))
        return context


def signal_url(endpoint: str, signal: str) -> str:
    """The URL as it is given; where it has no path, the one that OTLP says for the signal."""
    return endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}/v1/{signal}"


def _unix_ns(at: float, offset_ns: int) -> int:
    return round(at * 1e9) + offset_ns


class _Histograms:
    """The three histograms that OpenTelemetry's conventions ask of a generative AI server."""

    def __init__(self, meters: MeterProvider) -> None:
        create = meters.get_meter("wholebatch").create_histogram
        self._duration = create(
            "gen_ai.server.request.duration",
            "s",
            "From a request's arrival to its last output token, or to its failure.",
            explicit_bucket_boundaries_advisory=DURATIONS,
        )
        self._first_token = create(
            "gen_ai.server.time_to_first_token",
            "s",
            "From a request's arrival to its first output token, of requests that ended as they should.",
            explicit_bucket_boundaries_advisory=FIRST_TOKENS,
        )
        self._output_token = create(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per output token after the first, of requests that ended as they should.",
            explicit_bucket_boundaries_advisory=OUTPUT_TOKENS,
        )

    def record(self, trace: Trace, attributes: dict[str, Any], context: Context | None) -> None:
        self._duration.record(trace.end - trace.begin, attributes, context)
        if trace.time_to_first_token_s is not None:
            self._first_token.record(trace.time_to_first_token_s, attributes, context)
        if trace.time_per_output_token_s is not None:
            self._output_token.record(trace.time_per_output_token_s, attributes, context)


# --- faults, which are the exporters' own ---


class _Faults:
    """Failed exports, counted in the SDK's threads and taken by the event loop's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        with self._lock:
            taken, self._count = self._count, 0
        return taken


class _OnceAKind(logging.Filter):
    """Lets through the first line of each kind: a dead endpoint fails every few seconds, for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[object] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.name, record.lineno)  # not the text, of which there is no end
        is_new = place not in self._seen
        self._seen.add(place)
        return is_new


class _Spans(SpanExporter):
    """A span exporter whose failures are counted."""

    def __init__(self, inner: SpanExporter, faults: _Faults) -> None:
        self._inner = inner
        self._faults = faults

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._faults.add()
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()


class _Metrics(MetricExporter):
    """A metrics exporter whose failures are counted."""

    def __init__(self, inner: MetricExporter, faults: _Faults) -> None:
        super().__init__()
        self._inner = inner
        self._faults = faults

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any) -> MetricExportResult:
        result = self._inner.export(metrics_data, timeout_millis, **more)
        if result is not MetricExportResult.SUCCESS:
            self._faults.add()
        return result

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return self._inner.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        self._inner.shutdown(timeout_millis, **more)
