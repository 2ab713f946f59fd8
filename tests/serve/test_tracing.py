"""Tests of tracing: span names, the client's trace context, and no prompts in spans."""

from __future__ import annotations

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from moesaic.errors import InvalidRequest
from moesaic.serve.tracing import Tracer
from tests.support.backend import Script
from tests.support.http import CHAT
from tests.support.require import require_package

require_package("opentelemetry.exporter.otlp.proto.http")
SECRET = "the-secret-prompt"


@pytest.fixture
def collector(monkeypatch):
    """Requests that an OpenTelemetry collector has received."""
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield received
    server.shutdown()
    server.server_close()
    thread.join()


def spans(received) -> list:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    decoded = []
    for path, body in received:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                decoded += scope.spans
    return decoded


def attributes(span) -> dict:
    values = {}
    for attribute in span.attributes:
        value = attribute.value
        kind = value.WhichOneof("value")
        values[attribute.key] = (
            [item.string_value for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)
        )
    return values


def test_spans_have_current_names_and_no_prompts(server, collector):
    server.app.services = replace(server.app.services, tracer=Tracer())
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "tracestate": "vendor=1"}
    body = CHAT | {"messages": [{"role": "user", "content": SECRET}], "user": SECRET, "stop": [SECRET]}
    sampled = {"temperature": 0.5, "max_tokens": 3, "seed": 7, "top_p": 0.9, "frequency_penalty": 1}
    httpx.post(server.url + "/v1/chat/completions", json=body | sampled, headers=headers)
    httpx.post(server.url + "/v1/completions", json={"prompt": SECRET, "stream": True})
    server.backend.script = Script(refusal=InvalidRequest(SECRET))
    httpx.post(server.url + "/v1/completions", json={"prompt": SECRET}, headers={"traceparent": "nonsense"})
    server.app.services.tracer.close()
    chat, text, refused = sorted(spans(collector), key=lambda span: span.start_time_unix_nano)
    assert SECRET.encode() not in b"".join(body for _, body in collector)
    assert chat.name == "chat scripted" and chat.kind == 2  # SPAN_KIND_SERVER
    assert chat.trace_id.hex() == trace and chat.parent_span_id.hex() == parent
    assert text.trace_id.hex() != trace and not text.parent_span_id and not refused.parent_span_id
    chat_attributes = attributes(chat)
    assert chat_attributes.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert chat_attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "moesaic",
        "gen_ai.request.model": "scripted",
        "gen_ai.response.model": "scripted",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.frequency_penalty": 1,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 3,
    }
    assert text.name == "text_completion scripted"
    assert attributes(refused)["error.type"] == "InvalidRequest" and refused.status.code == 2
    assert "error.type" not in attributes(text)


def test_an_unreachable_collector_delays_no_request(server, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    server.app.services = replace(server.app.services, tracer=Tracer())
    assert httpx.post(server.url + "/v1/chat/completions", json=CHAT).status_code == 200
    server.app.services.tracer.close()


def test_a_missing_opentelemetry_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidRequest, match=r"moesaic\[otel\]"):
        Tracer()
