"""What is learned of a conversation: the answers and their ends, and nothing else."""

from __future__ import annotations

import pytest

from moesaic import builtin
from moesaic.errors import InvalidRequest
from moesaic.text.chat import ChatFormat, get_format
from moesaic.text.tokenizer import Tokenizer
from moesaic.train.data import BadLine, Conversation, Preference, Records
from moesaic.train.examples import Encoder, encode


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.open(builtin.find("smollm2"))


def conversation(*turns, number=1):
    roles = ("user", "assistant")
    return Conversation(number, tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns)))


def learned(tokenizer, example):
    """Return the texts of the runs of learned tokens."""
    runs, previous = [], False
    for token_id, flag in zip(example.ids, example.learned, strict=True):
        if flag:
            runs = [*runs, [token_id]] if not previous else [*runs[:-1], [*runs[-1], token_id]]
        previous = flag
    return [tokenizer.decode(run, skip_special=False) for run in runs]


@pytest.mark.parametrize("turns", [("Hi!", "Hello."), ("Hi!", "Hello.", "How are you?", "Fine, thanks."), ("a", "")])
def test_answers_and_their_ends_are_learned(tokenizer, turns):
    [example] = Encoder(get_format("chatml"), tokenizer, 100).conversation(conversation(*turns))
    assert learned(tokenizer, example) == [f"{answer}<|im_end|>" for answer in turns[1::2]]


def test_the_ids_are_what_the_model_sees_when_it_chats(tokenizer):
    """The prompt of the second question, with the first answer, is the beginning of the example."""
    chatml, messages = get_format("chatml"), conversation("Hi!", "Hello.", "How are you?", "Fine.").messages
    [example] = Encoder(chatml, tokenizer, 100).conversation(Conversation(1, messages))
    prompt = chatml.encode(messages[:3], tokenizer)
    assert list(example.ids[: len(prompt)]) == prompt
    assert not any(example.learned[len(prompt) - 5 : len(prompt)]) and all(example.learned[len(prompt) :])


def test_an_answer_without_an_end_in_its_format_ends_with_the_end_of_text(tokenizer):
    plain = ChatFormat("plain", lambda turns, tok, tools, variables: tok.encode(" ".join(t["content"] for t in turns)))
    [example] = Encoder(plain, tokenizer, 100).conversation(conversation("Hi!", "Hello."))
    assert example.ids[-1] in tokenizer.eos_ids and example.learned[-1]


def test_a_format_that_changes_earlier_turns_gives_an_example_for_each_answer(tokenizer):
    def build(turns, tok, tools, variables):
        questions = sum(turn["role"] == "user" for turn in turns)
        return tok.encode(f"{questions} questions: " + " ".join(turn["content"] for turn in turns))

    encoder = Encoder(ChatFormat("counting", build), tokenizer, 100)
    examples = encoder.conversation(conversation("Hi!", "Hello.", "How are you?", "Fine."))
    assert len(examples) == 2
    assert all("Hello" not in text for text in learned(tokenizer, examples[1]))


def test_long_examples_are_cut_and_counted(tokenizer):
    encoder = Encoder(get_format("chatml"), tokenizer, 40)
    [example] = encoder.conversation(conversation("Hi!", "word " * 100))
    assert len(example.ids) == 40 and encoder.shortened == 1
    with pytest.raises(InvalidRequest, match="no token of an answer"):
        encoder.conversation(conversation("word " * 100, "Hello."))


def test_a_preference_has_two_answers_to_one_prompt(tokenizer):
    record = Preference(1, conversation("Hi!").messages, "Hello.", "Go away.")
    [pair] = Encoder(get_format("chatml"), tokenizer, 100).preference(record)
    assert learned(tokenizer, pair.chosen) == ["Hello.<|im_end|>"]
    assert learned(tokenizer, pair.rejected) == ["Go away.<|im_end|>"]
    begin = pair.chosen.learned.index(True)
    assert pair.chosen.ids[:begin] == pair.rejected.ids[:begin]


def test_records_that_cannot_be_encoded_are_counted_with_the_bad_lines(tokenizer, tmp_path):
    encoder = Encoder(get_format("chatml"), tokenizer, 40)
    records = (conversation("Hi!", "Hello.", number=3), conversation("word " * 100, "Hello.", number=1))
    found, bad = encode(Records(tmp_path / "d", records, (BadLine(2, "a"),)), encoder.conversation)
    assert len(found) == 1 and [line.number for line in bad] == [1, 2]
    with pytest.raises(InvalidRequest, match="no usable line; line 1"):
        encode(Records(tmp_path / "d", records[1:], ()), encoder.conversation)
