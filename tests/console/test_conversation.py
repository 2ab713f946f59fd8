"""Conversations: questions, answers, undo, retry, truncation and failures."""

from pathlib import Path
from typing import Any

import pytest

from moesaic.console.conversation import Conversation, Statistics, Turn
from moesaic.errors import (
    EngineStopped,
    InvalidMessages,
    InvalidParameter,
    InvalidRequest,
    NotFound,
    NumericalError,
    PromptTooLong,
)
from moesaic.llm import LLM


def finish(turn: Turn) -> str:
    with turn:
        return "".join(turn)


def talk(llm: LLM, **options: Any) -> Conversation:
    return Conversation(llm, settings={"max_tokens": 8, "temperature": 0.0, **options.pop("settings", {})}, **options)


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_the_model_answers_the_whole_conversation(llm: LLM) -> None:
    conversation = talk(llm, system="Be brief.")
    first = finish(conversation.ask("Hello"))
    second = finish(conversation.ask("And then?"))
    assert turns(conversation) == [
        ("user", "Hello"),
        ("assistant", first),
        ("user", "And then?"),
        ("assistant", second),
    ]
    prompt = [{"role": "system", "content": "Be brief."}, *conversation.messages[:3]]
    assert second == llm.chat(prompt, max_tokens=8, temperature=0.0).text != first


def test_plain_text_is_continued(llm: LLM) -> None:
    conversation = talk(llm, plain=True)
    first = finish(conversation.ask("Once upon a time"))
    assert first == llm.complete("Once upon a time", max_tokens=8, temperature=0.0).text
    second = finish(conversation.ask("Then"))
    text = f"Once upon a time\n{first}\nThen"
    assert second == llm.complete(text, max_tokens=8, temperature=0.0).text
    with pytest.raises(InvalidRequest, match="no system prompt"):
        Conversation(llm, system="Be brief.", plain=True)


def test_statistics_of_an_answer(llm: LLM) -> None:
    turn = talk(llm).ask("Hello")
    finish(turn)
    statistics = turn.statistics
    assert (statistics.reason, statistics.tokens) == ("length", 8)
    assert statistics.prompt_tokens == len(llm.encode_chat([{"role": "user", "content": "Hello"}]))
    assert statistics.first_token_seconds is not None
    assert 0 < statistics.first_token_seconds <= statistics.seconds
    assert str(Statistics("stop", 9, 11, 0.5, 2.5)) == "11 tokens · 5.0 tokens/s · first token 0.50 s"
    assert str(Statistics("cancelled", 9, 0, None, 2.5)) == "0 tokens · stopped"
    assert Statistics("length", 9, 1, 0.5, 0.5).tokens_per_second == 2.0


def test_the_text_of_a_stopped_answer_is_kept(llm: LLM) -> None:
    conversation = talk(llm, settings={"max_tokens": 100})
    with conversation.ask("Hello") as turn:
        for _ in turn:
            turn.cancel()
    assert turn.reason == "cancelled" and 1 <= turn.statistics.tokens < 100
    assert turns(conversation) == [("user", "Hello"), ("assistant", turn.text)] and turn.text
    assert finish(conversation.ask("Go on"))


def test_an_exception_in_the_loop_stops_the_answer(llm: LLM) -> None:
    conversation = talk(llm, settings={"max_tokens": 100})
    with pytest.raises(KeyboardInterrupt), conversation.ask("Hello") as turn:
        for _ in turn:
            raise KeyboardInterrupt
    assert turn.reason == "cancelled"
    assert turns(conversation) == [("user", "Hello"), ("assistant", turn.text)]
    assert finish(conversation.ask("Go on"))


def test_a_question_without_an_answer_can_be_retried(llm: LLM) -> None:
    conversation = talk(llm)
    with conversation.ask("Hello") as turn:
        turn.cancel()
    assert not turn.text and conversation.messages == []
    answer = finish(conversation.retry())
    assert turns(conversation) == [("user", "Hello"), ("assistant", answer)]


def test_retry_replaces_the_answer_when_it_has_text(llm: LLM) -> None:
    conversation = talk(llm, settings={"temperature": 5.0})
    before = finish(conversation.ask("Hello"))
    with conversation.retry() as turn:
        turn.cancel()
    assert turns(conversation) == [("user", "Hello"), ("assistant", before)]
    after = finish(conversation.retry())
    assert turns(conversation) == [("user", "Hello"), ("assistant", after)] and after != before


def test_undo_and_reset(llm: LLM) -> None:
    conversation = talk(llm, system="Be brief.")
    with pytest.raises(InvalidRequest, match="nothing to undo"):
        conversation.undo()
    with pytest.raises(InvalidRequest, match="nothing to answer again"):
        conversation.retry()
    finish(conversation.ask("one"))
    finish(conversation.ask("two"))
    assert conversation.undo() == "two"
    assert [content for role, content in turns(conversation) if role == "user"] == ["one"]
    conversation.reset()
    assert conversation.messages == [] and conversation.system == "Be brief."


