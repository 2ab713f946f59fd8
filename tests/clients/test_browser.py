"""OpenAI's and Anthropic's packages for JavaScript, in Chromium, from a page of another origin than the server's."""

from __future__ import annotations

import subprocess

import pytest

from moesaic.errors import Overloaded
from moesaic.serve import keys
from moesaic.serve.settings import Settings
from tests.support.backend import Script
from tests.support.client import SCRIPTS, node_modules
from tests.support.pages import serving_files
from tests.support.server import running, serving

pytestmark = pytest.mark.clients
PACKAGES = ("openai@7.59.0", "@anthropic-ai/sdk@1.14.0", "esbuild@0.28.2")
MANY = 200
"""More pieces than a client reads of a long answer that it has aborted after the first."""
CALL = """
async ([name, ...values]) => {
  const found = await import("/browser.js");
  return await found[name](...values);
}
"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The origin of a page that can import the packages, bundled as a web project would do."""
    installed, folder = node_modules("js", *PACKAGES), tmp_path_factory.mktemp("page")
    script = (SCRIPTS / "browser.js").read_text()
    (installed / "browser.js").write_text(script)
    bundle = [
        "node_modules/.bin/esbuild",
        "browser.js",
        "--bundle",
        "--format=esm",
        "--keep-names",
        "--log-level=error",
    ]
    subprocess.run([*bundle, f"--outfile={folder}/browser.js"], cwd=installed, check=True)
    with serving_files(folder) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def locked(origin, tmp_path_factory):
    """The address and a key of a server that pages of the origin may call."""
    folder = tmp_path_factory.mktemp("serve")
    written, key = keys.new("page")
    keys.write(folder / "keys.json", (key,))
    with serving(folder / "log", "tales", "--cors-origin", origin, "--keys", str(folder / "keys.json")) as url:
        yield url, written


@pytest.fixture
def page(browser, origin):
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(origin + "/")
        yield page


def test_openai_in_a_browser(page, locked):
    found = page.evaluate(CALL, ["openai", *locked, "tales"])
    assert found["text"] and found["text"] == found["streamed"] == found["response"]
    assert found["id"] and 0 < found["pieces"] < MANY and found["models"] == ["tales"]
    assert found["missing"] == ["NotFoundError", 404, True]
    assert found["value"] == ["BadRequestError", 400, True]
    assert found["locked"] == ["AuthenticationError", 401, True]


def test_anthropic_in_a_browser(page, locked):
    found = page.evaluate(CALL, ["anthropic", *locked, "tales"])
    assert found["text"] and found["text"] == found["streamed"] == found["final"]
    assert found["id"] and 0 < found["events"] < MANY and found["counted"] == found["read"] > 0
    assert found["missing"] == ["NotFoundError", 404, True]
    assert found["value"] == ["BadRequestError", 400, True]
    assert found["locked"] == ["AuthenticationError", 401, True]


@pytest.mark.parametrize("allowed", ["origin", "*"])
def test_openai_and_anthropic_in_a_browser_see_when_to_ask_again(page, origin, allowed):
    with running(settings=Settings(cors_origins=(origin if allowed == "origin" else "*",))) as server:
        server.backend.script = Script(refusal=Overloaded("full"))
        assert page.evaluate(CALL, ["busy", server.url, "any", "scripted"]) == [["RateLimitError", 429, "1"]] * 2
        assert len(server.backend.requests) == 4


def test_openai_in_a_page_that_is_not_allowed(page):
    with running(settings=Settings(cors_origins=("https://page.example.org",))) as server:
        refused = (
            "(...all) => import('/browser.js').then(({ openai }) => openai(...all[0])).catch((error) => error.name)"
        )
        assert page.evaluate(refused, [server.url, "any", "scripted"]) == "Error"
        assert not server.backend.requests
