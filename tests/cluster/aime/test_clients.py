"""AIME's routes for clients, field by field, and the responses that they must never send."""

from __future__ import annotations

import json
from urllib.parse import quote

import httpx
import pytest

from moesaic.serve import keys
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.support.aime import AimeWorker, Client, events, in_background, mixtral_definitions, running_gateway
from tests.support.wait import eventually

ANNA, ANNAS = keys.new("anna")
BERT, BERTS = keys.new("bert")
CREW, CREWS = keys.new("crew", worker=True)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def open_gateway(module_path):
    with running_gateway(module_path / "open.sqlite") as server:
        yield server


@pytest.fixture(scope="module")
def locked(module_path):
    path = module_path / "locked.sqlite"
    with running_gateway(
        path, keys=Keys((ANNAS, BERTS, CREWS)), server_settings=Settings(failed_keys_per_minute=10**6)
    ) as server:
        yield server


@pytest.fixture
def client(open_gateway):
    return Client(open_gateway)


# Keys


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_key_in_query_is_validated(locked, method):
    def ask(key: str) -> httpx.Response:
        body = {"content": b"false", "headers": {"content-type": "application/json; charset=UTF-8"}}
        more = body if method == "POST" else {}  # as the client in JavaScript sends it
        return httpx.request(method, f"{locked.url}/api/validate_key", params={"key": key, "version": "x"}, **more)

    assert (ask(ANNA).status_code, ask(ANNA).json()) == (200, {"success": True, "error": None})
    assert (ask("wrong").status_code, ask("wrong").json()) == (200, {"success": False, "error": "Key not valid"})


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_login_creates_a_session_for_the_key(locked, method):
    query = {"user": "anna", "key": ANNA, "version": "x"}
    answer = httpx.request(method, f"{locked.url}/mixtral_chat/login", params=query)
    session = answer.json()
    assert session == {
        "success": True,
        "ep_version": 2,
        "client_session_auth_key": session["client_session_auth_key"],
        "key": ANNA,
    }
    assert answer.headers["cache-control"] == "no-store"
    client = Client(locked)
    client.session = session["client_session_auth_key"]
    job = client.job()
    shown = client.get("/mixtral_chat/progress", client_session_auth_key=client.session, job_id=job)
    assert shown.json()["job_state"] == "queued"


def test_failed_login_has_status_200(locked):
    answer = httpx.get(f"{locked.url}/mixtral_chat/login", params={"key": "wrong"})
    assert (answer.status_code, answer.json()) == (200, {"success": False, "error": "Key not valid"})


def test_session_ends_when_its_key_is_revoked(tmp_path):
    valid_keys = Keys((ANNAS, BERTS))
    with running_gateway(tmp_path / "jobs.sqlite", keys=valid_keys) as server:
        client = Client(server)
        client.session = client.get("/mixtral_chat/login", key=ANNA).json()["client_session_auth_key"]
        assert client.request().status_code == 200
        server.call_sync(lambda: valid_keys.replace((BERTS,)))
        assert client.request().status_code == 401


def test_missing_or_wrong_key_is_refused(locked):
    answer = Client(locked).request()
    missing = "API Key missing and client session authentication key not registered in API Server"
    assert (answer.status_code, answer.json()) == (401, {"success": False, "error": [missing], "ep_version": 2})
    for key in ("wrong", "x" * 300):
        answer = Client(locked, key=key).request()
        assert answer.status_code == 401
    assert answer.json()["error"][0] in ("Key not valid", missing)
    assert "null" not in Client(locked, key="null").request().text


def test_worker_key_cannot_submit_jobs(locked):
    answer = Client(locked, key=CREW).request()
    assert (answer.status_code, answer.json()["success"]) == (402, False)


def test_key_in_header_is_accepted(locked):
    answer = httpx.post(
        f"{locked.url}/mixtral_chat",
        json={"prompt_input": "Hi", "wait_for_result": False},
        headers={"authorization": f"Bearer {ANNA}"},
    )
    assert answer.status_code == 200


