"""Administrators' own port: their routes are there and nowhere else, and nothing else is there (S07)."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
import trustme

from moesaic.serve import keys


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, httpx.Client]]:
    """Where clients come in, where administrators do, and somebody with an admin's key."""
    folder = tmp_path_factory.mktemp("gateway")
    written, key = keys.new("ops", admin=True)
    keys.write(folder / "keys.json", (key,))
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "cert.pem"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    command = [sys.executable, "-m", "moesaic.cli", "gateway", "--port", "0", "--admin-port", "0", "--jobs"]
    command += [str(folder / "jobs.sqlite"), "--keys", str(folder / "keys.json")]
    command += ["--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "cert.pem")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            told = next(json.loads(line) for line in process.stderr if '"serving"' in line)
            trusted = ssl.create_default_context(cafile=str(folder / "ca.pem"))
            with httpx.Client(verify=trusted, headers={"authorization": f"Bearer {written}"}) as client:
                yield told["url"], told["admins"], client
            process.terminate()
            process.stderr.read()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_routes_are_on_their_own_port_alone(gateway: tuple[str, str, httpx.Client]) -> None:
    url, admins, client = gateway
    assert url.startswith("https://127.0.0.1:") and admins.startswith("http://127.0.0.1:")
    assert client.get(admins + "/admin/status").json()["state"] == "serving"
    assert client.get(url + "/v1/models").status_code == 200
    for wrong in (url + "/admin/status", url + "/admin/keys", admins + "/v1/models", admins + "/metrics"):
        answer = client.get(wrong)
        assert answer.status_code == 404 and "on this port" in answer.text
    assert client.post(admins + "/worker/lease", json={"name": "w"}).status_code == 404
    assert client.get(admins + "/health").status_code == client.get(url + "/health").status_code == 200


def test_no_header_says_which_port_it_is(gateway: tuple[str, str, httpx.Client]) -> None:
    url, admins, client = gateway
    for host in (admins.removeprefix("http://"), "localhost"):
        assert client.get(url + "/admin/status", headers={"host": host}).status_code == 404


def test_the_key_is_needed_there_too(gateway: tuple[str, str, httpx.Client]) -> None:
    _, admins, _ = gateway
    assert httpx.get(admins + "/admin/status").status_code == 401
