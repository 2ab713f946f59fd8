"""Slash commands."""

from pathlib import Path

import pytest

from moesaic.console import commands
from moesaic.console.conversation import Conversation
from moesaic.engine import Sampling
from moesaic.errors import InvalidParameter, InvalidRequest, NotFound
from moesaic.llm import LLM


@pytest.fixture
def conversation(llm: LLM) -> Conversation:
    return Conversation(llm, settings={"max_tokens": 6, "temperature": 0.0})


def ask(conversation: Conversation, text: str) -> None:
    with conversation.ask(text) as turn:
        list(turn)


def test_help_lists_every_command(conversation: Conversation) -> None:
    text = commands.run(conversation, "/help").text
    for name in ("help", "system", "reset", "undo", "retry", "save", "load", "set", "stats", "exit"):
        assert f"/{name} " in text


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [("/hepl", "/help"), ("/sav x", "/save"), ("/rest", "/reset"), ("/zzzz", "type /help for a list"), ("/", "/help")],
)
def test_an_unknown_command_suggests_similar_ones(conversation: Conversation, line: str, suggestion: str) -> None:
    with pytest.raises(NotFound, match=suggestion):
        commands.run(conversation, line)


def test_a_command_without_arguments_rejects_them(conversation: Conversation) -> None:
    ask(conversation, "Hello")
    with pytest.raises(InvalidRequest, match="/reset takes no arguments"):
        commands.run(conversation, "/reset now")
    assert conversation.messages


def test_system_prompt_can_be_set_and_removed(conversation: Conversation) -> None:
    assert "no system prompt" in commands.run(conversation, "/system").text
    commands.run(conversation, "/system Be brief.\nAnd kind.")
    assert commands.run(conversation, "/system").text == conversation.system == "Be brief.\nAnd kind."
    commands.run(conversation, "/system clear")
    assert conversation.system == ""
    conversation.plain = True
    with pytest.raises(InvalidRequest, match="plain text"):
        commands.run(conversation, "/system Be brief.")


def test_undo_retry_reset(conversation: Conversation) -> None:
    ask(conversation, "one")
    ask(conversation, "two " * 40)
    assert commands.run(conversation, "/undo").text.endswith('…" and its answer; 2 messages left')
    turn = commands.run(conversation, "/retry").turn
    assert turn is not None
    with turn:
        list(turn)
    assert [message["content"] for message in conversation.messages] == ["one", turn.text]
    assert "settings stay" in commands.run(conversation, "/reset").text
    assert conversation.messages == []


def test_set_lists_and_changes_settings(conversation: Conversation) -> None:
    listed = commands.run(conversation, "/set").text.splitlines()
    assert [line.split()[0] for line in listed] == list(Sampling.__dataclass_fields__)
    assert any(line.split() == ["max_tokens", "6", "set"] for line in listed)
    assert commands.run(conversation, "/set top_k 40").text == "top_k = 40"
    assert commands.run(conversation, "/set top_k").text == "top_k = 40"
    assert commands.run(conversation, "/set stop THE END").text == "stop = ('THE END',)"
    assert commands.run(conversation, "/set stop default").text == "stop = none"
    with pytest.raises(InvalidParameter, match="top_p: is 2"):
        commands.run(conversation, "/set top_p 2")
    with pytest.raises(NotFound, match="temperature"):
        commands.run(conversation, "/set temprature 1")
    assert conversation.settings == {"max_tokens": 6, "temperature": 0.0, "top_k": 40}


def test_save_and_load(conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ask(conversation, "Hello")
    assert commands.run(conversation, "/save ~/my talk.json").text == f"saved 2 messages to {tmp_path}/my talk.json"
    commands.run(conversation, "/reset")
    notice = commands.run(conversation, "/load ~/my talk.json").text
    assert notice == f"loaded 2 messages and 2 settings from {tmp_path}/my talk.json"
    assert conversation.messages[0]["content"] == "Hello"
    for line in ("/save", "/load", "/load ~nobody-of-this-name/x"):
        with pytest.raises(InvalidRequest):
            commands.run(conversation, line)


def test_stats_show_the_context_in_use(conversation: Conversation) -> None:
    ask(conversation, "Hello")
    text = commands.run(conversation, "/stats").text
    assert f"2 messages, {conversation.tokens()} of 128 tokens" in text
    stats = conversation.llm.engine.stats()
    assert f"speculation    {stats.draft_tokens} tokens proposed, {stats.accepted_tokens} accepted" in text


def test_exit_leaves(conversation: Conversation) -> None:
    assert commands.run(conversation, "/exit").leave
