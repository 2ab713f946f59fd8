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
from tests.support.managed_cluster import ManagedCluster, running_cluster
from tests.support.wait import eventually

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ManagedCluster]:
    with running_cluster(tmp_path) as cluster:
        yield cluster


def dead(cluster: ManagedCluster, idempotency_key: str = "") -> str:
    """Have a job kill its worker, and return its number."""
    cluster.spawn("w0")
    gone = cluster.ask("EXIT", idempotency_key=idempotency_key)
    assert gone.status_code == 500 and "every worker that ran" in gone.text
    [job] = cluster.get("jobs?state=dead")["jobs"]
    return str(job["id"])


def admin(cluster: ManagedCluster, *line: str, key: str = "ops") -> int:
    return cli.main(["admin", *line, "--url", cluster.url, "--key", cluster.key_texts[key]])


def test_every_route_requires_an_admin_key(cluster: ManagedCluster) -> None:
    routes = [each for each in cluster.server.app.services.endpoints if each.path.startswith("/admin/")]
    assert len(routes) == 14 and all(each.admin for each in routes)
    for each in routes:
        path = each.path.replace("{id}", "x")
        assert cluster.call(each.method, path, {"name": "x"}, key="").status_code == 401
        for key in ("anna", "rack"):
            assert cluster.call(each.method, path, {"name": "x"}, key=key).status_code == 403
        assert cluster.call(each.method, path, {"name": "x"}).status_code in (200, 404)


