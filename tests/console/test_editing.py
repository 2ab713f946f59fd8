from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from moesaic.console import editing


@pytest.mark.parametrize(
    ("text", "goes_on"),
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
def test_unfinished(text: str, goes_on: bool) -> None:
    assert editing.unfinished(text) is goes_on


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("hello ", "hello"),
        ("one\\\ntwo", "one\ntwo"),
        ('"""\na\n  b\\\n"""', "a\n  b\\"),
        ('"""a"""', "a"),
        ("  indented", "  indented"),
    ],
)
def test_meant(text: str, meaning: str) -> None:
    assert editing.meant(text) == meaning


def test_the_history_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "moesaic" / "history"
    editing.history(path).store_string("first\nsecond")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)
    assert list(editing.history(path).load_history_strings()) == ["first\nsecond"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "HISTORY_BYTES", 4000)
    path = tmp_path / "history"
    entries = [f"entry {number}\nof two lines" for number in range(100)]
    for entry in entries:
        editing.history(path).store_string(entry)
    kept = list(editing.history(path).load_history_strings())  # newest first
    assert path.stat().st_size < 4000 + 200
    assert 20 < len(kept) < 100 and kept == entries[: -len(kept) - 1 : -1]
    assert [file.name for file in tmp_path.iterdir()] == ["history"]


def test_without_a_place_the_history_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert isinstance(editing.history(tmp_path / "state" / "history"), InMemoryHistory)


def test_a_history_that_cannot_be_written_any_more_is_no_error(tmp_path: Path) -> None:
    kept = editing.history(tmp_path / "history")
    (tmp_path / "history").unlink()
    (tmp_path / "history").mkdir()
    kept.append_string("hello")
    assert kept.get_strings() == ["hello"]


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert editing.history_path() == Path("/state/moesaic/history")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert editing.history_path() == Path("/home/user/.local/state/moesaic/history")
