"""schemathesis: what the description of the server promises is asked for in thousands of ways, right and wrong.

``SCHEMATHESIS_EXAMPLES`` is how many examples there are for each operation, besides those at the edges of every
schema. ``SCHEMATHESIS_PATH`` takes only one operation's path. ``positive_data_acceptance`` is left out: a schema
cannot say that a model is unknown, a prompt too long, or a role not the model's own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from moesaic.serve import keys
from moesaic.serve.settings import Settings
from tests.support.client import environment
from tests.support.managed_cluster import running_cluster
from tests.support.server import running, serving

pytestmark = pytest.mark.clients

CONFIG = """[checks]
negative_data_rejection.expected-statuses = ["4xx"]
"""
"""Its own list of how bad data may be refused lacks 413, for a body that is too large; and there is no 5xx in ours."""
GENEROUS = Settings(failed_keys_per_minute=10**9)


def check(url: str, tmp_path: Path, *flags: str, described: str = "") -> str:
    """Run schemathesis with a fixed seed, by what the server or a file says, and return what it said."""
    examples = os.environ.get("SCHEMATHESIS_EXAMPLES", "15")
    if path := os.environ.get("SCHEMATHESIS_PATH"):
        flags = (*flags, "--include-path", path)
    python = environment("schemathesis", "schemathesis==4.32.5")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [str(python.with_name("st")), "run", described or f"{url}/openapi.json", "--url", url, "--seed", "1"]
    command += ["-n", examples]
    command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--no-color", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_a_real_model(tmp_path):
    with serving(tmp_path / "log", "tales", "--context", "64") as url:
        check(url, tmp_path)
    log = (tmp_path / "log").read_text()
    assert '"trace"' not in log and '"status": 500' not in log


def test_keys_are_asked_for_wherever_they_are_said_to_be(tmp_path):
    written, key = keys.new("anna")
    with running(settings=GENEROUS, keys=keys.Keys((key,))) as server:
        flags = ("--phases", "coverage", "-H", f"Authorization: Bearer {written}")
        check(server.url, tmp_path, *flags, "--checks", "ignored_auth,not_a_server_error,status_code_conformance")


@pytest.mark.parametrize(
    "key, paths",
    [
        ("ops", "^/admin/"),
        ("rack", "^/worker/"),
        ("rack", "^/worker_"),
        ("anna", "^/v1/(jobs|completions)"),
        ("anna", "mixtral_chat|^/api/[ev]|^/stream"),
    ],
)
def test_a_gateway(key, paths, tmp_path, caplog):
    with running_cluster(tmp_path, step=0.0, settings=GENEROUS) as cluster:
        cluster.spawn("w0")
        cluster.spawn("w1")
        (tmp_path / "openapi.json").write_bytes(cluster.call("GET", "/openapi.json", key="anna").content)
        flags = ("-H", f"Authorization: Bearer {cluster.key_texts[key]}", "--include-path-regex", paths)
        if paths == "^/worker_":  # AIME's workers take 503 for "log in again"
            flags += ("--exclude-checks", "not_a_server_error,positive_data_acceptance")
        check(cluster.url, tmp_path, *flags, described="openapi.json")
        cluster.ok("POST", "resume")  # it was told to drain, likely
        assert cluster.ask("still there?").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]
