"""Tests of the guard in front of all routes: keys, hosts, origins and proxies; and of the web page's headers."""

from __future__ import annotations

import httpx
import pytest

from moesaic import cli
from moesaic.errors import Forbidden, KeyExhausted, Unauthorized
from moesaic.serve import app as application
from moesaic.serve import keys
from moesaic.serve.guard import Guard
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from moesaic.serve.types import HttpRequest
from tests.support.http import CHAT, Raw
from tests.support.server import running

PUBLIC = {"/", "/health", "/ping", "/ready"}
WRITTEN, ANNA = keys.new("anna")


@pytest.fixture(scope="module")
def locked():
    settings = Settings(failed_keys_per_minute=10**6)
    with running(keys=Keys((ANNA,)), settings=settings) as server:
        yield server


def bearer(key: str = WRITTEN) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# Keys


def test_all_routes_but_public_ones_require_a_key(locked):
    assert {endpoint.path for endpoint in locked.app.services.endpoints if endpoint.public} <= PUBLIC
    with httpx.Client(base_url=locked.url) as client:
        for endpoint in locked.app.services.endpoints:
            path = endpoint.path.replace("{name:path}", "x")
            for headers in ({}, bearer("wrong"), {"x-api-key": "wrong"}):
                response = client.request(
                    endpoint.method, path, headers=headers, content=b"{}" if endpoint.body else None
                )
                assert (response.status_code == 401) == (not endpoint.public), (endpoint, headers)
            if not endpoint.public:
                assert response.headers["www-authenticate"] == "Bearer"
                assert client.request(endpoint.method, path, headers=bearer()).status_code != 401


@pytest.mark.parametrize("headers", [bearer(), {"x-api-key": WRITTEN}, {"authorization": WRITTEN}])
def test_accepted_authentication_headers(locked, headers):
    assert httpx.get(locked.url + "/version", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        [b"Authorization: Bearer \xff\xfe"],
        ["Authorization: Bearer ключ".encode()],
        [b"Authorization: " + b"x" * 20_000],
        [b"Authorization: Bearer " + WRITTEN.encode(), b"Authorization: Bearer " + WRITTEN.encode()],
        [b"Authorization: Bearer " + WRITTEN.encode(), b"X-Api-Key: " + WRITTEN.encode()],
        [b"Authorization:"],
        [b"Authorization: Bearer"],
        [b"Authorization: Bearer  "],
        [b"Authorization: Basic " + WRITTEN.encode()],
        [b"Authorization: Bearer " + WRITTEN.upper().encode()],
        [b"Authorization: Bearer " + ANNA.sha256.encode()],
    ],
)
def test_malformed_keys_are_401(locked, fields):
    with Raw(locked) as raw:
        raw.send(b"\r\n".join([b"GET /version HTTP/1.1", b"Host: " + raw.host.encode(), *fields, b"", b""]))
        assert raw.status() == 401


def test_an_overlong_key_is_refused():
    with pytest.raises(Unauthorized):
        Keys((ANNA,)).owner(b"x" * 2**20)
    long = "k" * (keys.MAX_KEY_BYTES + 1)
    with pytest.raises(Unauthorized):
        Keys((keys.Key("long", keys.digest(long)),)).owner(long.encode())


def test_failed_keys_are_rate_limited_per_address():
    now = [0.0]
    guard = Guard(Settings(failed_keys_per_minute=3), Keys((ANNA,)), lambda: now[0])

    def authenticate(key: str, address: str = "10.0.0.1") -> str:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        return guard.authenticate(HttpRequest({"headers": headers}, "id", address)).name

    for _ in range(3):
        with pytest.raises(Unauthorized):
            authenticate("wrong")
        now[0] += 10
    for key in ("wrong", WRITTEN):  # a valid key gets the same error
        with pytest.raises(KeyExhausted) as caught:
            authenticate(key)
        assert caught.value.retry_after == 30
    assert authenticate(WRITTEN, "10.0.0.2") == "anna"
    now[0] += 31
    assert authenticate(WRITTEN) == "anna"
    with pytest.raises(Unauthorized):
        authenticate("wrong")


