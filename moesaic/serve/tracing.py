"""OpenTelemetry traces: one span for each generation, with OpenTelemetry's attribute names for generative AI.

Optional: ``pip install 'moesaic[otel]'``; OTEL_EXPORTER_OTLP_ENDPOINT names the collector. Prompts and answers are
never part of a trace. Follows https://opentelemetry.io/docs/specs/semconv/gen-ai/ (status: development).
"""

from __future__ import annotations

from typing import Any

from moesaic.backend import GenerationRequest
from moesaic.errors import InvalidRequest

SAMPLING_ATTRIBUTES = ("temperature", "top_p", "top_k", "max_tokens", "seed", "frequency_penalty", "presence_penalty")

SUCCESS_REASONS = ("stop", "length", "cancelled")
"""Values of ``reason`` with which a generation ends without an error."""


class Span:
    """The OpenTelemetry span of one generation request."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, reason: str, prompt: int, cached: int, generated: int, first: float | None) -> None:
        """End the span.

        Args:
            reason: the finish reason, or the name of the error class.
            prompt: number of tokens of the prompt.
            cached: number of tokens of the prompt that were in the cache.
            generated: number of tokens of all answers.
            first: seconds until the first token; None: no token was generated.
        """
        usage = {"input_tokens": prompt, "cache_read.input_tokens": cached, "output_tokens": generated}
        self._span.set_attributes({f"gen_ai.usage.{name}": value for name, value in usage.items()})
        if first is not None:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", first)
        if reason in SUCCESS_REASONS:
            self._span.set_attribute("gen_ai.response.finish_reasons", (reason,))
        else:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", reason)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Tracer:
    """Starts spans and exports ended spans to the collector of traces."""

    def __init__(self, service: str = "moesaic") -> None:
        """Set up the exporter. ``service`` is the name of this service in the traces.

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
            raise InvalidRequest("traces require OpenTelemetry: pip install 'moesaic[otel]'") from error
        self._context = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("moesaic")

    def begin(self, request: GenerationRequest, traceparent: str | None = None, tracestate: str | None = None) -> Span:
        """Start the span of a generation request and return it.

        ``traceparent`` and ``tracestate`` are the client's headers (W3C Trace Context). If the client sent them, the
        span is a part of its trace.
        """
        from opentelemetry.trace import SpanKind

        operation = "chat" if request.messages is not None else "text_completion"
        sampling = {
            f"gen_ai.request.{name}": request.sampling[name] for name in SAMPLING_ATTRIBUTES if name in request.sampling
        }
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "moesaic",
            "gen_ai.request.model": request.model,
            "gen_ai.response.model": request.model,
            "gen_ai.request.choice.count": request.sampling.get("n", 1),
            **sampling,
        }
        carrier = {"traceparent": traceparent or "", "tracestate": tracestate or ""}
        parent = self._context.extract({name: value for name, value in carrier.items() if value})
        name = f"{operation} {request.model}"
        return Span(self._tracer.start_span(name, parent, SpanKind.SERVER, attributes=attributes))

    def close(self) -> None:
        """Export the remaining spans and shut down the exporter."""
        self._provider.shutdown()
