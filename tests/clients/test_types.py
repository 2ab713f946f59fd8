"""The types of the JavaScript client, checked by the TypeScript compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.require import require_program

pytestmark = pytest.mark.clients
TYPESCRIPT = "5.9.3"
ROOT = Path(__file__).parents[2]
RIGHT = """
import { Client, InvalidParameter, MoesaicError, Stream, type Answer, type Piece } from "moesaic-client";

const client = new Client({ baseUrl: "http://127.0.0.1:8000", retries: { tries: 2 }, timeouts: { silence: Infinity } });
const answer: Answer = await client.chat("Hi", { temperature: 0, tools: [] });
const again: Answer = await client.chat([{ role: "user", content: "Hi" }, answer.message], { stop: ["."] });
const tokens: number = answer.usage?.completion_tokens ?? 0;
const stream: Stream = client.complete([1, 2, 3], { stream: true, signal: AbortSignal.timeout(10) });
for await (const piece of stream) {
  const last: Piece = piece;
  const written: string[] = last.calls.map((call) => call.arguments);
  console.log(last.text, last.reason?.length, written);
}
const vectors: number[][] = (await client.embed(["a", "b"], { dimensions: 3 })).vectors;
const ids: string[] = (await client.models()).map(({ id }) => id);
console.log(again.alternatives[0]?.text, tokens, vectors, ids, (await client.tokenize("a")).ids.length);
client.chat("Hi").catch((error: unknown) => {
  if (error instanceof InvalidParameter) console.log(error.param);
  else if (error instanceof MoesaicError) console.log(error.retryAfter?.toFixed(), error.status);
});
"""
WRONG = [
    "await client.chat(3);",
    'await client.chat("Hi", { temprature: 0 });',
    'await client.chat("Hi", { temperature: "cold" });',
    'for await (const piece of client.chat("Hi")) console.log(piece);',
    'const answer = await client.chat("Hi"); answer.usage.total_tokens;',
    'client.chat("Hi", { stream: true }).usage;',
    'new Client({ baseURL: "http://127.0.0.1:8000" });',
]


@pytest.fixture(scope="module")
def project():
    """A cached folder with TypeScript and our package."""
    npm = require_program("npm")
    root = Path(os.environ.get("MOESAIC_CLIENTS") or Path.home() / ".cache/moesaic-clients")
    folder = root / f"typescript-{TYPESCRIPT}"
    if not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"type": "module", "private": true}')
        install = [npm, "install", "--no-audit", "--no-fund", "--silent", f"typescript@{TYPESCRIPT}"]
        subprocess.run(install, cwd=folder, check=True)
        (folder / "ready").touch()
    package = folder / "node_modules/moesaic-client"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "clients/js", package)
    shutil.copytree(ROOT / "moesaic/serve/web/client", package / "src")
    return folder


def compiled(project: Path, *sources: str) -> subprocess.CompletedProcess[str]:
    names = []
    for index, source in enumerate(sources):
        (project / f"sample{index}.ts").write_text(source)
        names.append(f"sample{index}.ts")
    options = "--noEmit --strict --target es2022 --lib es2022,dom,dom.iterable,esnext.asynciterable --module nodenext"
    command = ["node", "node_modules/typescript/bin/tsc", *options.split(), *names]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def test_valid_programs_compile(project):
    done = compiled(project, RIGHT)
    assert done.returncode == 0, done.stdout


def test_type_errors_are_reported(project):
    head = 'import { Client } from "moesaic-client";\nconst client = new Client();\n'
    done = compiled(project, *(head + line for line in WRONG))
    for index, line in enumerate(WRONG):
        assert f"sample{index}.ts(3," in done.stdout, line
