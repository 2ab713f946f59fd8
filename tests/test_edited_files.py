"""Files that people edit on other systems: a byte order mark and CRLF line ends, in every file that a person writes."""

from __future__ import annotations

import argparse
import asyncio
import codecs
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from moesaic import cli
from moesaic.bench import quality, workload
from moesaic.bench.endpoints import Request
from moesaic.cli import client_options
from moesaic.cluster.aime import settings as aime
from moesaic.console import conversation_file, one_shot
from moesaic.errors import InvalidRequest
from moesaic.serve import batch_file, keys
from moesaic.serve.app import App
from moesaic.text import template
from tests.support.backend import ScriptedBackend
from tests.support.http import CHAT
from tests.support.server import running

AIME = '[ENDPOINT]\nname = "story"\n\n[WORKER]\njob_type = "story"\n'
TALK = {"moesaic": 1, "model": "x", "messages": [{"role": "user", "content": "Grüße"}], "settings": {}}


def edited(path: Path, text: str) -> Path:
    """Write a text as an editor on Windows does."""
    path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    return path


def jsonl(*entries: Any) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def test_batch_file(tmp_path: Path) -> None:
    entries = [{"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": CHAT} for name in "ab"]
    source = edited(tmp_path / "in.jsonl", jsonl(*entries))
    source.write_bytes(source.read_bytes() + codecs.BOM_UTF8 + b"\r\n")  # files that were joined
    counts = asyncio.run(batch_file.run(App(ScriptedBackend()), source, tmp_path / "out.jsonl"))
    assert (counts.answered, counts.failed) == (2, 0)
    edited(tmp_path / "out.jsonl", (tmp_path / "out.jsonl").read_text())
    counts = asyncio.run(batch_file.run(App(ScriptedBackend()), source, tmp_path / "out.jsonl"))
    assert (counts.answered, counts.failed, counts.skipped) == (2, 0, 2)


def test_body_of_a_request() -> None:
    with running() as server:
        body = codecs.BOM_UTF8 + json.dumps(CHAT, indent=1).replace("\n", "\r\n").encode()
        for path in ("/v1/chat/completions", "/v1/messages", "/generate"):
            sent = body if path != "/generate" else codecs.BOM_UTF8 + b'{"inputs": "Hi"}'
            sent = sent.replace(b"{", b'{"max_tokens": 5,', 1) if path == "/v1/messages" else sent
            response = httpx.post(server.url + path, content=sent, headers={"content-type": "application/json"})
            assert response.status_code == 200, response.text


def test_dataset_of_a_load_test(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"  # no line ends of JSONL, although Python's splitlines takes them for such
    file = edited(tmp_path / "load.jsonl", jsonl({"prompt": text, "max_tokens": 3}, {"prompt": "Grüße"}))
    dataset = workload.read_dataset(file, 9, supports_messages=True)
    assert dataset.lines == (Request(text, 3), Request("Grüße", 9))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "jsonl.xz"])
def test_texts_for_perplexity(tmp_path: Path, suffix: str) -> None:
    file = edited(tmp_path / f"held-out.{suffix}", "Grüße" if suffix == "txt" else jsonl({"text": "Grüße"}))
    if suffix.endswith("xz"):
        file.write_bytes(lzma.compress(file.read_bytes()))
    assert quality.read_texts(file) == ["Grüße"]


def test_message_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + "Grüße\r\n".encode())))
    assert one_shot.read_input() == "Grüße"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + b"\r\n")))
    with pytest.raises(InvalidRequest, match="empty"):
        one_shot.read_input()


def test_saved_conversation(tmp_path: Path) -> None:
    file = edited(tmp_path / "talk.json", json.dumps(TALK, indent=1, ensure_ascii=False))
    assert conversation_file.read(file).messages == TALK["messages"]


def test_key_files(tmp_path: Path) -> None:
    written, key = keys.new("anna")
    keys.write(tmp_path / "keys.json", (key,))
    assert keys.read(edited(tmp_path / "keys.json", (tmp_path / "keys.json").read_text())) == (key,)
    arguments = argparse.Namespace(key_file=edited(tmp_path / "key", f"{written}\n"), key=None)
    assert client_options.key(arguments, "NO_VARIABLE") == written
    (tmp_path / "key").write_bytes(written.encode("utf-16"))
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        client_options.key(arguments, "NO_VARIABLE")


def test_endpoint_file_of_aime(tmp_path: Path) -> None:
    assert aime.read_file(edited(tmp_path / aime.ENDPOINT_FILE, AIME)).name == "story"


def test_chat_template(tmp_path: Path) -> None:
    edited(tmp_path / "chat_template.jinja", "{{ bos_token }}")
    assert template.load(tmp_path) == "{{ bos_token }}" == template.load_file(tmp_path / "chat_template.jinja")


def test_configuration_of_a_checkpoint(tmp_path: Path, tales_copy: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        edited(tales_copy / name, (tales_copy / name).read_text())
    assert cli.main(["pack", str(tales_copy), str(tmp_path / "packed"), "--format", "q8"]) == 0


@pytest.fixture
def tales_copy(tmp_path: Path) -> Path:
    import shutil

    from moesaic.builtin import TALES_FOLDER

    return Path(shutil.copytree(TALES_FOLDER, tmp_path / "copy"))
