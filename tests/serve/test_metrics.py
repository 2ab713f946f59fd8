"""Tests of the metrics: counts, names that dashboards use, and a bounded number of series."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moesaic.backend import ModelStats
from moesaic.errors import NumericalError, Overloaded
from tests.support.backend import Script, ScriptedBackend
from tests.support.http import CHAT, Raw, post
from tests.support.server import running
from tests.support.wait import eventually

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"

VLLM = """
num_requests_running num_requests_waiting num_requests_swapped kv_cache_usage_perc gpu_cache_usage_perc
prompt_tokens_total generation_tokens_total request_success_total prefix_cache_queries_total prefix_cache_hits_total
num_preemptions_total spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket time_per_output_token_seconds_bucket
request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket e2e_request_latency_seconds_sum
e2e_request_latency_seconds_count request_queue_time_seconds_sum request_inference_time_seconds_sum
request_decode_time_seconds_sum request_prompt_tokens_bucket request_generation_tokens_bucket
request_max_num_generation_tokens_bucket request_params_n_bucket request_params_max_tokens_bucket
""".split()
"""vLLM's names (prefix ``vllm:``, label ``model_name``) on its example dashboards. Two groups are left out: the prefill
time without the queue time, which a backend does not report, and the drafts of speculative decoding by their number and
position."""

TGI = """
tgi_request_count tgi_request_success tgi_request_failure tgi_request_duration_bucket tgi_request_duration_sum
tgi_request_duration_count tgi_request_validation_duration_bucket tgi_request_queue_duration_bucket
tgi_request_inference_duration_bucket tgi_request_mean_time_per_token_duration_bucket tgi_request_input_length_bucket
tgi_request_generated_tokens_bucket tgi_request_generated_tokens_sum tgi_request_generated_tokens_count
tgi_request_max_new_tokens_bucket tgi_queue_size tgi_batch_current_size
""".split()
"""TGI's names on its dashboard, without those of single batches (``tgi_batch_*``). Its counters have no ``_total``."""


