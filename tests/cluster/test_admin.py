"""What administrators see and do: over HTTP, by the command line, and in the figures."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moesaic import cli
from moesaic.cluster.worker.agent import Worker
from moesaic.serve import keys
from tests.support.backend import FakeBackend, answer
from tests.support.managed_cluster import Site, site
from tests.support.wait import eventually

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as found:
        yield found


def dead(here: Site, once: str = "") -> str:
    """Have a job kill its worker, and return its number."""
    here.spawn("w0")
    gone = here.ask("EXIT", once=once)
    assert gone.status_code == 500 and "every worker that ran" in gone.text
    [job] = here.get("jobs?state=dead")["jobs"]
    return str(job["id"])


def admin(here: Site, *line: str, key: str = "ops") -> int:
    return cli.main(["admin", *line, "--url", here.url, "--key", here.written[key]])


def test_every_route_requires_an_admin_key(here: Site) -> None:
    routes = [each for each in here.server.app.services.endpoints if each.path.startswith("/admin/")]
    assert len(routes) == 14 and all(each.admin for each in routes)
    for each in routes:
        path = each.path.replace("{id}", "x")
        assert here.call(each.method, path, {"name": "x"}, key="").status_code == 401
        for key in ("anna", "rack"):
            assert here.call(each.method, path, {"name": "x"}, key=key).status_code == 403
        assert here.call(each.method, path, {"name": "x"}).status_code in (200, 404)


def test_without_keys_admin_routes_are_refused(tmp_path: Path) -> None:
    with site(tmp_path) as here:
        here.server.app.services.keys.wanted = False
        assert here.call("GET", "/admin/workers", key="").status_code == 403


def test_workers_and_queues(here: Site) -> None:
    here.spawn("w0")
    waiting = [here.asking(f"job {number}", 60) for number in range(4)]
    eventually(lambda: here.get("queues")["queues"][0]["queued"] == 2)
    [worker] = here.get("workers")["workers"]
    assert worker["name"] == "rack/w0" and worker["key"] == "rack" and worker["models"] == ["fake"]
    assert worker["slots"] == 2 and len(worker["jobs"]) == 2 and not worker["drained"]
    assert abs(worker["since"] - time.time()) < 60 and 0 <= worker["heard"] < 30
    [queue] = here.get("queues")["queues"]
    assert (queue["model"], queue["workers"], queue["slots"], queue["leased"]) == ("fake", 1, 2, 2)
    assert queue["cost"] > 2 * 60
    jobs = here.get("jobs?state=leased")["jobs"]
    assert {job["id"] for job in jobs} == set(worker["jobs"]) and {job["key"] for job in jobs} == {"anna"}
    status = here.get("status")
    assert status["state"] == "serving" and status["queued"] == 2 and status["slots"] == 2 and status["running"] == 4
    assert "job 0" not in json.dumps([jobs, status, here.get("jobs?state=queued")])
    assert all(each().status_code == 200 for each in waiting)


def test_drained_worker_finishes_its_jobs_and_gets_no_more(here: Site) -> None:
    process = here.spawn("w0")
    running = here.asking("first", 60)
    eventually(lambda: here.get("queues")["queues"][0]["leased"] == 1)
    here.ok("POST", "workers/drain", {"name": "rack/w0"})
    assert here.get("workers")["workers"][0]["drained"] and here.get("workers")["drained"] == ["rack/w0"]
    waiting = here.asking("second")
    assert running().json()["choices"][0]["text"] == answer("first", 1, 60)
    eventually(lambda: here.get("status")["queued"] == 1)
    os.kill(process, 9)  # it holds by name
    eventually(lambda: not here.gateway.workers.sessions)
    here.spawn("w0")
    assert here.get("workers")["workers"][0]["drained"] and here.get("status")["leased"] == 0
    here.ok("POST", "workers/resume", {"name": "rack/w0"})
    assert waiting().json()["choices"][0]["text"] == answer("second", 1, 5)
    assert here.call("POST", "/admin/workers/drain", {"name": "rack/none"}).status_code == 404


def test_banned_worker_is_replaced_by_another(here: Site) -> None:
    here.spawn("w0")
    running = here.asking("first", 100)
    eventually(lambda: here.get("queues")["queues"][0]["leased"] == 1)
    here.ok("POST", "workers/ban", {"name": "rack/w0"})
    eventually(lambda: "was banned" in (here.file.parent / "log").read_text())  # it was told, and has ended
    assert here.get("workers") == {"workers": [], "drained": [], "banned": ["rack/w0"]}
    here.spawn("w2")
    assert running().json()["choices"][0]["text"] == answer("first", 1, 100)
    assert here.get("status")["lost"] == 0  # blameless
    here.ok("POST", "workers/resume", {"name": "rack/w0"})
    here.spawn("w0")


def test_dead_job_can_be_inspected_and_revived(here: Site) -> None:
    job_id = dead(here, once="again")
    shown = here.get(f"jobs/{job_id}")
    assert shown["job"]["state"] == "dead" and shown["job"]["crashes"] == 1 and "request" not in shown
    assert here.get(f"jobs/{job_id}?request=true")["request"]["prompt"] == "EXIT"
    assert "every worker that ran" in here.ask("EXIT", once="again").text  # whoever asks again is told the same
    here.ok("POST", f"jobs/{job_id}/revive")
    eventually(lambda: here.get(f"jobs/{job_id}")["job"]["state"] == "queued")
    assert here.call("POST", f"/admin/jobs/{job_id}/revive").status_code == 409
    waiting = here.asking("EXIT", once="again")  # now it waits for another end
    eventually(lambda: job_id in here.gateway.jobs.jobs and here.gateway.jobs.jobs[job_id].readers == 1)
    assert here.ok("DELETE", f"jobs/{job_id}") == {"name": job_id, "state": "cancelled"}
    assert waiting().status_code == 499
    assert here.call("POST", "/admin/jobs/none/revive").status_code == 404
    assert here.call("GET", f"/admin/jobs/{job_id}?request=true").status_code == 409


def test_admin_can_cancel_any_job(here: Site) -> None:
    here.spawn("w0")
    waiting = here.asking("long", 2000)
    [job] = eventually(lambda: here.get("jobs?state=leased")["jobs"])
    here.ok("DELETE", f"jobs/{job['id']}")
    assert waiting().status_code == 499
    eventually(lambda: here.get("workers")["workers"][0]["jobs"] == [])


def test_drained_gateway_finishes_its_jobs_and_takes_no_more(here: Site) -> None:
    here.spawn("w0")
    running = here.asking("first", 100)
    eventually(lambda: here.get("queues")["queues"][0]["leased"] == 1)
    here.ok("POST", "drain")
    assert here.get("status")["state"] == "draining" and httpx.get(here.url + "/ready").status_code == 503
    refused = here.ask("second")
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert running().status_code == 200
    here.ok("POST", "resume")
    assert here.ask("third").status_code == 200
    here.server.app.state.stopping = True
    assert here.call("POST", "/admin/resume").status_code == 409


def test_keys_are_listed_and_reloaded(here: Site) -> None:
    listed = here.get("keys")["keys"]
    assert [(key["name"], key["kind"]) for key in listed] == [("ops", "admin"), ("rack", "worker"), ("anna", "client")]
    assert not re.search("[0-9a-f]{64}", json.dumps(listed))
    new, key = keys.new("bob", requests_per_minute=5)
    here.written["bob"] = new
    keys.write(here.file, (*(each for each in keys.read(here.file) if each.name != "anna"), key))
    assert here.call("GET", "/v1/models", key="bob").status_code == 401
    assert [key["name"] for key in here.ok("POST", "keys/reload")["keys"]] == ["ops", "rack", "bob"]
    assert here.call("GET", "/v1/models", key="bob").status_code == 200
    assert here.call("GET", "/v1/models", key="anna").status_code == 401
    here.file.write_text("broken")
    assert here.call("POST", "/admin/keys/reload").status_code == 400
    assert here.call("GET", "/v1/models", key="bob").status_code == 200


@pytest.mark.parametrize("query", ["state=gone", "most=0", "most=1001", "most=x", "most=-1"])
def test_invalid_job_queries_are_refused(here: Site, query: str) -> None:
    assert here.call("GET", f"/admin/jobs?{query}").status_code == 400


def test_admin_command(here: Site, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = dead(here)
    here.spawn("w2")
    assert admin(here, "status") == 0
    assert re.search(r"^state +serving$", capsys.readouterr().out, re.M)
    assert admin(here, "workers") == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "STATE", "MODELS", "JOBS", "SINCE", "HEARD", "ABOUT"]
    assert row.split()[:4] == ["rack/w2", "working", "fake", "0/2"]
    assert admin(here, "queues") == 0 and "fake" in capsys.readouterr().out
    assert admin(here, "dead") == 0 and job_id in capsys.readouterr().out
    assert admin(here, "jobs", "done", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"state": "done", "jobs": []}
    assert admin(here, "job", job_id, "--request") == 0 and "EXIT" in capsys.readouterr().out
    assert admin(here, "drain", "rack/w2") == 0 and "drained" in capsys.readouterr().out
    assert here.gateway.workers.sessions["rack/w2"].drained
    assert admin(here, "revive", job_id) == 0 and admin(here, "cancel", job_id) == 0
    assert admin(here, "ban", "rack/w2") == 0
    capsys.readouterr()
    assert admin(here, "workers") == 0
    assert capsys.readouterr().out == "no workers\nbanned: rack/w2\n"
    assert admin(here, "drain") == 0 and here.server.app.state.draining
    assert admin(here, "resume") == 0 and not here.server.app.state.draining
    assert admin(here, "keys") == 0 and admin(here, "reload") == 0
    assert "anna" in capsys.readouterr().out


def test_admin_command_errors(here: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for line, why in (
        (("job", "none"), "no job 'none'"),
        (("revive",), "requires a name"),
        (("workers", "x"), "takes no name"),
        (("jobs", "gone"), "expected one of"),
        (("status", "--url", "http://example.org"), "unencrypted"),
        (("status", "--url", "http://127.0.0.1:1"), "no answer"),
        (("status", "--url", here.url + "/v1"), "no GET '/v1/admin/status'"),
    ):
        given = ("--url", here.url) if "--url" not in line else ()
        assert cli.main(["admin", *line, *given, "--key", here.written["ops"]]) == 2
        assert why in capsys.readouterr().err
    assert admin(here, "status", key="anna") == 2
    assert "administrator's key" in capsys.readouterr().err


def test_worker_names_cannot_send_terminal_escapes(here: Site, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"name": "w", "models": [{"name": "fake\x1b[2J\n"}], "about": {"machine": "\x1b]0;x\x07"}}
    assert here.call("POST", "/worker/register", body, key="rack").status_code == 200
    assert admin(here, "workers") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and len(shown.splitlines()) == 2


def test_silent_worker_is_unregistered(tmp_path: Path) -> None:
    with site(tmp_path, lease=0.2) as here:
        body = {"name": "w", "models": [{"name": "fake"}]}
        assert here.call("POST", "/worker/register", body, key="rack").status_code == 200
        assert [each["name"] for each in here.get("workers")["workers"]] == ["rack/w"]
        here.spawn("w0")
        eventually(lambda: "rack/w" not in here.gateway.workers.sessions)
        assert [each["name"] for each in here.get("workers")["workers"]] == ["rack/w0"]


def test_leaving_worker_does_not_register_again(here: Site) -> None:
    async def come_and_go() -> None:
        names = [f"w{number}" for number in range(20)]
        crew = [Worker(FakeBackend(), [here.url], name=name, key=here.written["rack"]) for name in names]
        running = [asyncio.ensure_future(worker.run()) for worker in crew]
        await asyncio.gather(*(worker.connected.wait() for worker in crew))
        await asyncio.sleep(0.2)  # all wait for work
        await asyncio.gather(*(worker.drain(1) for worker in crew))
        await asyncio.gather(*running)

    asyncio.run(come_and_go())
    time.sleep(0.2)
    assert list(here.gateway.workers.sessions) == []


def test_figures(here: Site) -> None:
    dead(here)
    here.spawn("w2")
    here.ask("fine")
    here.ok("POST", "workers/drain", {"name": "rack/w2"})
    waiting = here.asking("later")
    eventually(lambda: "fake" in here.gateway.depths and here.gateway.depths["fake"].queued == 1)
    text = here.call("GET", "/metrics").text
    found = {
        (
            sample.name,
            tuple(sample.labels[name] for name in ("state", "model_name") if name in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("moesaic_gateway_")
    }
    assert found["moesaic_gateway_workers", ("drained",)] == 1 and found["moesaic_gateway_workers", ("working",)] == 0
    assert found["moesaic_gateway_jobs", ("queued", "fake")] == 1
    assert found["moesaic_gateway_queued_tokens", ("fake",)] > 0
    assert found["moesaic_gateway_leases_lost_total", ()] == found["moesaic_gateway_dead_total", ()] == 1
    assert found["moesaic_gateway_fenced_total", ()] == 0
    assert found["moesaic_gateway_queue_seconds_count", ("fake",)] == 2
    shown = set(re.findall(r"moesaic_gateway_\w+", DASHBOARD.read_text()))
    assert len(shown) == 7 and shown <= {name for name, _ in found}
    here.ok("POST", "workers/resume", {"name": "rack/w2"})
    assert waiting().status_code == 200
