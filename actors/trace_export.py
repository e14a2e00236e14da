"""Where spans go: to the collector that OpenTelemetry's own variables name, over OTLP and HTTP."""

from __future__ import annotations

from typing import Any


def otlp() -> list[Any]:
    """For Serve's `RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH`; `OTEL_EXPORTER_OTLP_ENDPOINT` and the like say the rest."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]