def test_the_number_of_tracked_addresses_is_bounded(monkeypatch):
    monkeypatch.setattr("moesaic.serve.guard.MAX_TRACKED_ADDRESSES", 3)
    guard = Guard(Settings(failed_keys_per_minute=1), Keys((ANNA,)))
    for number in range(10):
        with pytest.raises(Unauthorized):
            guard.authenticate(HttpRequest({"headers": []}, "id", f"10.0.0.{number}"))
    assert len(guard._failures) == 3


def test_too_many_failed_keys_are_429():
    with running(keys=Keys((ANNA,)), settings=Settings(failed_keys_per_minute=2)) as server:
        responses = [httpx.get(server.url + "/version", headers=bearer("no")) for _ in range(3)]
        assert [response.status_code for response in responses] == [401, 401, 429]
        assert 55 <= int(responses[2].headers["retry-after"]) <= 60
        assert httpx.get(server.url + "/health").status_code == 200


def test_a_public_host_requires_keys(capsys, monkeypatch):
    monkeypatch.delenv("MOESAIC_API_KEYS", raising=False)
    assert cli.main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "--keys" in capsys.readouterr().err


def test_there_is_no_default_key():
    for name in ("", "moesaic", "admin", "test", "sk-none", "changeme"):
        with pytest.raises(Unauthorized):
            Keys(wanted=True).owner(name.encode())


# Hosts and origins

HOSTS = ["", "/", "?", "#", "@", "a b", "a/b", "127.0.0.1/", "127.0.0.1?x", "127.0.0.1#x", "user@127.0.0.1", "a\\b"]
HOSTS += ["127.0.0.1:80:80", "127.0.0.1:", "127.0.0.1:port", "[::1", "::1", "lo\xe4calhost", "localhost,evil", "\x7f"]


@pytest.mark.parametrize("host", [*HOSTS, "evil.example", "127.0.0.1.evil.example", "localhost.", "169.254.169.254"])
def test_a_malformed_or_foreign_host_is_refused(server, host):
    with Raw(server) as raw:
        assert raw.get(host=host).status() == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"])
def test_loopback_hosts_are_accepted(server, host):
    with Raw(server) as raw:
        assert raw.get(host=host).status() == 200


def test_missing_repeated_and_absolute_hosts(server):
    for head in ("GET /health HTTP/1.1\r\n\r\n", "GET /health HTTP/1.0\r\n\r\n"):
        with Raw(server) as raw:
            assert raw.send(head).status() == 400
    with Raw(server) as raw:
        assert raw.get("/health", "Host: evil.example").status() == 400
    with Raw(server) as raw:
        assert raw.get("http://evil.example/health").status() == 200  # the Host header decides, not the target
    with Raw(server) as raw:
        assert raw.get("http://localhost/health", host="evil.example").status() == 400


def test_dns_rebinding_reaches_no_route(server):
    for path in ("/", "/v1/models", "/health", "/nothing", "/web/index.html"):
        with Raw(server) as raw:
            assert raw.get(path, "Accept: text/html", host="rebound.evil.example:8000").status() == 400
    assert not server.backend.requests


def test_only_allowed_hosts_are_accepted():
    with running(settings=Settings(allowed_hosts=("chat.example.org",))) as server:
        for host, status in (("chat.example.org", 200), ("CHAT.example.org:443", 200), ("other.example.org", 400)):
            with Raw(server) as raw:
                assert raw.get(host=host).status() == status


