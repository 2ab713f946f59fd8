"""Traces for OpenTelemetry, one span for each request, in the words of its conventions for generative models.

Optional: ``pip install 'moesaic[otel]'``, and OTEL_EXPORTER_OTLP_ENDPOINT says where they go. Prompts and answers
are never in them. Follows https://opentelemetry.io/docs/specs/semconv/gen-ai/ (status: development).
"""

from __future__ import annotations

from typing import Any

from moesaic.backend import GenerationRequest
from moesaic.errors import InvalidRequest

SAMPLED = ("temperature", "top_p", "top_k", "max_tokens", "seed", "frequency_penalty", "presence_penalty")


WELL = ("stop", "length", "cancelled")
"""How a request ends without an error."""


class Span:
    """A request's span."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, reason: str, prompt: int, cached: int, generated: int, first: float | None) -> None:
        """End it: why, after how many tokens, the first of them after how many seconds."""
        figures = {"input_tokens": prompt, "cache_read.input_tokens": cached, "output_tokens": generated}
        self._span.set_attributes({f"gen_ai.usage.{name}": value for name, value in figures.items()})
        if first is not None:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", first)
        if reason in WELL:
            self._span.set_attribute("gen_ai.response.finish_reasons", (reason,))
        else:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", reason)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Tracer:
    """Begins spans."""

    def __init__(self, service: str = "moesaic") -> None:
        """Set the exporter up.

        Raises:
            InvalidRequest: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise InvalidRequest("traces need OpenTelemetry: pip install 'moesaic[otel]'") from error
        self._context = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("moesaic")

    def begin(self, request: GenerationRequest, traceparent: str | None = None, tracestate: str | None = None) -> Span:
        """Return the span of a request, in the trace that its client is in, if it says so (W3C Trace Context)."""
        from opentelemetry.trace import SpanKind

        operation = "chat" if request.messages is not None else "text_completion"
        named = {f"gen_ai.request.{name}": request.sampling[name] for name in SAMPLED if name in request.sampling}
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "moesaic",
            "gen_ai.request.model": request.model,
            "gen_ai.response.model": request.model,
            "gen_ai.request.choice.count": request.sampling.get("n", 1),
            **named,
        }
        told = {"traceparent": traceparent or "", "tracestate": tracestate or ""}
        parent = self._context.extract({name: value for name, value in told.items() if value})
        name = f"{operation} {request.model}"
        return Span(self._tracer.start_span(name, parent, SpanKind.SERVER, attributes=attributes))

    def close(self) -> None:
        """Send what has not gone out yet."""
        self._provider.shutdown()