def scrape(server) -> dict[tuple[str, tuple], float]:
    text = httpx.get(server.url + "/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples, name: str, **labels: str) -> float:
    expected = set(labels.items())
    return sum(value for (sample, label_set), value in samples.items() if sample == name and expected <= set(label_set))


def chat(server, **fields):
    return post(server, "/v1/chat/completions", CHAT | fields)


@pytest.fixture
def busy_server(server):
    """A server that has received requests of all kinds."""
    chat(server, max_tokens=3)
    chat(server, n=2)
    chat(server, stream=True)
    chat(server, temperature=-1)
    chat(server, model="none")
    server.backend.script = Script(refusal=Overloaded("full"))
    chat(server)
    server.backend.script = Script(error=NumericalError("NaN"))
    chat(server)
    chat(server, stream=True)
    server.backend.script = Script(held=True)
    with Raw(server) as raw:
        raw.post(CHAT | {"stream": True}).until(b"Hello")
    eventually(lambda: server.app.state.running == 0)
    return server


def test_counters_match_the_requests(busy_server):
    samples = scrape(busy_server)
    assert total(samples, "moesaic_request_begun_total") == 7
    ends = {"length": 1, "stop": 2, "Overloaded": 1, "NumericalError": 2, "cancelled": 1}
    for reason, count in ends.items():
        assert total(samples, "moesaic_request_ended_total", reason=reason) == count, reason
    assert total(samples, "moesaic_request_ended_total") == sum(ends.values())
    assert total(samples, "vllm:request_success_total", finished_reason="stop") == 3  # choices, not requests
    assert total(samples, "vllm:request_success_total", finished_reason="length") == 1
    assert total(samples, "vllm:request_success_total", finished_reason="abort") == 4
    assert total(samples, "tgi_request_count") == 7 and total(samples, "tgi_request_success") == 3
    failures = {"overloaded": 1, "generation": 2, "dropped": 1}
    assert {err: total(samples, "tgi_request_failure", err=err) for err in failures} == failures
    assert total(samples, "tgi_request_failure") == 4
    for prefix in ("moesaic_", "vllm:"):
        assert total(samples, prefix + "e2e_request_latency_seconds_count") == 3
        assert total(samples, prefix + "request_generation_tokens_sum") == 3 + 4 + 4 + 4
        assert total(samples, prefix + "request_prompt_tokens_sum") == 3 * 2
        # choices that began: 1 + 2 + 1 completed, 2 failed and 1 cancelled
        assert total(samples, prefix + "time_to_first_token_seconds_count") == 7
        assert total(samples, prefix + "inter_token_latency_seconds_count") == 2 + 3 + 3 + 3 + 3 + 3
    statuses = {"200": 5, "400": 1, "404": 1, "429": 1, "500": 1}
    for status, count in statuses.items():
        assert total(samples, "moesaic_http_requests_total", path="/v1/chat/completions", status=status) == count, (
            status
        )


def test_vllm_and_tgi_names_exist(busy_server):
    names = {name for name, _ in scrape(busy_server)}
    assert not {f"vllm:{name}" for name in VLLM} - names
    assert not set(TGI) - names
    assert not any(name.startswith("tgi_") and name.endswith("_total") for name in names)
    text = httpx.get(busy_server.url + "/metrics").text
    for name in ("tgi_request_count", "tgi_request_success", "tgi_request_failure"):
        assert f"# TYPE {name} " in text
    labelled = {name for name, labels in scrape(busy_server) if "model_name" in dict(labels)}
    assert {f"vllm:{name}" for name in VLLM} <= labelled


def test_the_dashboard_uses_existing_metrics(busy_server):
    samples = scrape(busy_server)
    names = {name for name, _ in samples}
    labels = {label for _, labels in samples for label, _ in labels}
    board = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in board["panels"] if not panel["title"].startswith("Gateway:")]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) >= len(board["panels"]) >= 10
    used = set()
    for expression in expressions:
        named = set(re.findall(r"\b(moesaic_\w+)", expression))
        assert named and named <= names, expression
        assert set(re.findall(r"(\w+)=~?\"", expression)) <= labels
        assert {label for group in re.findall(r"by \((.*?)\)", expression) for label in group.split(", ")} <= labels
        assert expression.count("(") == expression.count(")")
        used |= named
    for part in ("http_requests", "time_to_first", "inter_token", "e2e_", "generation_tokens", "running", "waiting"):
        assert any(part in name for name in used), part
    for part in ("kv_cache_usage", "prefix_cache_hits", "prefix_cache_queries", "numerical_errors"):
        assert any(part in name for name in used), part
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_clients_cannot_create_series(server):

    def send_requests(client, numbers) -> None:
        for n in numbers:
            client.get(f"/secret-{n}")
            client.get(f"/v1/models/secret-{n}")
            client.request(f"SECRET{n}", "/version")
            for more in ({"model": f"secret-{n}"}, {"user": f"secret-{n}"}):
                client.post("/v1/chat/completions", json=CHAT | more)

    with httpx.Client(base_url=server.url) as client:
        scrape(server)
        send_requests(client, range(2))
        before = set(scrape(server))
        assert "secret" not in str(before).lower()
        send_requests(client, range(2, 20))
        assert set(scrape(server)) == before


def test_gauges_match_the_model_stats(server):
    stats = ModelStats(3, 2, 70, 500, 90, 40, 1, 10, 4, 5, 30, 20)
    server.backend.model_stats = {"a": stats, "b": ModelStats(running=1, blocks=0)}
    samples = scrape(server)
    for prefix in ("moesaic_", "vllm:"):
        assert total(samples, prefix + "num_requests_running", model_name="a") == 3
        assert total(samples, prefix + "num_requests_waiting") == 2
        assert total(samples, prefix + "kv_cache_usage_perc", model_name="a") == pytest.approx(0.6)
        assert total(samples, prefix + "kv_cache_usage_perc", model_name="b") == 0
        assert total(samples, prefix + "prefix_cache_hits_total") == 40
        assert total(samples, prefix + "prefix_cache_queries_total") == 500
        assert total(samples, prefix + "num_preemptions_total") == 1
        assert total(samples, prefix + "spec_decode_num_draft_tokens_total", model_name="a") == 30
        assert total(samples, prefix + "spec_decode_num_accepted_tokens_total", model_name="a") == 20
    assert (total(samples, "tgi_queue_size"), total(samples, "tgi_batch_current_size")) == (2, 4)
    assert total(samples, "moesaic_numerical_errors_total") == 5


def test_a_failed_generate_call_is_counted():
    class BrokenBackend(ScriptedBackend):
        async def generate(self, request):
            raise RuntimeError("unexpected")

    with running(BrokenBackend) as server:
        assert chat(server).status_code == 500
        samples = scrape(server)
        assert total(samples, "moesaic_request_ended_total", reason="RuntimeError") == 1
        assert total(samples, "tgi_request_failure", err="generation") == 1
