"""Files with saved conversations: writing, reading, and damaged files."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.console import conversation_file
from moesaic.console.conversation_file import SavedConversation
from moesaic.errors import InvalidMessages, InvalidParameter, InvalidRequest, MoesaicError, NotFound

MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße\n\x1b 🐇 \ud800"},
    {"role": "assistant", "content": ""},
]
SETTINGS = {"temperature": 0.5, "stop": ("a", "b"), "logit_bias": {7: -1.0}, "seed": None}


def test_a_written_conversation_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    conversation_file.write(path, SavedConversation(MESSAGES, SETTINGS), "tiny")
    assert conversation_file.read(path) == SavedConversation(MESSAGES, SETTINGS)
    assert path.stat().st_mode & 0o777 == 0o600
    conversation_file.write(path, SavedConversation([], {}), "tiny")
    assert conversation_file.read(path) == SavedConversation([], {})
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(InvalidRequest, match="not a saved conversation: choose another name"):
        conversation_file.write(other, SavedConversation(MESSAGES, {}), "tiny")
    assert other.read_bytes() == b"\x08\0\0\0\0\0\0\0{}      "


@pytest.mark.parametrize("name", [".", "missing/talk.json", "x" * 300, "file/talk.json"])
def test_an_unwritable_path_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoesaicError):
        conversation_file.write(tmp_path / name, SavedConversation(MESSAGES, {}), "tiny")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        conversation_file.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"messages": []}',
        b'{"moesaic": 2, "messages": []}',
        b'{"moesaic": 1}',
        b'{"moesaic": 1, "messages": {}}',
        b'{"moesaic": 1, "messages": [], "settings": []}',
        b'{"moesaic": 1, "messages": [], "tools": []}',
    ],
)
def test_other_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"talk\.json") as caught:
        conversation_file.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "message", [{"role": "wizard", "content": "x"}, {"role": "user"}, {"role": "user", "content": 3}, "hello", None]
)
def test_an_invalid_message_is_rejected(tmp_path: Path, message: Any) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"moesaic": 1, "messages": [message]}))
    with pytest.raises(InvalidMessages, match=r"talk\.json: messages\[0\]"):
        conversation_file.read(path)


@settings(deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_a_damaged_file_never_crashes_the_reader(tmp_path_factory: Any, offset: int, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("damaged") / "talk.json"
    conversation_file.write(path, SavedConversation(MESSAGES, SETTINGS), "tiny")
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + noise + whole[offset + len(noise) :])
    with contextlib.suppress(MoesaicError):
        assert isinstance(conversation_file.read(path), SavedConversation)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("top_k", "40", 40),
        ("seed", "none", None),
        ("seed", "null", None),
        ("stop", "END", ("END",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop_token_ids", "[1, 2]", (1, 2)),
        ("logit_bias", '{"5": -2}', {5: -2}),
        ("ignore_eos", "true", True),
        ("temperature", "warm", "warm"),
        ("temperature", "[" * 100_000, "[" * 100_000),
    ],
)
def test_settings_are_parsed_from_text(name: str, text: str, value: Any) -> None:
    assert conversation_file.parse_setting(name, text) == value


def test_logit_bias_needs_token_ids() -> None:
    with pytest.raises(InvalidParameter, match="logit_bias"):
        conversation_file.parse_setting("logit_bias", '{"a": 1}')