def test_progress_needs_the_key_of_the_job(locked):
    anna, bert = Client(locked, key=ANNA), Client(locked, key=BERT)
    job = anna.job()
    assert anna.progress(job).status_code == 200
    assert Client(locked).progress(job).status_code == 401
    answer = bert.progress(job)
    unknown = [f"Client has no active request with this job id {job}"]
    assert (answer.status_code, answer.json()["error"]) == (402, unknown)
    assert bert.post("/mixtral_chat/cancel", {"job_id": job, "key": BERT}).status_code == 402
    assert bert.get("/mixtral_chat/stream", key=BERT, job_id=job).status_code == 404
    assert anna.progress(job).json()["job_state"] == "queued"


def test_wrong_keys_are_limited_by_address(tmp_path):
    bounds = Settings(failed_keys_per_minute=3)
    with running_gateway(tmp_path / "jobs.sqlite", keys=Keys((ANNAS,)), server_settings=bounds) as server:
        client = Client(server, key="wrong")
        assert [client.request().status_code for _ in range(4)] == [401, 401, 401, 429]
        assert Client(server, key=ANNA).request().status_code == 429
        assert client.get("/api/validate_key", key=ANNA).status_code == 429


def test_polls_do_not_count_as_requests_of_a_key(tmp_path):
    _, few = keys.new("few", requests_per_minute=2)
    written, few = keys.new("few", requests_per_minute=2)
    with running_gateway(tmp_path / "jobs.sqlite", keys=Keys((few,))) as server:
        client = Client(server, key=written)
        job = client.job()
        assert [client.progress(job).status_code for _ in range(5)] == [200] * 5
        assert client.post("/api/progress/mixtral_chat", {"job_id": job, "key": written}).status_code == 200
        assert client.request().status_code == 200
        answer = client.request()
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


def test_tokens_are_charged_once_despite_polls(tmp_path):
    written, few = keys.new("few", tokens_per_minute=60)
    with running_gateway(
        tmp_path / "jobs.sqlite", mixtral_definitions(worker_key=keys.digest("k")), Keys((few,))
    ) as server:
        client, worker = Client(server, key=written), AimeWorker(server)
        job = client.job()
        worker.finish(worker.take_jobs()[0], "x " * 30, 30)
        for _ in range(5):
            assert client.progress(job).json()["job_state"] == "done"
        second = client.request()
        assert second.status_code == 200  # 37 of 60 were used, not five times as many
        worker.finish(worker.take_jobs()[0], "x " * 30, 30)
        assert client.progress(second.json()["job_id"]).json()["job_state"] == "done"
        assert client.request().status_code == 429


def test_endpoint_key_is_valid_for_that_endpoint_only(tmp_path):
    [mixtral] = mixtral_definitions(client_keys=(keys.Key("aime:mixtral_chat:eva", keys.digest("evas-key")),))
    [llama] = mixtral_definitions(name="llama3_chat", job_type="llama3", version=3)
    with running_gateway(tmp_path / "jobs.sqlite", [mixtral, llama]) as server:
        assert Client(server).request().status_code == 401
        assert Client(server, key="evas-key").request().status_code == 200
        assert Client(server, "llama3_chat").request().status_code == 200
    with running_gateway(tmp_path / "more.sqlite", [mixtral, llama], Keys((ANNAS,))) as server:
        assert Client(server, "mixtral_chat", ANNA).request().status_code == 200
        assert Client(server, "llama3_chat", ANNA).request().status_code == 200
        answer = Client(server, "llama3_chat", "evas-key").request()
        assert (answer.status_code, answer.json()) == (
            402,
            {"success": False, "error": ["Client not authorized for endpoint llama3_chat!"], "ep_version": 3},
        )


