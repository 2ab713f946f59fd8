"""Tests of CORS: the official clients for browsers, from pages of an allowed origin, on every route and in errors."""

from __future__ import annotations

import httpx
import pytest

from moesaic.errors import InvalidParameter, NumericalError, Overloaded
from moesaic.serve import keys
from moesaic.serve.cors import parse_origin
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.support.backend import Script
from tests.support.http import CHAT
from tests.support.server import running

PAGE = "https://page.example.org"
SDK = (
    "authorization,content-type,idempotency-key,x-stainless-arch,x-stainless-helper-method,x-stainless-lang,"
    "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-timeout,openai-organization,openai-project,openai-beta"
)
ANTHROPIC = f"{SDK},x-api-key,anthropic-version,anthropic-beta,anthropic-dangerous-direct-browser-access"
WRITTEN, ANNA = keys.new("anna")


@pytest.fixture(scope="module")
def named():
    with running(settings=Settings(cors_origins=(PAGE,))) as server:
        yield server


@pytest.fixture(scope="module")
def anyone():
    with running(settings=Settings(cors_origins=("*",))) as server:
        yield server


def preflight(server, path: str, asked: str = SDK, origin: str = PAGE, **more: str) -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": asked}
    return httpx.options(server.url + path, headers=headers | more)


def words(response: httpx.Response, name: str) -> set[str]:
    return {word.strip() for word in response.headers[name].split(",")}


@pytest.mark.parametrize("asked", [SDK, ANTHROPIC])
@pytest.mark.parametrize("server", ["named", "anyone"])
def test_a_preflight_allows_all_headers_of_the_official_clients(server, asked, request):
    server = request.getfixturevalue(server)
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/models", "/generate_stream", "/nothing"):
        response = preflight(server, path, asked)
        assert response.status_code == 204 and response.content == b""
        # Browsers take "*" neither for Authorization nor, before 2019, for anything.
        assert set(asked.split(",")) <= words(response, "access-control-allow-headers")
        assert int(response.headers["access-control-max-age"]) > 0
        assert "access-control-request-headers" in words(response, "vary")
        assert "access-control-allow-credentials" not in response.headers


def test_a_preflight_reflects_names_only(named):
    response = preflight(named, "/v1/models", "X-Good, x bad, ,x(bad), x:bad")
    assert "x-good" in words(response, "access-control-allow-headers")
    assert "bad" not in response.headers["access-control-allow-headers"]
    asked = ",".join(f"x-{number}" for number in range(3000))
    assert response.status_code == preflight(named, "/v1/models", asked).status_code == 204


def test_a_preflight_of_another_origin_allows_nothing(named):
    response = preflight(named, "/v1/models", origin="https://evil.example")
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert words(response, "vary") == {"origin"}


def test_a_private_network_may_be_called_if_the_origin_is_allowed(named):
    asks = {"access-control-request-private-network": "true"}
    allows = "access-control-allow-private-network"
    assert preflight(named, "/v1/models", **asks).headers[allows] == "true"
    assert allows not in preflight(named, "/v1/models").headers
    assert allows not in preflight(named, "/v1/models", origin="https://evil.example", **asks).headers


def test_a_response_without_an_origin_is_not_cached_for_pages(named, server):
    assert httpx.get(named.url + "/health").headers["vary"] == "origin"
    assert "vary" not in httpx.get(server.url + "/health").headers


def test_errors_can_be_read_by_pages():
    """A browser reports a response without these headers as a network error."""
    settings = Settings(cors_origins=(PAGE,), body_bytes=1000)
    with running(keys=Keys((ANNA,)), settings=settings) as server:
        json = {"content-type": "application/json"}
        with httpx.Client(base_url=server.url, headers={"origin": PAGE} | json) as client:
            bearer = {"authorization": f"Bearer {WRITTEN}"}

            def ask(path: str = "/v1/chat/completions", **options) -> httpx.Response:
                return client.post(path, **{"headers": bearer, "json": CHAT} | options)

            found = [ask(headers={}), ask("/nothing"), ask("/v1/models"), ask(content=b"{"), ask(content=b"x" * 2000)]
            found.append(ask(headers=bearer | {"content-encoding": "gzip"}))
            server.backend.script = Script(refusal=Overloaded("full"))
            found.append(ask())
            server.backend.script = Script(refusal=RuntimeError("broken"))
            found += [ask(), ask("/v1/messages", json=CHAT | {"max_tokens": 5})]
            server.backend.script = Script(error=NumericalError("the model computed NaN"))
            found.append(ask(json=CHAT | {"stream": True}))
    assert [each.status_code for each in found] == [401, 404, 405, 400, 413, 415, 429, 500, 500, 200]
    for each in found:
        assert each.headers["access-control-allow-origin"] == PAGE
        assert {"retry-after", "x-request-id", "request-id", "*"} <= words(each, "access-control-expose-headers")
        assert words(each, "vary") == {"origin"}


def test_every_route_answers_pages(anyone):
    with httpx.Client(base_url=anyone.url, headers={"origin": PAGE}) as client:
        for endpoint in anyone.app.services.endpoints:
            path = endpoint.path.replace("{name:path}", "x")
            response = client.request(endpoint.method, path, content=b"{}" if endpoint.body else None)
            assert response.headers["access-control-allow-origin"] == "*", endpoint
        assert client.get("/web/index.html").headers["access-control-allow-origin"] == "*"


def test_origins_are_compared_as_browsers_send_them():
    for written in ("https://Page.Example.org", "https://page.example.org/", "https://page.example.org:443"):
        assert parse_origin(written) == PAGE
    for kept in ("http://localhost:3000", "http://[::1]:8080", "chrome-extension://abcdef", "null", "*"):
        assert parse_origin(kept) == kept


@pytest.mark.parametrize("written", ["page.example.org", "", "https://", "https://*.example.org", "https://a/b", "a b"])
def test_what_is_no_origin_is_refused_at_the_start(written):
    with pytest.raises(InvalidParameter, match="expected an origin"):
        Settings(cors_origins=(written,))
