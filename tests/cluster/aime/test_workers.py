"""AIME's workers at the gateway: requests, responses, and the responses that their interface cannot handle."""

from __future__ import annotations

import httpx
import pytest

from moesaic.cluster import leases
from moesaic.cluster.aime import aime_worker_pool
from moesaic.serve import keys
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.support.aime import AimeWorker, Client, in_background, mixtral_definitions, running_gateway
from tests.support.wait import eventually

ANNA, ANNAS = keys.new("anna")
CREW, CREWS = keys.new("crew", worker=True)
OTHER, OTHERS = keys.new("others", worker=True, models=("llama3",))


@pytest.fixture(scope="module")
def open_gateway(module_path):
    with running_gateway(module_path / "jobs.sqlite") as server:
        yield server


@pytest.fixture
def client(open_gateway):
    return Client(open_gateway)


@pytest.fixture
def worker(open_gateway):
    return AimeWorker(open_gateway)


# Keys


def test_only_a_worker_key_gets_jobs(tmp_path):
    valid_keys = Keys((ANNAS, CREWS, OTHERS))
    with running_gateway(
        tmp_path / "jobs.sqlite", keys=valid_keys, server_settings=Settings(failed_keys_per_minute=10**6)
    ) as server:
        Client(server, key=ANNA).job()
        for key in ("wrong", "", ANNA, OTHER):
            intruder = AimeWorker(server, key=key)
            answer = (
                intruder.request_jobs()
            )  # with an error status the worker would ask again at once, and null would crash it
            assert answer == {"cmd": "error", "msg": "Worker not authorized on job type mixtral"}
            assert intruder.check() == {
                "cmd": "ok",
                "success": True,
                "logged_in": False,
                "job_type_present": True,
                "key_valid": False,
            }
        worker = AimeWorker(server, key=CREW)
        [data] = worker.take_jobs()
        assert "key" not in data and "client_session_auth_key" not in data and ANNA not in str(data)
        other = AimeWorker(server, key="wrong")
        refused = {"success": False, "error_msg": "Worker not authorized on job type mixtral"}
        assert other.send_updates(other.update(data, "Mine", 1)) == refused
        assert other.finish(data, "Mine", 1) == refused
        assert worker.finish(data, "Yours", 1)["cmd"] == "ok"


def test_worker_with_another_key_cannot_touch_a_job(tmp_path):
    more, mores = keys.new("more", worker=True)
    with running_gateway(tmp_path / "jobs.sqlite", keys=Keys((ANNAS, CREWS, mores))) as server:
        Client(server, key=ANNA).job()
        [data] = AimeWorker(server, key=CREW).take_jobs()
        other = AimeWorker(server, key=more)
        assert other.finish(data, "Mine", 1)["error_msg"] == "the job belongs to a worker with another key"
        assert other.request_jobs(request_timeout=0.1) == {
            "cmd": "no_job"
        }  # the same name with another key is another worker


