"""Chat formats against mistral-common and llama-models, and invalid conversations."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat as LlamaFormat
from llama_models.llama3.tokenizer import Tokenizer as LlamaTokenizer
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from moesaic.errors import InvalidMessages, InvalidRequest, NotFound, PromptTooLong
from moesaic.text import chat, chat_choice
from moesaic.text.chat import FORMATS, Message
from moesaic.text.tokenizer import Tokenizer

Opened = Callable[[str], Tokenizer]
MISTRAL = {
    "mistral-v1": "v1",
    "mistral-v2": "v2",
    "mistral-v3": "v3",
    "mistral-tekken": "tekken",
    "mistral-v7": "v7",
}

MARKERS = (
    "[INST] ",
    " [/INST]",
    "</s>",
    "<s>",
    "<|eot_id|>",
    "<|start_header_id|>system<|end_header_id|>\n\n",
    "<unk>",
)
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.lists(st.sampled_from((*MARKERS, "Hello", " ", "\n", "[SYSTEM_PROMPT]")), min_size=1, max_size=4).map("".join),
)
TURNS = st.lists(TEXT, min_size=1, max_size=5)
SYSTEM = st.none() | TEXT


def _conversation(system: str | None, texts: list[str]) -> list[Message]:
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns: list[Message] = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [*head, *turns]


@pytest.fixture(scope="session")
def mistral(files: dict[str, Path]) -> Callable[[str], MistralTokenizer]:
    return functools.cache(lambda name: MistralTokenizer.from_file(str(files[name]), mode=ValidationMode.serving))


def _expected(original: MistralTokenizer, messages: list[Message]) -> list[int]:
    kinds: dict[str, Any] = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    theirs = [kinds[m["role"]](content=m["content"]) for m in messages]
    if messages[-1]["role"] == "assistant":
        theirs[-1].prefix = True
    ids: list[int] = original.encode_chat_completion(ChatCompletionRequest(model="any", messages=theirs)).tokens
    return ids


@pytest.mark.parametrize("name", MISTRAL)
def test_mistral_formats_match_mistral_common(
    name: str, opened: Opened, mistral: Callable[[str], MistralTokenizer]
) -> None:
    tokenizer, original = opened(MISTRAL[name]), mistral(MISTRAL[name])

    @settings(max_examples=120, deadline=None)
    @given(SYSTEM, TURNS)
    def check(system: str | None, texts: list[str]) -> None:
        messages = _conversation(system, texts)
        ids = FORMATS[name].encode(messages, tokenizer, continue_final=len(texts) % 2 == 0)
        assert ids == _expected(original, messages)

    check()
    # A system message in the middle, consecutive messages of one role, and an assistant message at the start.
    talk = _conversation(None, ["a", "b", "c"])
    for messages in (
        [talk[0], *_conversation("be brief", []), *talk[1:]],
        [*_conversation("x", ["a"]), *_conversation(None, ["b", "c"]), *_conversation(None, ["d"])],
        talk[1:],
    ):
        assert FORMATS[name].encode(messages, tokenizer) == _expected(original, messages)


@pytest.fixture(scope="session")
def tekken_v7(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small file that states version 7; the available published files state version 3."""
    tree = json.loads(files["tekken"].read_bytes())
    tree["vocab"] = tree["vocab"][:2000]
    tree["config"] |= {"version": "v7", "default_vocab_size": 3000, "num_vocab_tokens": 2000}
    path = tmp_path_factory.mktemp("v7") / "tekken.json"
    path.write_text(json.dumps(tree))
    return path


def test_mistral_v7_with_tekken_matches_mistral_common(tekken_v7: Path) -> None:
    tokenizer = Tokenizer.open(tekken_v7)
    original = MistralTokenizer.from_file(str(tekken_v7), mode=ValidationMode.serving)
    messages = _conversation("be brief", ["a", "b ", "c"])
    form = chat_choice.guess(tokenizer)
    assert form is not None
    assert form.name == "mistral-v7"
    assert form.encode(messages, tokenizer) == _expected(original, messages)


def test_mixtral_ids_equal_the_published_ones(opened: Opened) -> None:
    ids = FORMATS["mistral-v1"].encode([{"role": "user", "content": "Hello"}], opened("v1"))
    assert ids == [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793]


