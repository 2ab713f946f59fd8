"""The JavaScript client: in Node, as a package, and in a browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.breaking_server import Plan, stream
from tests.support.client import JS_PACKAGE, JS_SOURCE, ROOT, node
from tests.support.require import require_program
from tests.support.sizes import sizes

TESTS = Path(__file__).parent / "js"
WHOLE = stream(Plan(), 0)


def test_events_errors_and_retries():
    node("--test", TESTS / "events.test.js")


@pytest.mark.parametrize("step", sizes(7, 1))
def test_streams_that_break(step):
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.breaking_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin and server.stdout
        root = f"http://127.0.0.1:{int(server.stdout.readline())}"
        places = [len(WHOLE), WHOLE.index(b"dich") + 2, WHOLE.index(b'"usage"')]
        try:
            node("--test", TESTS / "resume.test.js", BREAKING=json.dumps([root, step, *places]))
        finally:
            server.stdin.write("\n")
            server.stdin.close()


def test_js_client_with_our_server(served):
    node("--test", TESTS / "served.test.js", SERVED=served)


def test_npm_package_is_installed_and_imported(tmp_path):
    npm = require_program("npm")
    quiet = {
        "capture_output": True,
        "text": True,
        "check": True,
        "env": os.environ | {"npm_config_update_notifier": "false"},
    }
    packed = subprocess.run([npm, "pack", "--json", "--pack-destination", tmp_path, JS_PACKAGE], **quiet)
    [package] = json.loads(packed.stdout)
    files = {each["path"] for each in package["files"]}
    sources = {f"src/{path.name}" for path in JS_SOURCE.iterdir()}
    assert files == sources | {"package.json", "README.md", "LICENSE"}
    (tmp_path / "package.json").write_text('{"type": "module"}')
    install = [npm, "install", "--offline", "--no-audit", "--no-fund", f"./{package['filename']}"]
    subprocess.run(install, cwd=tmp_path, **quiet)
    program = tmp_path / "try.js"
    program.write_text("import * as moesaic from 'moesaic-client'; console.log(JSON.stringify(Object.keys(moesaic)));")
    names = json.loads(node(program))
    types = (JS_SOURCE / "index.d.ts").read_text()
    assert {"Client", "Stream", "MoesaicError"} <= set(names)
    assert all(f"export class {name} " in types for name in names)
    assert types.count("export class ") == len(names)


def test_npm_package_has_the_version_and_licence_of_the_project():
    package = json.loads((JS_PACKAGE / "package.json").read_text())
    assert f'version = "{package["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert (JS_PACKAGE / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


# In a browser, from a page of another origin than the server's

CHAT = """
async ([baseUrl, ask]) => {
  const { Client, NotFound } = await import("/index.js");
  const client = new Client({ baseUrl, retries: { tries: 1 } });
  const options = { temperature: 0, max_tokens: 200 };
  const whole = await client.chat(ask, options);
  const stream = client.chat(ask, { ...options, stream: true });
  const pieces = [];
  for await (const piece of stream) pieces.push(piece.text);
  const controller = new AbortController();
  let aborted = null;
  try {
    const long = { max_tokens: 2000, ignore_eos: true, stream: true, signal: controller.signal };
    for await (const _ of client.chat(ask, long)) controller.abort();
  } catch (error) {
    aborted = error.name;
  }
  const missing = await client.chat(ask, { model: "gpt-4" }).catch((error) => error);
  return {
    text: whole.text, requestId: whole.requestId, pieces, aborted,
    told: (await stream.answer()).usage.completion_tokens,
    missing: [missing instanceof NotFound, missing.status, Boolean(missing.requestId)],
    models: (await client.models()).map(({ id }) => id),
  };
}
"""
REFUSED = """
async (baseUrl) => {
  const { Client } = await import("/index.js");
  return await new Client({ baseUrl, retries: { tries: 1 } }).chat("Hi").catch((error) => error.name);
}
"""


@pytest.fixture
def page(browser):
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        yield page


def test_in_a_browser(page, served, page_port):
    page.goto(f"http://127.0.0.1:{page_port}/")
    found = page.evaluate(CHAT, [served, "Tell a story about a king."])
    assert found["text"] and "".join(found["pieces"]) == found["text"] and len(found["pieces"]) > 3
    assert (found["told"], found["aborted"], found["models"]) == (200, "AbortError", ["tales"])
    assert found["missing"] == [True, 404, True] and found["requestId"]


def test_page_of_another_origin_is_refused(page, served, page_port):
    page.goto(f"http://localhost:{page_port}/")
    assert page.evaluate(REFUSED, served) == "ConnectionFailed"