def test_without_keys_admin_routes_are_refused(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        cluster.server.app.services.keys.wanted = False
        assert cluster.call("GET", "/admin/workers", key="").status_code == 403


def test_workers_and_queues(cluster: ManagedCluster) -> None:
    cluster.spawn("w0")
    waiting = [cluster.ask_in_background(f"job {number}", 60) for number in range(4)]

    def arrived() -> bool:  # two jobs may be queued while only three have come and one is leased
        queue = cluster.get("queues")["queues"][0]
        return (queue["queued"], queue["leased"]) == (2, 2)

    eventually(arrived)
    [worker] = cluster.get("workers")["workers"]
    assert worker["name"] == "rack/w0" and worker["key"] == "rack" and worker["models"] == ["fake"]
    assert worker["slots"] == 2 and len(worker["jobs"]) == 2 and not worker["drained"]
    assert abs(worker["since"] - time.time()) < 60 and 0 <= worker["heard"] < 30
    [queue] = cluster.get("queues")["queues"]
    assert (queue["model"], queue["workers"], queue["slots"], queue["leased"]) == ("fake", 1, 2, 2)
    assert queue["cost"] > 2 * 60
    jobs = cluster.get("jobs?state=leased")["jobs"]
    assert {job["id"] for job in jobs} == set(worker["jobs"]) and {job["key"] for job in jobs} == {"anna"}
    status = cluster.get("status")
    assert status["state"] == "serving" and status["queued"] == 2 and status["slots"] == 2 and status["running"] == 4
    assert "job 0" not in json.dumps([jobs, status, cluster.get("jobs?state=queued")])
    assert all(each().status_code == 200 for each in waiting)


def test_drained_worker_finishes_its_jobs_and_gets_no_more(cluster: ManagedCluster) -> None:
    process = cluster.spawn("w0")
    running = cluster.ask_in_background("first", 60)
    eventually(lambda: cluster.get("queues")["queues"][0]["leased"] == 1)
    cluster.ok("POST", "workers/drain", {"name": "rack/w0"})
    assert cluster.get("workers")["workers"][0]["drained"] and cluster.get("workers")["drained"] == ["rack/w0"]
    waiting = cluster.ask_in_background("second")
    assert running().json()["choices"][0]["text"] == answer("first", 1, 60)
    eventually(lambda: cluster.get("status")["queued"] == 1)
    os.kill(process, 9)  # it holds by name
    eventually(lambda: not cluster.gateway.workers.sessions)
    cluster.spawn("w0")
    assert cluster.get("workers")["workers"][0]["drained"] and cluster.get("status")["leased"] == 0
    cluster.ok("POST", "workers/resume", {"name": "rack/w0"})
    assert waiting().json()["choices"][0]["text"] == answer("second", 1, 5)
    assert cluster.call("POST", "/admin/workers/drain", {"name": "rack/none"}).status_code == 404


def test_banned_worker_is_replaced_by_another(cluster: ManagedCluster) -> None:
    cluster.spawn("w0")
    running = cluster.ask_in_background("first", 100)
    eventually(lambda: cluster.get("queues")["queues"][0]["leased"] == 1)
    cluster.ok("POST", "workers/ban", {"name": "rack/w0"})
    eventually(
        lambda: "was banned" in (cluster.key_file.parent / "log").read_text()
    )  # the worker was told, and has ended
    assert cluster.get("workers") == {"workers": [], "drained": [], "banned": ["rack/w0"]}
    cluster.spawn("w2")
    assert running().json()["choices"][0]["text"] == answer("first", 1, 100)
    assert cluster.get("status")["lost"] == 0  # blameless
    cluster.ok("POST", "workers/resume", {"name": "rack/w0"})
    cluster.spawn("w0")


def test_dead_job_can_be_inspected_and_revived(cluster: ManagedCluster) -> None:
    job_id = dead(cluster, idempotency_key="again")
    shown = cluster.get(f"jobs/{job_id}")
    assert shown["job"]["state"] == "dead" and shown["job"]["crashes"] == 1 and "request" not in shown
    assert cluster.get(f"jobs/{job_id}?request=true")["request"]["prompt"] == "EXIT"
    assert (
        "every worker that ran" in cluster.ask("EXIT", idempotency_key="again").text
    )  # a repeated request gets the same error
    cluster.ok("POST", f"jobs/{job_id}/revive")
    eventually(lambda: cluster.get(f"jobs/{job_id}")["job"]["state"] == "queued")
    assert cluster.call("POST", f"/admin/jobs/{job_id}/revive").status_code == 409
    waiting = cluster.ask_in_background("EXIT", idempotency_key="again")  # now it waits for another end
    eventually(lambda: job_id in cluster.gateway.jobs.jobs and cluster.gateway.jobs.jobs[job_id].readers == 1)
    assert cluster.ok("DELETE", f"jobs/{job_id}") == {"name": job_id, "state": "cancelled"}
    assert waiting().status_code == 499
    assert cluster.call("POST", "/admin/jobs/none/revive").status_code == 404
    assert cluster.call("GET", f"/admin/jobs/{job_id}?request=true").status_code == 409


def test_admin_can_cancel_any_job(cluster: ManagedCluster) -> None:
    cluster.spawn("w0")
    waiting = cluster.ask_in_background("long", 2000)
    [job] = eventually(lambda: cluster.get("jobs?state=leased")["jobs"])
    cluster.ok("DELETE", f"jobs/{job['id']}")
    assert waiting().status_code == 499
    eventually(lambda: cluster.get("workers")["workers"][0]["jobs"] == [])


def test_drained_gateway_finishes_its_jobs_and_takes_no_more(cluster: ManagedCluster) -> None:
    cluster.spawn("w0")
    running = cluster.ask_in_background("first", 100)
    eventually(lambda: cluster.get("queues")["queues"][0]["leased"] == 1)
    cluster.ok("POST", "drain")
    assert cluster.get("status")["state"] == "draining" and httpx.get(cluster.url + "/ready").status_code == 503
    refused = cluster.ask("second")
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert running().status_code == 200
    cluster.ok("POST", "resume")
    assert cluster.ask("third").status_code == 200
    cluster.server.app.state.stopping = True
    assert cluster.call("POST", "/admin/resume").status_code == 409


def test_keys_are_listed_and_reloaded(cluster: ManagedCluster) -> None:
    listed = cluster.get("keys")["keys"]
    assert [(key["name"], key["kind"]) for key in listed] == [("ops", "admin"), ("rack", "worker"), ("anna", "client")]
    assert not re.search("[0-9a-f]{64}", json.dumps(listed))
    new, key = keys.new("bob", requests_per_minute=5)
    cluster.key_texts["bob"] = new
    keys.write(cluster.key_file, (*(each for each in keys.read(cluster.key_file) if each.name != "anna"), key))
    assert cluster.call("GET", "/v1/models", key="bob").status_code == 401
    assert [key["name"] for key in cluster.ok("POST", "keys/reload")["keys"]] == ["ops", "rack", "bob"]
    assert cluster.call("GET", "/v1/models", key="bob").status_code == 200
    assert cluster.call("GET", "/v1/models", key="anna").status_code == 401
    cluster.key_file.write_text("broken")
    assert cluster.call("POST", "/admin/keys/reload").status_code == 400
    assert cluster.call("GET", "/v1/models", key="bob").status_code == 200


@pytest.mark.parametrize("query", ["state=gone", "most=0", "most=1001", "most=x", "most=-1"])
def test_invalid_job_queries_are_refused(cluster: ManagedCluster, query: str) -> None:
    assert cluster.call("GET", f"/admin/jobs?{query}").status_code == 400


def test_admin_command(cluster: ManagedCluster, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = dead(cluster)
    cluster.spawn("w2")
    assert admin(cluster, "status") == 0
    assert re.search(r"^state +serving$", capsys.readouterr().out, re.M)
    assert admin(cluster, "workers") == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "STATE", "MODELS", "JOBS", "SINCE", "HEARD", "ABOUT"]
    assert row.split()[:4] == ["rack/w2", "working", "fake", "0/2"]
    assert admin(cluster, "queues") == 0 and "fake" in capsys.readouterr().out
    assert admin(cluster, "dead") == 0 and job_id in capsys.readouterr().out
    assert admin(cluster, "jobs", "done", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"state": "done", "jobs": []}
    assert admin(cluster, "job", job_id, "--request") == 0 and "EXIT" in capsys.readouterr().out
    assert admin(cluster, "drain", "rack/w2") == 0 and "drained" in capsys.readouterr().out
    assert cluster.gateway.workers.sessions["rack/w2"].drained
    assert admin(cluster, "revive", job_id) == 0 and admin(cluster, "cancel", job_id) == 0
    assert admin(cluster, "ban", "rack/w2") == 0
    capsys.readouterr()
    assert admin(cluster, "workers") == 0
    assert capsys.readouterr().out == "no workers\nbanned: rack/w2\n"
    assert admin(cluster, "drain") == 0 and cluster.server.app.state.draining
    assert admin(cluster, "resume") == 0 and not cluster.server.app.state.draining
    assert admin(cluster, "keys") == 0 and admin(cluster, "reload") == 0
    assert "anna" in capsys.readouterr().out


def test_admin_command_errors(cluster: ManagedCluster, capsys: pytest.CaptureFixture[str]) -> None:
    for line, why in (
        (("job", "none"), "no job 'none'"),
        (("revive",), "requires a name"),
        (("workers", "x"), "takes no name"),
        (("jobs", "gone"), "expected one of"),
        (("status", "--url", "http://example.org"), "unencrypted"),
        (("status", "--url", "http://127.0.0.1:1"), "does not answer"),
        (("status", "--url", cluster.url + "/v1"), "no GET '/v1/admin/status'"),
    ):
        given = ("--url", cluster.url) if "--url" not in line else ()
        assert cli.main(["admin", *line, *given, "--key", cluster.key_texts["ops"]]) == 2
        assert why in capsys.readouterr().err
    assert admin(cluster, "status", key="anna") == 2
    assert "administrator's key" in capsys.readouterr().err


def test_worker_names_cannot_send_terminal_escapes(cluster: ManagedCluster, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"name": "w", "models": [{"name": "fake\x1b[2J\n"}], "about": {"machine": "\x1b]0;x\x07"}}
    assert cluster.call("POST", "/worker/register", body, key="rack").status_code == 200
    assert admin(cluster, "workers") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and len(shown.splitlines()) == 2


def test_silent_worker_is_unregistered(tmp_path: Path) -> None:
    with running_cluster(tmp_path, lease=0.2) as cluster:
        body = {"name": "w", "models": [{"name": "fake"}]}
        assert cluster.call("POST", "/worker/register", body, key="rack").status_code == 200
        assert [each["name"] for each in cluster.get("workers")["workers"]] == ["rack/w"]
        cluster.spawn("w0")
        eventually(lambda: "rack/w" not in cluster.gateway.workers.sessions)
        assert [each["name"] for each in cluster.get("workers")["workers"]] == ["rack/w0"]


def test_leaving_worker_does_not_register_again(cluster: ManagedCluster) -> None:
    async def come_and_go() -> None:
        names = [f"w{number}" for number in range(20)]
        crew = [Worker(FakeBackend(), [cluster.url], name=name, key=cluster.key_texts["rack"]) for name in names]
        running = [asyncio.ensure_future(worker.run()) for worker in crew]
        await asyncio.gather(*(worker.connected.wait() for worker in crew))
        await asyncio.sleep(0.2)  # all wait for work
        await asyncio.gather(*(worker.drain(1) for worker in crew))
        await asyncio.gather(*running)

    asyncio.run(come_and_go())
    time.sleep(0.2)
    assert list(cluster.gateway.workers.sessions) == []


def test_figures(cluster: ManagedCluster) -> None:
    dead(cluster)
    cluster.spawn("w2")
    cluster.ask("fine")
    cluster.ok("POST", "workers/drain", {"name": "rack/w2"})
    waiting = cluster.ask_in_background("later")
    eventually(lambda: "fake" in cluster.gateway.depths and cluster.gateway.depths["fake"].queued == 1)
    text = cluster.call("GET", "/metrics").text
    values = {
        (
            sample.name,
            tuple(sample.labels[name] for name in ("state", "model_name") if name in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("moesaic_gateway_")
    }
    assert values["moesaic_gateway_workers", ("drained",)] == 1 and values["moesaic_gateway_workers", ("working",)] == 0
    assert values["moesaic_gateway_jobs", ("queued", "fake")] == 1
    assert values["moesaic_gateway_queued_tokens", ("fake",)] > 0
    assert values["moesaic_gateway_leases_lost_total", ()] == values["moesaic_gateway_dead_total", ()] == 1
    assert values["moesaic_gateway_fenced_total", ()] == 0
    assert values["moesaic_gateway_queue_seconds_count", ("fake",)] == 2
    shown = set(re.findall(r"moesaic_gateway_\w+", DASHBOARD.read_text()))
    assert len(shown) == 7 and shown <= {name for name, _ in values}
    cluster.ok("POST", "workers/resume", {"name": "rack/w2"})
    assert waiting().status_code == 200