# Endpoints


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_endpoints_are_listed_without_a_key(locked, method):
    answer = httpx.request(method, f"{locked.url}/api/endpoints")
    assert answer.json() == {"endpoints": ["mixtral_chat", "llama3_chat"]}
    wrong = httpx.request(method, f"{locked.url}/api/endpoints", params={"key": "wrong"})
    assert (wrong.status_code, wrong.json()) == (401, {"error": "Key not valid"})
    for path in ("/api/endpoints/mixtral_chat", "/api/mixtral_chat"):
        endpoint = httpx.request(method, locked.url + path).json()
        assert endpoint["name"] == "mixtral_chat" and endpoint["version"] == 2 and endpoint["category"] == "chat"
        assert endpoint.keys() == {
            *("name", "title", "description", "http_methods", "version", "max_queue_length", "max_time_in_queue"),
            *("free_queue_slots", "category", "num_active_workers", "num_workers", "workers", "parameter_description"),
        }
        assert endpoint["workers"] == []
        described = endpoint["parameter_description"]
        assert described["input"]["top_k"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 40}
        assert described["input"]["wait_for_result"] == {"type": "bool"}
        assert described["output"]["text"] == {"type": "string"}
        assert described["progress"]["OUTPUTS"].keys() == {"text", "num_generated_tokens", "current_context_length"}


def test_unknown_endpoint_is_not_found(open_gateway):
    for path in ("/api/endpoints/nobody", "/nobody/progress", "/mixtral_chat/nothing"):
        assert httpx.get(open_gateway.url + path).status_code == 404


# Jobs


def test_job_is_polled_from_queue_to_result(open_gateway, client):
    worker = AimeWorker(open_gateway)
    answer = client.request(top_k=30)
    job = answer.json()["job_id"]
    assert answer.json() == {"success": True, "job_id": job, "ep_version": 2}
    head = {"success": True, "job_id": job, "ep_version": 2}

    assert client.progress(job).json() == head | {
        "job_state": "queued",
        "progress": {
            "job_id": job,
            "queue_position": 1,
            "estimate": -1,
            "num_workers_online": 0,
            "progress": 0,
            "progress_data": {},
        },
    }

    [data] = worker.take_jobs()
    assert worker.send_updates(worker.update(data, "Once", 1, 8)) == [{"success": True}]
    assert worker.send_updates(worker.update(data, "Once upon a time there", 5, 12)) == [{"success": True}]
    shown = client.progress(job).json()
    assert shown["job_state"] == "processing" and shown["progress"]["num_workers_online"] == 1
    assert shown["progress"]["queue_position"] == 0 and shown["progress"]["estimate"] >= 0
    assert shown["progress"]["progress_data"]["text"] == "Once upon a time there"
    assert shown["progress"]["progress_data"].keys() == {"text", "num_generated_tokens", "current_context_length"}
    assert "auth" not in json.dumps(shown)

    assert worker.finish(data, "Once upon a time there was.", 7) == {"cmd": "ok", "success": True}
    for _ in range(3):  # AIME's server returns the result only once
        done = client.progress(job).json()
        assert done.keys() == {"success", "job_id", "ep_version", "job_state", "job_result"}
        assert done["job_state"] == "done"
        result = done["job_result"]
        assert result["text"] == "Once upon a time there was." and result["num_generated_tokens"] == 7
        assert result["model_name"] == "mixtral" and result["prompt_length"] == 7
        assert result["current_context_length"] == 14 and result["success"] is True
        assert result["start_time"] <= result["start_time_compute"] <= result["result_received_time"]
        assert 0 <= result["compute_duration"] <= result["total_duration"]
        assert "auth" not in result and "worker_interface_version" not in result


def test_request_can_wait_for_the_result(open_gateway, client):
    worker = AimeWorker(open_gateway)
    with in_background(lambda: client.request(wait=True)) as answer:
        [data] = worker.take_jobs()
        worker.finish(data, "Yes", 1)
        response = answer.result()
    assert response.status_code == 200
    assert response.json()["text"] == "Yes" and response.json()["success"] is True and response.json()["job_id"]


def test_request_waits_by_default(open_gateway):
    worker = AimeWorker(open_gateway)
    with in_background(lambda: httpx.post(f"{open_gateway.url}/mixtral_chat", json={"prompt_input": "Hi"})) as answer:
        worker.finish(worker.take_jobs()[0], "Yes", 1)
        assert answer.result().json()["text"] == "Yes"


