"""Several real models in one server: waking, unloading, administration and what clients see of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import httpx
import pytest

from moesaic import cli
from moesaic.cli.flags import duration
from moesaic.serve import keys
from moesaic.serve.settings import Settings
from tests.support.http import events
from tests.support.many_models import ANNA, OPS, ManyModels, body, many_models
from tests.support.server import serving
from tests.support.wait import eventually


@pytest.fixture(scope="module")
def shared() -> Iterator[ManyModels]:
    """A server that sends comments often, and whose requests wait for a model only in their streams."""
    with many_models(settings=Settings(keep_alive_seconds=0.05), patience=0.05) as many:
        yield many


@pytest.fixture
def many(shared: ManyModels) -> ManyModels:
    shared.gate.set()
    shared.admin("models/one/load")
    shared.admin("models/two/unload")
    return shared


def text(response: dict) -> str:
    return response["choices"][0]["message"]["content"]


def in_background(call) -> tuple[threading.Thread, list]:
    results: list = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def metric(many: ManyModels, name: str, **labels: str) -> float:
    lines = httpx.get(many.server.url + "/metrics", headers=ANNA).text.splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    [line] = [each for each in lines if each.startswith(f"{name}{{") and all(pair in each for pair in wanted)]
    return float(line.rsplit(" ", 1)[1])


def test_states_and_counters_follow_a_model(many):
    assert many.states() == {"one": "loaded", "two": "unloaded"}
    assert many.client.get("/ready").json() == {"status": "ready", "models": {"loaded": 1, "unloaded": 1}}
    loads = metric(many, "moesaic_model_load_seconds_count", model_name="two")
    unloads = metric(many, "moesaic_model_unloads_total", model_name="two", reason="admin")
    answer = text(many.chat("two"))
    assert answer == text(many.chat("one")) != ""
    assert many.states() == {"one": "loaded", "two": "loaded"}
    many.admin("models/two/unload")
    assert metric(many, "moesaic_model_load_seconds_count", model_name="two") == loads + 1
    assert metric(many, "moesaic_model_load_seconds_sum", model_name="two") > 0
    assert metric(many, "moesaic_model_unloads_total", model_name="two", reason="admin") == unloads + 1
    assert metric(many, "moesaic_model_state", model_name="two", state="unloaded") == 1
    assert metric(many, "moesaic_model_state", model_name="two", state="loaded") == 0


def test_an_unloaded_model_keeps_its_context_for_clients(many):
    many.chat("two")
    many.admin("models/two/unload")
    [entry] = [model for model in many.client.get("/v1/models", headers=ANNA).json()["data"] if model["id"] == "two"]
    assert entry["state"] == "unloaded" and entry["max_model_len"] == 1024


def test_a_stream_gets_comments_while_its_model_wakes(many):
    many.gate.clear()
    with many.client.stream("POST", "/v1/chat/completions", json=body("two", stream=True), headers=ANNA) as response:
        pieces = response.iter_text()
        assert next(pieces).startswith(":")
        assert many.states()["two"] == "loading"
        many.gate.set()
        rest = "".join(pieces)
    assert "error" not in rest and "[DONE]" in rest and len(events(rest)) > 3


def test_a_server_whose_only_models_are_loading_is_ready(many):
    many.admin("models/one/unload")
    many.gate.clear()
    calls = [in_background(lambda name=name: many.chat(name)) for name in ("one", "two")]
    eventually(lambda: set(many.states().values()) == {"loading"})
    ready = many.client.get("/ready")  # a load balancer must not take away the requests that wait
    many.gate.set()
    for thread, _ in calls:
        thread.join(60)
    assert ready.status_code == 200 and ready.json() == {"status": "ready", "models": {"loading": 2}}


def test_requests_wait_for_one_load(many):
    expected = text(many.chat("one"))
    loads = many.manager.entry("two").loads
    many.gate.clear()
    calls = [in_background(lambda: many.chat("two")) for _ in range(3)]
    eventually(lambda: many.manager.entry("two").waiting == 3)
    many.gate.set()
    for thread, results in calls:
        thread.join(60)
        assert text(results[0]) == expected
    assert many.manager.entry("two").loads == loads + 1


def test_a_waiting_request_that_is_wrong_ends_with_an_error(many):
    many.gate.clear()
    wrong = body("two", stream=True) | {
        "messages": [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]
    }
    thread, results = in_background(lambda: many.client.post("/v1/chat/completions", json=wrong, headers=ANNA))
    eventually(lambda: many.states()["two"] == "loading")
    many.gate.set()
    thread.join(60)
    assert '"error"' in results[0].text and "[DONE]" not in results[0].text


def test_a_client_that_leaves_while_a_model_wakes_frees_everything(many):
    many.gate.clear()
    with many.client.stream("POST", "/v1/chat/completions", json=body("two", stream=True), headers=ANNA) as response:
        next(response.iter_text())
    eventually(lambda: many.server.app.state.running == 0)
    many.gate.set()
    entry = many.manager.entry("two")
    eventually(lambda: entry.loaded is not None and not entry.loaded.busy and not entry.waiting)


def test_an_unloaded_model_leaves_nothing_in_memory(many):
    many.chat("one")
    loaded = many.manager.entry("one").loaded
    weights = weakref.ref(next(loaded.backend._llm.loaded.model.parameters()))
    del loaded
    assert weights() is not None
    many.admin("models/one/unload")
    assert weights() is None


def test_an_unload_waits_for_the_running_answer(many):
    long = body("one", stream=True, max_tokens=200, ignore_eos=True, n=16)
    with many.client.stream("POST", "/v1/chat/completions", json=long, headers=ANNA) as response:
        pieces = response.iter_text()
        next(pieces)
        thread, _ = in_background(lambda: many.admin("models/one/unload"))
        eventually(lambda: many.manager.entry("one").unloading is not None)
        assert "[DONE]" in "".join(pieces)
    thread.join(60)
    assert many.states()["one"] == "unloaded"


def test_a_forced_unload_ends_answers_with_an_error(many):
    endless = body("one", stream=True, max_tokens=900, ignore_eos=True, n=64)
    with many.client.stream("POST", "/v1/chat/completions", json=endless, headers=ANNA) as response:
        pieces = response.iter_text()
        next(pieces)
        assert many.admin("models/one/unload?force=true")["state"] == "unloaded"
        rest = "".join(pieces)
    assert '"error"' in rest and "[DONE]" not in rest
    assert text(many.chat("one"))  # the next request loads it again


def test_administrators_see_memory_state_and_use(many):
    listed = many.admin("models", "GET")
    one, two = listed["models"]
    assert listed["memory"] is None
    assert (one["name"], one["state"], one["pinned"], one["error"]) == ("one", "loaded", False, "")
    assert one["reserved"] == one["bytes"] > 0 == two["reserved"] and one["loads"] >= 1
    many.chat("one")
    assert many.admin("models", "GET")["models"][0]["idle"] < 60


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "models"),
        ("POST", "models/one/load"),
        ("POST", "models/one/unload"),
        ("GET", "presets"),
        ("POST", "presets/reload"),
    ],
)
def test_admin_routes_require_an_administrators_key(many, method, path):
    assert many.client.request(method, f"/admin/{path}").status_code == 401
    assert many.client.request(method, f"/admin/{path}", headers=ANNA).status_code == 403
    assert many.states()["one"] == "loaded"


def test_admin_routes_name_what_is_wrong(many):
    unknown = many.client.post("/admin/models/three/load", headers=OPS)
    assert unknown.status_code == 404 and "available models: one, two" in unknown.text
    wrong = many.client.post("/admin/models/one/unload?force=yes", headers=OPS)
    assert wrong.status_code == 400 and "expected true or false" in wrong.text


def test_a_broken_checkpoint_is_shown_and_tried_again(many):
    entry = many.manager.entry("two")
    make_plan = entry.make_plan

    async def broken():
        raise FileNotFoundError("model.safetensors is gone")

    entry.make_plan, entry.plan = broken, None
    try:
        response = many.client.post("/v1/chat/completions", json=body("two"), headers=ANNA)
        assert response.status_code == 500
        two = many.admin("models", "GET")["models"][1]
        assert (two["state"], two["error"]) == ("failed", "FileNotFoundError: model.safetensors is gone")
        assert many.states()["two"] == "failed"
    finally:
        entry.make_plan = make_plan
    assert text(many.chat("two")) and many.admin("models", "GET")["models"][1]["error"] == ""


def test_the_command_lists_loads_and_unloads_models(many, capsys):
    def admin(*line: str) -> str:
        assert cli.main(["admin", *line, "--url", many.server.url, "--key", "ops"]) == 0
        return capsys.readouterr().out

    head, one, two = admin("models").splitlines()
    assert head.split()[:3] == ["NAME", "STATE", "GB"]
    assert one.split()[:2] == ["one", "loaded"] and two.split()[:2] == ["two", "unloaded"]
    assert "loaded" in admin("load", "two") and many.states()["two"] == "loaded"
    admin("unload", "two", "--force")
    assert many.states()["two"] == "unloaded"
    assert admin("presets") == "no presets\n"


def test_the_flags_of_a_server_process(tmp_path):
    secret, key = keys.new("ops", admin=True)
    keys.write(tmp_path / "keys.json", (key,))
    flags = ["one=tales", "two=tales", "--pin", "two", "--idle-unload", "1s", "--memory", "20", "--admin-port", "0"]
    with serving(tmp_path / "log", *flags, "--keys", str(tmp_path / "keys.json")) as url:
        admins = next(
            json.loads(line)["admins"] for line in (tmp_path / "log").read_text().splitlines() if '"serving"' in line
        )
        with httpx.Client(headers={"authorization": f"Bearer {secret}"}, timeout=60) as client:

            def states() -> list[str]:
                return [model["state"] for model in client.get(f"{url}/v1/models").json()["data"]]

            eventually(lambda: states() == ["unloaded", "loaded"])  # the pinned model stays
            assert client.post(f"{url}/v1/chat/completions", json=body("one")).status_code == 200
            assert client.get(f"{admins}/admin/models").json()["memory"] == 20e9
            assert client.get(f"{url}/admin/models").status_code == 404


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--pin", "three"], "unknown model 'three'; available models: tales"),
        (["--pin", "tales", "--memory", "0.000001"], "pinned models need"),
        (["--idle-unload", "soon"], "'soon' is no duration: write seconds, or 90s, 15m, 2h, 1d"),
        (["--idle-unload", "0"], "'0' is no duration"),
        (["--presets", "none.toml"], "none.toml: cannot be read"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, problem):
    command = [sys.executable, "-m", "moesaic.cli", "serve", "tales", "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("15m", 900), ("2h", 7200), ("1d", 86400)])
def test_durations_have_units(text, seconds):
    assert duration(text) == seconds