def test_endpoint_file_key_is_valid_for_its_job_type(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite", mixtral_definitions(worker_key=keys.digest("right"))) as server:
        assert AimeWorker(server, key="wrong").request_jobs()["cmd"] == "error"
        assert AimeWorker(server, key="right").request_jobs(request_timeout=0.1) == {"cmd": "no_job"}
        answer = AimeWorker(server, "nobody", key="right").request_jobs()
        assert answer == {"cmd": "error", "msg": "There is no job type nobody: see the endpoints"}


def test_wrong_worker_keys_are_limited(tmp_path):
    with running_gateway(
        tmp_path / "jobs.sqlite", keys=Keys((CREWS,)), server_settings=Settings(failed_keys_per_minute=2)
    ) as server:
        worker = AimeWorker(server, key="wrong")
        assert [worker.request_jobs()["cmd"] for _ in range(2)] == ["error", "error"]
        answer = worker.http.post("/worker_job_request", json={"auth": "x", "job_type": "mixtral", "auth_key": CREW})
        assert answer.status_code == 503  # the worker waits after this status


# Logging in


def test_newer_worker_logs_in(open_gateway, client):
    worker = AimeWorker(open_gateway, "llama3", name="newer#0_1xGPU")
    worker_parameters = {
        "auth": worker.name,
        "job_type": "llama3",
        "auth_key": "k",
        "interface_version": "AIME-API-Worker-Interface 0.14.5",
        "version": 3,
        "gpu_name": "GPU",
        "num_gpus": 1,
        "framework": "vllm",
        "framework_version": "0.11",
        "pytorch_version": "2.8",
        "max_batch_size": 8,
    }
    model = dict.fromkeys(("label", "quantization", "size", "family", "type", "repo_name"), "x")
    login = {"worker_parameters": worker_parameters, "model_parameters": model}
    short = {"auth": worker.name, "auth_key": "k", "max_job_batch": 8}

    early = worker.http.post("/worker_job_request", json=short)
    assert early.status_code == 503  # an error would end the worker, but it must log in
    assert worker.post("/worker_login", login) == {
        "cmd": "ok",
        "success": True,
        "request_timeout": 60,
        "api_server_version": "0.9.6",
    }
    llama = Client(open_gateway, "llama3_chat")
    job = llama.job(chat_context='[{"role": "user", "content": "Hi"}]', prompt_input="")
    answer = worker.post("/worker_job_request", short)
    [data] = answer["job_data"]
    assert answer["endpoint_name"] == "llama3_chat"
    assert data["chat_context"] == [{"role": "user", "content": "Hi"}] and data["prompt_input"] == ""
    worker.finish(data, "Hello", 1)
    assert llama.progress(job).json()["job_result"]["text"] == "Hello"
    status = {"auth_key": "k", "job_type": "llama3", "auth": worker.name}
    assert worker.post("/worker_check_server_status", status)["logged_in"] is True

    login["worker_parameters"] = worker_parameters | {"job_type": "nobody"}
    assert worker.post("/worker_login", login)["success"] is False


def test_newer_worker_survives_a_gateway_restart(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite") as server:
        worker = AimeWorker(server, name="stays")
        status = {"auth_key": "k", "job_type": "mixtral", "auth": "stays"}
        assert worker.post("/worker_check_server_status", status)["logged_in"] is True
        short = {"auth": "stays", "auth_key": "k", "max_job_batch": 1}
        Client(server).job()
        assert worker.post("/worker_job_request", short)["cmd"] == "job"


# Jobs


def test_job_has_all_fields_that_workers_read(client, worker):
    client.job(chat_context=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}], top_p=0.5)
    answer = worker.request_jobs(4)
    assert answer.keys() == {
        *("cmd", "endpoint_name", "input_descriptions", "progress_output_descriptions"),
        *("final_output_descriptions", "job_data"),
    }
    assert answer["endpoint_name"] == "mixtral_chat"
    for name in ("input_descriptions", "progress_output_descriptions", "final_output_descriptions"):
        assert all(isinstance(description, dict) for description in answer[name].values()) and answer[name]
    [data] = answer["job_data"]
    assert isinstance(data.pop("start_time"), float) and isinstance(data.pop("start_time_compute"), float)
    assert isinstance(data.pop("job_id"), str)
    assert data == {
        "chat_context": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
        "prompt_input": "Hello",
        "top_k": 40,
        "top_p": 0.5,
        "temperature": 0.8,
        "max_gen_tokens": 2000,
    }


def test_temperature_0_is_never_sent_to_a_worker(client, worker):
    job = client.job(temperature=0)
    [data] = worker.take_jobs()
    assert data["temperature"] > 0 and data["top_k"] == 1  # this has the same effect
    worker.finish(data, "Yes", 1)
    assert client.progress(job).json()["job_result"]["text"] == "Yes"


def test_concurrent_jobs_and_requests_for_more(client, worker):
    jobs = [client.job() for _ in range(3)]
    first = worker.take_jobs(2)
    assert len(first) == 2
    [third] = worker.take_jobs(1)
    updates = [worker.update(data, f"Answer {place}", 2, 9) for place, data in enumerate([*first, third])]
    unknown = worker.update({**third, "job_id": "nobody#1"}, "Lost", 1)
    replies = worker.send_updates(updates[0], unknown, *updates[1:])
    assert [reply["success"] for reply in replies] == [
        True,
        False,
        True,
        True,
    ]  # AIME's server stops at the unknown job
    assert not any("job_id" in reply for reply in replies)
    assert worker.post("/worker_job_progress", updates[0]) == {"success": True}  # one alone
    texts = [client.progress(job).json()["progress"]["progress_data"]["text"] for job in jobs]
    assert texts == ["Answer 0", "Answer 1", "Answer 2"]
    for data in (*first, third):
        worker.finish(data, "done", error="over")


