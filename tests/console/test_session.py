"""Chat sessions: the real program in a pseudo terminal."""

import json
import re
from pathlib import Path

from tests.support.terminal import Terminal

STATISTICS = r"\d+ tokens? · [\d.]+ tokens/s · first token [\d.]+ s"


def test_a_session_with_all_commands(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with Terminal("chat", talker, "--seed", "3", "--max-tokens", "12", state=tmp_path / "state") as terminal:
        banner = terminal.expect("/help for commands")
        name = talker.name
        assert f"· {name} · 2.09M parameters · float32 · context 4,096 · format mistral-v1 ·" in banner

        terminal.answer("Tell me a story\r")
        shown = terminal.expect(f"{STATISTICS} · cut at the token limit")
        assert len(shown.splitlines()[1]) > 12  # the answer
        assert "12 tokens" in shown

        terminal.answer("/set max_tokens 4000\r")
        terminal.expect("max_tokens = 4000")
        terminal.answer("A long one\r")
        terminal.expect("\n[^\n>]{40}")  # the answer is running, and its beginning is on the screen
        terminal.type("\x03")
        shown = terminal.expect(f"{STATISTICS} · stopped")
        assert "^C" not in shown

        terminal.answer("/set max_tokens 5\r")
        terminal.expect("max_tokens = 5")
        terminal.answer("And now?\r")
        terminal.expect(r"\n5 tokens · ")

        terminal.answer("/set top_p 2\r")
        terminal.expect("top_p: is 2, expected more than 0 and at most 1")
        terminal.answer("/ste\r")
        terminal.expect("unknown command /ste: did you mean .*/set")
        terminal.answer(f"/save {file}\r")
        terminal.expect(f"saved 6 messages to {file}")
        terminal.answer("/undo\r")
        terminal.expect('removed "And now\\?" and its answer; 4 messages left\n')
        terminal.answer(f"/load {file}\r")
        terminal.expect("loaded 6 messages and 2 settings from")
        terminal.answer(f"/load {tmp_path / 'none.json'}\r")
        terminal.expect("none.json: no such file")
        terminal.answer("/set seed default\r")
        terminal.expect("seed = none")
        terminal.answer("/retry\r")
        terminal.expect(r"\n5 tokens · ")
        terminal.answer("/stats\r")
        terminal.expect(r"6 messages, [\d,]+ of 4,096 tokens")

        terminal.answer("\x04")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.screen
    saved = json.loads(file.read_text())
    assert [message["content"] for message in saved["messages"][::2]] == ["Tell me a story", "A long one", "And now?"]
    assert len(saved["messages"][3]["content"]) >= 40  # the text before Ctrl-C is part of the conversation
    history = tmp_path / "state" / "moesaic" / "history"
    assert "+A long one" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_keys_edit_the_message(talker: Path, tmp_path: Path) -> None:
    with Terminal("chat", talker, "--max-tokens", "3", state=tmp_path) as terminal:
        terminal.answer("not this\x03/system one\\\rtwo\r")  # Ctrl-C clears the line; a backslash joins lines
        terminal.expect("it applies from the next answer on")
        terminal.answer("/system\r")
        terminal.expect("\none\ntwo")
        terminal.answer("/system three\x1b\rfour\r")  # Alt-Enter
        terminal.expect("it applies from")
        terminal.answer("/system\r")
        terminal.expect("\nthree\nfour")
        terminal.answer('"""\ra block\r"""\r')
        terminal.expect("3 tokens")
        terminal.answer("//exit is a word\r")
        terminal.expect("3 tokens")
        terminal.answer("\x1b[A\r")  # the up key recalls the last message
        terminal.expect("3 tokens")
        file = tmp_path / "talk.json"
        terminal.answer(f"/save {file}\r")
        terminal.expect("saved 6 messages")
        terminal.answer("/exit\r")
        assert terminal.end() == 0
    questions = [
        message["content"] for message in json.loads(file.read_text())["messages"] if message["role"] == "user"
    ]
    assert questions == ["a block", "/exit is a word", "/exit is a word"]


def test_keys_during_an_answer_are_shown_at_the_prompt(talker: Path, tmp_path: Path) -> None:
    # With this seed the first line of the answer is long, so it is seen before the answer ends.
    with Terminal("chat", talker, "--seed", "3", "--max-tokens", "400", state=tmp_path) as terminal:
        terminal.answer("Hello\r")
        terminal.expect("\n[^\n>]{20}")
        terminal.type("/system\r")
        shown = terminal.expect("400 tokens")
        assert "/system" not in shown
        terminal.expect("there is no system prompt")
        terminal.answer("\x04")
        assert terminal.end() == 0


def test_the_user_is_told_about_dropped_messages(talker: Path, tmp_path: Path) -> None:
    with Terminal("chat", talker, "--context", "64", "--max-tokens", "20", state=tmp_path) as terminal:
        terminal.expect("context 64")
        for _ in range(3):
            terminal.answer("Tell me a story of a rabbit\r")
            terminal.expect("20 tokens")
        assert re.search(r"longer than the context: the oldest \d messages were left out", terminal.screen)
        terminal.answer("word " * 100 + "\r")
        terminal.expect(r"maximum context length is 64 tokens, but you requested \d+ tokens")
        terminal.answer("\x04")
        assert terminal.end() == 0


def test_a_failed_answer_is_reported_in_one_line(overflowing: Path, tmp_path: Path) -> None:
    with Terminal("chat", overflowing, "--context", "64", state=tmp_path) as terminal:
        for line in ("Hello\r", "/retry\r"):
            terminal.answer(line)
            terminal.expect("/retry asks it again")
            terminal.expect("the model computed NaN or infinity")
        terminal.answer("\x04")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.screen


def test_ctrl_c_ends_a_single_answer(talker: Path, tmp_path: Path) -> None:
    # With this seed the answer fills the context, so it cannot end before the key is pressed.
    with Terminal("chat", talker, "-m", "Hello", "--seed", "3", "--max-tokens", "4000", state=tmp_path) as terminal:
        terminal.expect(".{20}")
        terminal.type("\x03")
        assert terminal.end() == 130
    assert "Traceback" not in terminal.screen