def test_client_disconnect_cancels_the_job(open_gateway):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{open_gateway.url}/mixtral_chat", json={"prompt_input": "Hi"}, timeout=0.3)

    def queued() -> int:
        endpoint = httpx.get(f"{open_gateway.url}/api/mixtral_chat").json()
        return int(endpoint["max_queue_length"] - endpoint["free_queue_slots"])

    eventually(lambda: queued() == 0)
    lives = open_gateway.backend.jobs.jobs
    eventually(lambda: not any(open_gateway.call_sync(lambda: [live.readers for live in lives.values()])))


def test_failed_job_is_reported_as_result(open_gateway, client):
    worker = AimeWorker(open_gateway)
    job = client.job()
    worker.finish(worker.take_jobs()[0], error="out of memory")
    done = client.progress(job)
    assert done.status_code == 200 and done.json()["success"] is True and done.json()["job_state"] == "done"
    assert done.json()["job_result"]["error"] == "the worker failed: out of memory"
    with in_background(lambda: client.request(wait=True)) as answer:
        worker.finish(worker.take_jobs()[0], error="out of memory")
        assert answer.result().json()["error"] == "the worker failed: out of memory"


@pytest.mark.parametrize("how", ["route", "progress"])
def test_job_can_be_cancelled(open_gateway, client, how):
    job = client.job()
    if how == "route":
        answer = client.post("/mixtral_chat/cancel", {"job_id": job, "key": None})
        assert answer.json() == {"success": True, "job_id": job, "ep_version": 2, "job_state": "canceled"}
    else:
        client.post("/api/progress/mixtral_chat", {"job_id": job, "canceled": True})
    done = client.progress(job).json()
    assert done["job_state"] == "done" and done["job_result"]["error"] == "the request was cancelled"
    assert AimeWorker(open_gateway).request_jobs(request_timeout=0.1) == {"cmd": "no_job"}