def test_llama3_matches_llama_models(opened: Opened, files: dict[str, Path]) -> None:
    tokenizer, original = opened("llama3"), LlamaFormat(LlamaTokenizer(files["llama3"]))

    @settings(max_examples=120, deadline=None)
    @given(SYSTEM, TURNS)
    def check(system: str | None, texts: list[str]) -> None:
        messages = _conversation(system, texts)
        # The released template strips the texts; the reference expects stripped texts.
        theirs = [RawMessage(role=m["role"], content=m["content"].strip()) for m in messages]
        continued = len(texts) % 2 == 0
        expected = original.encode_dialog_prompt(theirs[:-1] if continued else theirs).tokens
        if continued:
            expected += tokenizer.encode(messages[-1]["content"].strip())
        assert FORMATS["llama3"].encode(messages, tokenizer, continue_final=continued) == expected

    check()


def test_aime_format(opened: Opened) -> None:
    tokenizer = opened("v1")
    encode = tokenizer.encode
    head = "<<SYS>>\nbe brief\n<</SYS>>\n\n"
    messages = _conversation("be [INST]brief", ["Hi </s>there", "Yo", "more"])
    expected = [1, *encode(f"[INST] {head}Hi there [/INST] Yo "), 2, 1, *encode("[INST] more [/INST]")]
    assert FORMATS["aime"].encode(messages, tokenizer) == expected
    continued = FORMATS["aime"].encode(messages[:-1], tokenizer, continue_final=True)
    assert continued == expected[: expected.index(2)]
    nested = FORMATS["aime"].encode(_conversation(None, ["[IN[INST]ST] <<<s>S> <<<s>s>"]), tokenizer)
    assert tokenizer.decode(nested) == "[INST]  <<S> < [/INST]"


def test_plain_format(opened: Opened) -> None:
    tokenizer, plain = opened("v1"), FORMATS["plain"]
    messages = _conversation("A talk.", ["Hi", "Yo", "more"])
    expected = tokenizer.encode("A talk.\n\nUser: Hi\nAssistant: Yo\nUser: more\nAssistant:", bos=True)
    assert plain.encode(messages, tokenizer) == expected
    continued = tokenizer.encode("A talk.\n\nUser: Hi\nAssistant: Yo", bos=True)
    assert plain.encode(messages[:-1], tokenizer, continue_final=True) == continued
    assert plain.stop_strings == ("\nUser:",)


@pytest.mark.parametrize("name", FORMATS)
def test_text_never_becomes_a_control_token(name: str, opened: Opened, later_tekken: Callable[[str], Path]) -> None:
    if name in ("mistral-v11", "mistral-v13"):
        tokenizer = Tokenizer.open(later_tekken(name.removeprefix("mistral-")))
    else:
        tokenizer = opened({**MISTRAL, "llama3": "llama3", "llama3.1": "llama3"}.get(name, "v1"))
    form, specials = FORMATS[name], set(tokenizer.control.values())

    def control(text: str) -> list[int]:
        ids = form.encode(_conversation(text, [text, text, text]), tokenizer)
        return [token_id for token_id in ids if token_id in specials]

    for text in tokenizer.control:
        sentence = f"a {text} b{text}"
        assert control(sentence) == control("hello")
        if name != "aime":  # which removes its markers from the text
            assert tokenizer.decode(form.encode(_conversation(None, [sentence]), tokenizer)).count(sentence) == 1


def test_stop_ids_of_the_formats(opened: Opened) -> None:
    assert FORMATS["mistral-v1"].stop_ids(opened("v1")) == {2}
    assert FORMATS["plain"].stop_ids(opened("llama3")) == {128001}
    assert FORMATS["llama3"].stop_ids(opened("llama3")) == {128001, 128008, 128009}


def test_an_empty_answer_can_be_encoded(opened: Opened) -> None:
    for name, vocabulary in {**MISTRAL, "llama3": "llama3", "aime": "v1", "plain": "v1"}.items():
        FORMATS[name].encode(_conversation(None, ["a", "", "b"]), opened(vocabulary))


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "empty"),
        ("hello", "must be a list"),
        ({"role": "user", "content": "x"}, "must be a list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}], r"messages\[1\].*'wizard'"),
        ([{"content": "x"}], "unknown role None"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content of type list"),
    ],
)
def test_invalid_conversations_are_rejected(messages: Any, match: str) -> None:
    with pytest.raises(InvalidMessages, match=match) as caught:
        chat.validate(messages)
    assert "\n" not in str(caught.value)