def test_no_job_is_sent_before_the_worker_times_out(worker):
    assert worker.request_jobs(request_timeout=0.1) == {"cmd": "no_job"}


def test_repeated_result_is_accepted(client, worker):
    client.job()
    [data] = worker.take_jobs()
    for _ in range(3):
        assert worker.finish(data, "Yes", 1) == {"cmd": "ok", "success": True}
    reply = worker.finish({**data, "job_id": "nobody"}, "Yes", 1)
    assert reply == {"cmd": "warning", "msg": f"Job with job id nobody not found in worker {worker.name}!"}


def test_empty_and_late_updates_are_ignored(client, worker):
    job = client.job()
    [data] = worker.take_jobs()
    assert worker.send_updates(worker.update(data, None)) == [{"success": True}]
    worker.finish(data, "Yes", 1)
    assert worker.send_updates(worker.update(data, "Yes, late", 2)) == [{"success": False}]
    assert client.progress(job).json()["job_result"]["text"] == "Yes"


@pytest.mark.parametrize("body", [[], {}, "text", 5, [5], [{"job_id": 5}], {"job_id": None, "progress_data": []}])
def test_malformed_updates_are_handled(worker, body):
    answer = worker.http.post("/worker_job_progress", json=body)
    assert answer.status_code == 200 and answer.json() is not None


@pytest.mark.parametrize(
    "texts, final, shown",
    [
        (["Hel", "Hello"], "Hello, world", "Hello, world"),
        (["Hello", "Other"], "Hello, world", "Hello, world"),  # text that contradicts an earlier update is not sent
        (["Caf\ufffd"], "Café", "Café"),  # half a character waits for its other half
        (["yes\nUser"], "yes", "yes\nUser"),  # the text that the worker strips at the end was sent before
        ([], "Hello", "Hello"),
        ([], "", ""),
    ],
)
def test_whole_texts_become_deltas(client, worker, texts, final, shown):
    job = client.job()
    [data] = worker.take_jobs()
    for text in texts:
        worker.send_updates(worker.update(data, text, 1))
    worker.finish(data, final, 1)
    assert client.progress(job).json()["job_result"]["text"] == shown


def test_contradicting_result_is_an_error(client, worker):
    job = client.job()
    [data] = worker.take_jobs()
    worker.send_updates(worker.update(data, "Hello", 1))
    worker.finish(data, "Somebody else's answer", 4)
    assert "contradicts its earlier updates" in client.progress(job).json()["job_result"]["error"]


def test_openai_clients_get_deltas(open_gateway, worker):
    body = {"model": "mixtral", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    with in_background(lambda: httpx.post(f"{open_gateway.url}/v1/chat/completions", json=body, timeout=30)) as answer:
        [data] = worker.take_jobs()
        assert data["max_gen_tokens"] == 3 and data["prompt_input"] == "Hi"
        worker.send_updates(worker.update(data, "One", 1, 8))
        worker.send_updates(worker.update(data, "One two", 2, 9))
        worker.finish(data, "One two three", 3)
        whole = answer.result().text
    assert (
        answer.result().status_code == 200
        and '"finish_reason":"length"' in whole
        and whole.endswith("data: [DONE]\n\n")
    )
    for piece in ("One", " two", " three"):
        assert f'"content":"{piece}"' in whole


@pytest.mark.parametrize(
    "more, what",
    [
        ({"n": 2, "stop": ["x"]}, "n, stop"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "a grammar"),
        ({"chat_template_kwargs": {"date_string": "x"}}, "chat_template_kwargs"),
    ],
)
def test_unsupported_features_are_refused(open_gateway, worker, more, what):
    body = {"model": "mixtral", "messages": [{"role": "user", "content": "Hi"}], **more}
    with in_background(lambda: httpx.post(f"{open_gateway.url}/v1/chat/completions", json=body, timeout=30)) as answer:
        while not answer.done():
            assert worker.request_jobs(request_timeout=0.1) == {"cmd": "no_job"}
        refused = answer.result()
    assert refused.status_code == 400
    assert f"AIME API workers, which do not support {what}" in refused.json()["error"]["message"]


def test_other_operations_are_refused(open_gateway, worker):
    body = {"model": "mixtral", "prompt": "Hi"}
    with in_background(lambda: httpx.post(f"{open_gateway.url}/tokenize", json=body, timeout=30)) as answer:
        while not answer.done():
            assert worker.request_jobs(request_timeout=0.1) == {"cmd": "no_job"}
        assert "do not support tokenize" in answer.result().text and 400 <= answer.result().status_code < 500


# Leases


def test_legacy_worker_is_notified_once_of_a_cancellation(client, worker):
    job = client.job()
    [data] = worker.take_jobs()
    worker.send_updates(worker.update(data, "One", 1))
    client.post("/mixtral_chat/cancel", {"job_id": job})
    answers = []

    def is_notified() -> bool:
        answers.append(worker.send_updates(worker.update(data, "One two", 2))[0])
        return "canceled" in answers[-1]

    eventually(is_notified)
    assert answers[-1] == {"success": True, "job_id": data["job_id"], "canceled": True}
    assert worker.send_updates(worker.update(data, "One two three", 3)) == [{"success": False}]
    assert worker.finish(data, "One", 1)["cmd"] == "ok"


def test_leases_of_a_silent_worker_are_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "STALL_SECONDS", 0.6)
    with running_gateway(tmp_path / "jobs.sqlite", lease=0.5) as server:
        client, worker = Client(server), AimeWorker(server)
        job = client.job()
        [data] = worker.take_jobs()
        other = AimeWorker(server, name="other")
        assert other.request_jobs(request_timeout=2) == {"cmd": "no_job"}  # for three leases nobody else gets it
        worker.finish(data, "Slow", 1)
        assert client.progress(job).json()["job_result"]["text"] == "Slow"