def test_invalid_settings_change_nothing(llm: LLM) -> None:
    conversation = talk(llm)
    conversation.set("top_p", "0.5")
    conversation.set("stop", "END")
    assert conversation.sampling.top_p == 0.5 and conversation.sampling.stop == ("END",)
    for name, value in [("top_p", "2"), ("temperature", "warm"), ("n", "2"), ("colour", "1"), ("colour", "default")]:
        before = dict(conversation.settings)
        with pytest.raises(InvalidParameter, match=name):
            conversation.set(name, value)
        assert conversation.settings == before
    conversation.set("top_p", "default")
    assert conversation.sampling.top_p == llm.sampling().top_p and "top_p" not in conversation.settings
    with pytest.raises(InvalidParameter, match="top_p"):
        Conversation(llm, settings={"top_p": 2.0})


def test_the_oldest_messages_are_dropped(llm: LLM) -> None:
    conversation = talk(llm, system="Be brief.")
    dropped = []
    for number in range(12):
        with conversation.ask(f"question number {number}") as turn:
            list(turn)
        dropped.append(turn.dropped)
        assert turn.statistics.prompt_tokens <= llm.context - 8
    assert dropped[0] == 0 and dropped[-1] > 0 and dropped == sorted(dropped)
    assert len(conversation.messages) == 24  # dropped messages can still be saved
    shown = [{"role": "system", "content": "Be brief."}, *conversation.messages[dropped[-1] : -1]]
    assert turn.statistics.prompt_tokens == len(llm.encode_chat(shown))
    more = [shown[0], *conversation.messages[dropped[-1] - 2 : -1]]
    assert len(llm.encode_chat(more)) > llm.context - 8  # no message that fits was dropped
    assert conversation.tokens() > llm.context


def test_the_answer_gives_way_to_a_long_question(llm: LLM) -> None:
    conversation = talk(llm, settings={"max_tokens": 1000})
    question = "word " * 100
    with conversation.ask(question) as turn:
        list(turn)
    assert turn.statistics.prompt_tokens > llm.context // 2
    assert turn.statistics.prompt_tokens + turn.statistics.tokens <= llm.context


@pytest.mark.parametrize("words", [200, 5000])
@pytest.mark.parametrize("plain", [False, True])
def test_a_question_that_is_too_long_changes_nothing(llm: LLM, words: int, plain: bool) -> None:
    conversation = talk(llm, plain=plain)
    finish(conversation.ask("Hello"))
    before = turns(conversation)
    with pytest.raises(PromptTooLong) as caught:
        conversation.ask("word " * words)
    # A far too long question is rejected by its number of characters, before it is tokenized.
    assert ("estimated" in str(caught.value)) is (words == 5000)
    assert turns(conversation) == before


def test_a_very_long_history_is_truncated(llm: LLM) -> None:
    conversation = talk(llm)
    conversation.messages = [
        {"role": role, "content": "word " * 1000} for _ in range(3) for role in ("user", "assistant")
    ]
    with conversation.ask("Hello") as turn:
        assert list(turn)
    assert turn.dropped == 6


def test_save_and_load(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    conversation = talk(llm, system="Be brief.")
    finish(conversation.ask("Hello"))
    conversation.save(path)
    other = Conversation(llm)
    other.load(path)
    assert (other.system, other.messages, other.settings) == ("Be brief.", conversation.messages, conversation.settings)
    assert finish(other.ask("Go on")) == finish(conversation.ask("Go on"))
    with pytest.raises(InvalidRequest, match="system prompt"):
        Conversation(llm, plain=True).load(path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"moesaic": 1, "messages": [', InvalidRequest),
        ('{"moesaic": 1, "messages": [{"role": "wizard", "content": "x"}]}', InvalidMessages),
        ('{"moesaic": 1, "messages": [], "settings": {"top_p": 2}}', InvalidParameter),
        ('{"moesaic": 1, "messages": [], "settings": {"colour": 2}}', InvalidParameter),
        ('{"moesaic": 1, "messages": [], "settings": {"n": 2}}', InvalidParameter),
        (None, NotFound),
    ],
)
def test_loading_an_invalid_file_changes_nothing(
    llm: LLM, tmp_path: Path, content: str | None, error: type[Exception]
) -> None:
    conversation = talk(llm, system="Be brief.")
    finish(conversation.ask("Hello"))
    before = (conversation.system, list(conversation.messages), dict(conversation.settings))
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    with pytest.raises(error):
        conversation.load(tmp_path / "bad.json")
    assert (conversation.system, conversation.messages, conversation.settings) == before


def test_numerical_errors_leave_the_conversation_unchanged(overflowing: Path) -> None:
    with LLM.load(overflowing, context=128) as llm:
        conversation = Conversation(llm)
        for ask in (lambda: conversation.ask("Hello"), conversation.retry):
            with pytest.raises(NumericalError), ask() as turn:
                list(turn)
            assert turn.reason == "failed" and conversation.messages == []


def test_a_closed_engine_keeps_the_received_text(talker: Path) -> None:
    with LLM.load(talker, context=128) as llm:
        conversation = Conversation(llm, settings={"max_tokens": 100})
        with pytest.raises(EngineStopped), conversation.ask("Hello") as turn:
            for _ in turn:
                llm.close()
        assert turn.reason == "failed"
        assert turns(conversation) == [("user", "Hello"), ("assistant", turn.text)]
        with pytest.raises(EngineStopped):
            conversation.ask("Hello")
