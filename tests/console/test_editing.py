"""Line editor: multi-line input and the history file."""

from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from moesaic.console import editing


@pytest.mark.parametrize(
    ("text", "unfinished"),
    [
        ("hello", False),
        ("hello\\", True),
        ("one\\\ntwo", False),
        ('"""', True),
        ('"""a', True),
        ('"""a\nb', True),
        ('"""a\nb"""', False),
        ('"""a"""  ', False),
        ('""""', True),
        ("", False),
    ],
)
def test_unfinished_input(text: str, unfinished: bool) -> None:
    assert editing.is_unfinished(text) is unfinished


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello ", "hello"),
        ("one\\\ntwo", "one\ntwo"),
        ('"""\na\n  b\\\n"""', "a\n  b\\"),
        ('"""a"""', "a"),
        ("  indented", "  indented"),
    ],
)
def test_message_text(text: str, message: str) -> None:
    assert editing.message_text(text) == message


def test_the_history_is_private_and_persistent(tmp_path: Path) -> None:
    path = tmp_path / "state" / "moesaic" / "history"
    editing.open_history(path).store_string("first\nsecond")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)
    assert list(editing.open_history(path).load_history_strings()) == ["first\nsecond"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "HISTORY_BYTES", 4000)
    path = tmp_path / "history"
    entries = [f"entry {number}\nof two lines" for number in range(100)]
    for entry in entries:
        editing.open_history(path).store_string(entry)
    kept = list(editing.open_history(path).load_history_strings())  # newest first
    assert path.stat().st_size < 4000 + 200
    assert 20 < len(kept) < 100 and kept == entries[: -len(kept) - 1 : -1]
    assert [file.name for file in tmp_path.iterdir()] == ["history"]


def test_without_a_folder_the_history_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert isinstance(editing.open_history(tmp_path / "state" / "history"), InMemoryHistory)


def test_a_write_error_keeps_the_history_in_memory(tmp_path: Path) -> None:
    history = editing.open_history(tmp_path / "history")
    (tmp_path / "history").unlink()
    (tmp_path / "history").mkdir()
    history.append_string("hello")
    assert history.get_strings() == ["hello"]


def test_the_history_path_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert editing.history_path() == Path("/state/moesaic/history")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert editing.history_path() == Path("/home/user/.local/state/moesaic/history")