def test_there_are_no_cors_headers_by_default(server):
    response = httpx.get(server.url + "/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    response = httpx.options(server.url + "/v1/chat/completions", headers=preflight)
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_cross_origin_requests_are_refused(server):
    """Browsers send these content types across origins without a preflight request."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json"):
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"):
            headers = {"origin": origin, "content-type": kind}
            response = httpx.post(server.url + "/v1/chat/completions", headers=headers, json=CHAT)
            assert response.status_code == 403
    assert not server.backend.requests
    own = {"origin": server.url}
    assert httpx.post(server.url + "/v1/chat/completions", headers=own, json=CHAT).status_code == 200


def test_allowed_origins_get_no_credentials():
    for allowed, header in ((("https://chat.example.org",), "https://chat.example.org"), (("*",), "*")):
        with running(settings=Settings(cors_origins=allowed)) as server:
            headers = {"origin": "https://chat.example.org"}
            response = httpx.post(server.url + "/v1/chat/completions", headers=headers, json=CHAT)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == header
            assert "access-control-allow-credentials" not in response.headers
            assert "idempotency-key" in response.headers["access-control-allow-headers"]  # Moesaic's client sends it
            assert "retry-after" in response.headers["access-control-expose-headers"]
    guard = Guard(Settings(cors_origins=("https://a.example",)), Keys())
    scope = {"method": "DELETE", "headers": [(b"host", b"localhost"), (b"origin", b"https://b.example")]}
    with pytest.raises(Forbidden):
        guard.check_origin(scope)
    assert guard.cors(scope) == [(b"vary", b"origin")]


# Proxies


def test_forwarded_addresses_need_a_trusted_proxy():
    def client_address(client: str, forwarded: str, trusted: tuple[str, ...]) -> str:
        headers = [(b"x-forwarded-for", value.encode()) for value in forwarded.split("|")]
        scope = {"client": (client, 1), "headers": headers}
        return Guard(Settings(trusted_proxies=trusted), Keys()).client_address(scope)

    assert client_address("10.0.0.9", "1.2.3.4", ()) == "10.0.0.9"
    assert client_address("10.0.0.9", "1.2.3.4", ("10.0.0.1",)) == "10.0.0.9"
    # a client can forge the first entries; the trusted proxy adds the last one
    assert client_address("10.0.0.1", "6.6.6.6, 1.2.3.4", ("10.0.0.1",)) == "1.2.3.4"
    assert client_address("10.0.0.1", "6.6.6.6|1.2.3.4, 10.0.0.2", ("10.0.0.1", "10.0.0.2")) == "1.2.3.4"
    assert client_address("10.0.0.1", "2001:DB8::1", ("10.0.0.1",)) == "2001:db8::1"
    assert client_address("10.0.0.1", "\n{}", ("10.0.0.1",)) == "10.0.0.1"


# The page


@pytest.fixture
def page(tmp_path, monkeypatch):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "index.html").write_text("<!doctype html><title>hello</title>")
    (tmp_path / "web" / ".hidden").write_text("hidden")
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setattr(application, "WEB_DIRECTORY", tmp_path / "web")
    with running(keys=Keys((ANNA,))) as server:
        yield server


def test_the_web_page_has_security_headers(page):
    response = httpx.get(page.url + "/", headers={"accept": "text/html"})
    assert response.status_code == 200 and "hello" in response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-frame-options"] == "DENY"
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "path",
    [
        *("/web/../secret", "/web/%2e%2e/secret", "/web/..%2fsecret", "/web/%2e%2e%2fsecret", "/web/....//secret"),
        *("/web/client/", "/web/client/../../secret", "/web/client/client/secret", "/web/client/.hidden"),
        *("/web//etc/passwd", "/web/%2fetc%2fpasswd", "/web/..\\secret", "/web/%5c..%5csecret", "/web/.hidden"),
        *(
            "/web/",
            "/web/.",
            "/web/..",
            "/web/%00",
            "/web/index.html%00.js",
            "/web/x/../../secret",
            "/web/%252e%252e/secret",
        ),
    ],
)
def test_paths_cannot_leave_the_web_folder(page, path):
    with Raw(page) as raw:
        response = raw.get(path, "Connection: close").rest()
    assert (
        int(response[9:12]) in (404, 400)
        and b"secret" not in response.replace(path.encode(), b"")
        and b"root:" not in response
    )