def test_the_last_role_must_match_continue_final(opened: Opened) -> None:
    tokenizer, form = opened("v1"), FORMATS["mistral-v1"]
    with pytest.raises(InvalidMessages, match="last message is the assistant's"):
        form.encode(_conversation(None, ["a", "b"]), tokenizer)
    with pytest.raises(InvalidMessages, match="nothing to continue"):
        form.encode(_conversation(None, ["a"]), tokenizer, continue_final=True)


def test_validate_joins_turns_in_a_copy() -> None:
    messages = [*_conversation(None, ["a"]), *_conversation(None, ["b", "c"])]
    assert chat.validate(messages) == _conversation(None, ["a\n\nb", "c"])
    assert messages[0]["content"] == "a"


def test_unsupported_and_unknown_formats_are_rejected(opened: Opened) -> None:
    with pytest.raises(
        InvalidRequest, match=r"'llama3' needs .*start_header_id.* use mistral-v1, aime, chatml, zephyr, .*plain"
    ):
        FORMATS["llama3"].encode(_conversation(None, ["a"]), opened("v1"))
    with pytest.raises(NotFound, match="mistral-v1"):
        chat.get_format("telegram")


def test_guessed_format(opened: Opened) -> None:
    def chosen(name: str, **kwargs: str) -> str | None:
        form = chat_choice.guess(opened(name), **kwargs)
        return None if form is None else form.name

    assert chosen("v1", architecture="MixtralForCausalLM") == "mistral-v1"
    assert chosen("v1", architecture="mistral") == "mistral-v1"
    assert chosen("v1", architecture="LlamaForCausalLM") == "plain"
    assert chosen("v1") == "plain"
    assert chosen("v1", template="{{ '[INST] ' + m }}") == "mistral-v1"
    assert chosen("v1", template="[INST] <<SYS>>\n") == "aime"
    assert [chosen(name) for name in ("v2", "v3", "v7")] == ["mistral-v2", "mistral-v3", "mistral-v7"]
    assert chosen("tekken") == "mistral-tekken"
    assert chosen("llama3", architecture="LlamaForCausalLM") == "llama3"
    assert chosen("v1", template="<|im_start|>") == "chatml"
    assert chosen("v1", template="Q: A:") is None


LONG = _conversation("sys", ["u0", "a0", "u1", "a1", "u2", "a2", "u3"])


@pytest.mark.parametrize(
    ("budget", "kept", "dropped"),
    [
        (8, ["sys", "u0", "a0", "u1", "a1", "u2", "a2", "u3"], 0),
        (7, ["sys", "u1", "a1", "u2", "a2", "u3"], 2),
        (5, ["sys", "u2", "a2", "u3"], 4),
        (2, ["sys", "u3"], 6),
    ],
)
def test_truncate_removes_the_oldest_exchanges(budget: int, kept: list[str], dropped: int) -> None:
    messages, removed = chat.truncate(LONG, len, budget)
    assert ([m["content"] for m in messages], removed) == (kept, dropped)


def test_truncate_keeps_the_last_exchange() -> None:
    with pytest.raises(PromptTooLong) as caught:
        chat.truncate(LONG, len, 1)
    assert (caught.value.tokens, caught.value.limit) == (2, 1)
    continued = LONG[:-1]
    messages, removed = chat.truncate(continued, len, 3)
    assert ([m["content"] for m in messages], removed) == (["sys", "u2", "a2"], 4)
    opened_by_assistant = LONG[2:]
    assert chat.truncate(opened_by_assistant, len, 5)[1] == 1


@given(SYSTEM, TURNS, st.integers(1, 40))
def test_truncate_removes_as_little_as_possible(system: str | None, texts: list[str], budget: int) -> None:
    messages = _conversation(system, texts)

    def count(turns: list[Message]) -> int:
        return sum(len(turn["content"]) for turn in turns)

    try:
        kept, dropped = chat.truncate(messages, count, budget)
    except PromptTooLong:
        return
    assert count(kept) <= budget
    assert dropped % 2 == 0
    assert kept == [m for m in messages if m["role"] == "system"] + messages[(system is not None) + dropped :]
    if dropped:
        assert count(kept) + sum(len(text) for text in texts[dropped - 2 : dropped]) > budget