def test_job_is_cancelled_after_max_time_in_queue(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite", mixtral_definitions(max_time_in_queue=0.05)) as server:
        client = Client(server)
        job = client.job()
        eventually(lambda: client.progress(job).json()["job_state"] == "done")
        assert "error" in client.progress(job).json()["job_result"]


@pytest.mark.parametrize("path", ["/mixtral_chat/stream", "/stream_progress"])
def test_stream_equals_polling(open_gateway, client, path):
    worker = AimeWorker(open_gateway)
    job = client.job()
    with client.http.stream("GET", f"{path}?job_id={quote(job)}&client_session_auth_key=null") as answer:
        stream = events(answer)
        assert next(stream)["job_state"] == "queued"
        [data] = worker.take_jobs()
        worker.send_updates(worker.update(data, "One", 1, 8))
        worker.send_updates(worker.update(data, "One two", 2, 9))
        worker.finish(data, "One two three", 3)
        rest = list(stream)
    assert not open_gateway.call_sync(lambda: open_gateway.backend.jobs.jobs[job].readers)
    assert rest[-1]["job_state"] == "done" and rest[-1]["job_result"]["text"] == "One two three"
    for event in rest[:-1]:  # as the client in JavaScript reads it
        assert event["progress"] >= 0 and "One two three".startswith(event["progress_data"].get("text", ""))


def test_progress_of_unknown_job(client):
    answer = client.get("/mixtral_chat/progress")
    assert (answer.status_code, answer.json()) == (
        402,
        {"success": False, "error": ["No job_id given"], "ep_version": 2},
    )
    answer = client.progress("x#1")
    assert answer.json()["error"] == ["Client has no active request with this job id x#1"]


def test_paths_of_newer_clients(open_gateway, client):
    answer = client.post("/api/call/mixtral_chat", {"prompt_input": "Hi", "wait_for_result": False})
    job = answer.json()["job_id"]
    progress = client.post("/api/progress/mixtral_chat", {"job_id": job, "key": "", "canceled": False}).json()
    assert progress["job_state"] == "queued"
    client.post("/mixtral_chat/cancel", {"job_id": job})


# Parameters


def test_all_problems_are_reported_at_once(client):
    assert client.error_of(foo=1, bar=2, top_k="40", temperature=1.5) == [
        "Invalid input parameter(s): foo, bar",
        "Invalid argument type top_k=40. Expected: <class 'int'> but got <class 'str'>!",
        "Parameter temperature = 1.5 is too high. Max supported value for temperature on this endpoint is 1.0!",
    ]


@pytest.mark.parametrize(
    "params, error",
    [
        ({"chat_context": "{"}, "Input parameter chat_context=[{] has invalid json format!"),
        ({"max_gen_tokens": 0}, "Parameter max_gen_tokens = 0 is too low."),
        ({"max_gen_tokens": -5}, "Parameter max_gen_tokens = -5 is too low."),
        ({"top_k": True}, "Invalid argument type top_k=True."),
        ({"wait_for_result": "yes"}, "Invalid argument type wait_for_result=yes."),
        ({"prompt_input": ""}, "there is nothing to answer"),
        ({"chat_context": json.dumps(CHAT[:1]), "prompt_input": ""}, "there is nothing to answer"),
        (
            {"chat_context": json.dumps([{"role": "assistant", "content": "Hi"}])},
            "chat_context must begin with the user",
        ),
        ({"chat_context": json.dumps([*CHAT, *CHAT])}, "has a system message that is not at its beginning"),
        ({"chat_context": json.dumps([{"role": "robot", "content": "Hi"}])}, "chat_context[0] has the role 'robot'"),
        ({"chat_context": json.dumps([{"role": "user", "content": 5}])}, "chat_context[0] must have text content"),
        ({"chat_context": json.dumps([{"role": "user"}])}, "chat_context[0] must have text content"),
        ({"chat_context": json.dumps(["Hi"])}, "chat_context[0] must be an object"),
        ({"chat_context": json.dumps({"role": "user"})}, "chat_context: must be a list"),
        ({"chat_context": json.dumps([{"role": "user", "content": [{"image": "x"}]}])}, "a part that is not text"),
        ({"chat_context": "[" * 2000}, "has invalid json format!"),
        ({"chat_context": '[{"role": "user", "content": "\\ud800"}]'}, "has invalid json format!"),
    ],
)
def test_parameters_that_crash_aime_workers_are_refused(client, params, error):
    if "wait_for_result" in params:
        answer = client.post("/mixtral_chat", {"prompt_input": "Hi", **params})
        assert answer.status_code == 400
        [message] = answer.json()["error"]
    else:
        [message] = client.error_of(**params)
    assert error in message


def test_invalid_body_gets_an_aime_error(open_gateway):
    headers = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"null"):
        answer = httpx.post(f"{open_gateway.url}/mixtral_chat", content=content, headers=headers)
        assert answer.status_code == 400 and answer.json()["ep_version"] == 2
        assert answer.json()["success"] is False and len(answer.json()["error"]) == 1


def test_full_queue_refuses_requests(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite", mixtral_definitions(max_queue_length=2)) as server:
        client = Client(server)
        client.job()
        client.job()

        def full() -> bool:
            return bool(client.get("/api/mixtral_chat").json()["free_queue_slots"] == 0)

        eventually(full)
        assert client.error_of() == "Job queue reached max length 2!"


def test_unnamed_model_is_missing_before_the_first_worker(tmp_path):
    with running_gateway(tmp_path / "jobs.sqlite", models=()) as server:
        answer = Client(server).request()
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert "no worker is connected" in answer.json()["error"][0]


def test_chat_context_can_be_a_list(open_gateway, client):
    worker = AimeWorker(open_gateway)
    job = client.job(chat_context=CHAT, prompt_input="")
    [data] = worker.take_jobs()
    assert data["chat_context"] == CHAT[:1] and data["prompt_input"] == "Hi"
    worker.finish(data, "Hello", 1)
    assert client.progress(job).json()["job_result"]["text"] == "Hello"