def test_job_of_a_timed_out_worker_is_continued(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite", mixtral_definitions(inactivity=0.5), lease=1) as server:
        client, worker = Client(server), AimeWorker(server)
        job = client.job(max_gen_tokens=100)
        [data] = worker.take_jobs()
        worker.send_updates(worker.update(data, "Once upon", 2, 9))
        other = AimeWorker(server, name="other")
        [again] = other.take_jobs()
        assert again["job_id"] != data["job_id"]
        assert again["chat_context"] == [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Once upon"},
        ]
        assert again["prompt_input"] == "" and again["max_gen_tokens"] == 98
        assert worker.finish(data, "Once upon a dead worker", 5)["cmd"] == "ok"  # and nothing comes of it
        other.send_updates(other.update(again, " a", 1, 10))
        assert client.progress(job).json()["progress"]["progress_data"]["text"] == "Once upon a"
        other.finish(again, " a time", 2)
        assert client.progress(job).json()["job_result"]["text"] == "Once upon a time"


def test_restarted_worker_loses_its_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(aime_worker_pool, "STALL_SECONDS", 0.2)
    with running_gateway(tmp_path / "jobs.sqlite", lease=1) as server:
        Client(server).job()
        worker = AimeWorker(server)
        [data] = worker.take_jobs(2)
        [again] = worker.take_jobs(2)  # it has room for two, so it has lost its jobs
        assert again["job_id"].partition("#")[0] == data["job_id"].partition("#")[0]
        assert again["job_id"] != data["job_id"]


def test_job_without_updates_times_out(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite", mixtral_definitions(inactivity=1.0), lease=1) as server:
        client, worker = Client(server), AimeWorker(server)
        jobs = [client.job(), client.job()]
        silent, updated = worker.take_jobs(2)

        def over() -> bool:
            worker.send_updates(worker.update(updated, "Still there", 2))
            return bool(client.progress(jobs[0]).json()["job_state"] == "done")

        eventually(over)
        assert "sent no update of this job" in client.progress(jobs[0]).json()["job_result"]["error"]
        assert client.progress(jobs[1]).json()["job_state"] == "processing"
        assert worker.finish(silent, "Late", 1)["cmd"] == "ok"


def test_draining_gateway_accepts_results_only(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite") as server:
        client, worker = Client(server), AimeWorker(server)
        job = client.job()
        [data] = worker.take_jobs()
        server.app.state.draining = True
        body = {"auth": "x", "job_type": "mixtral", "auth_key": "k", "request_timeout": 1}
        assert worker.http.post("/worker_job_request", json=body).status_code == 503
        assert worker.finish(data, "Yes", 1)["cmd"] == "ok"
        assert client.progress(job).json()["job_result"]["text"] == "Yes"
