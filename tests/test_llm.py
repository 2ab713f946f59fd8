"""LLM: streamed and batched answers equal single ones, and invalid requests are refused before anything runs."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch

from moesaic import LLM, Classifier, Sampling, errors
from moesaic.engine import Done, Limits
from tests.support.models import transformers_model

HELLO = [{"role": "user", "content": "Hello there."}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def llm(talker):
    with LLM.load(talker) as llm:
        yield llm


@pytest.fixture
def copy(talker, tmp_path) -> Path:
    return Path(shutil.copytree(talker, tmp_path / "model"))


def test_answer_equals_the_joined_stream(llm):
    whole = llm.chat(HELLO, **GREEDY)
    reply = llm.chat(HELLO, stream=True, **GREEDY)
    pieces = list(reply)
    assert whole.text
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token.id for piece in pieces for token in piece.tokens] == [token.id for token in whole.tokens]
    assert reply.answer.text == whole.text
    assert (whole.reason, len(whole.tokens)) == ("length", 24)
    assert whole.prompt_tokens == len(llm.encode_chat(HELLO))


def test_batched_equals_alone(llm):
    conversations = [[{"role": "user", "content": text}] for text in ("Hello.", "A fox?", "Why is the sky blue?")]
    alone = [llm.chat(conversation, **GREEDY).text for conversation in conversations]
    assert [answer.text for answer in llm.chat(conversations, **GREEDY)] == alone
    prompts = ["Once", "Once upon", "Once upon a time"]
    assert [a.text for a in llm.complete(prompts, **GREEDY)] == [llm.complete(p, **GREEDY).text for p in prompts]


def test_more_prompts_than_the_queue_holds(talker):
    prompts = [f"Number {i}" for i in range(9)]
    with LLM.load(talker, limits=Limits(batch_tokens=32, sequences=2, queue=3)) as small:
        answers = [answer.text for answer in small.complete(prompts, **GREEDY)]
    with LLM.load(talker) as large:
        assert answers == [large.complete(prompt, **GREEDY).text for prompt in prompts]


def test_answers_do_not_depend_on_speculation(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "_clock", itertools.count().__next__)  # proposals always seem to be worthwhile
    prompt = "one two three four five " * 8
    options = {"temperature": 0, "max_tokens": 40}
    plain = llm.complete(prompt, speculation=False, **options)
    before = llm.engine.stats()
    assert llm.complete(prompt, **options) == replace(
        plain, cached_tokens=llm.complete(prompt, **options).cached_tokens
    )
    for begin in range(0, len(plain.text) - 4, 3):
        stop = plain.text[begin : begin + 4]
        alone = llm.complete(prompt, stop=(stop,), speculation=False, **options)
        fast = llm.complete(prompt, stop=(stop,), **options)
        assert (fast.text, fast.reason, fast.stop, fast.tokens) == (alone.text, "stop", stop, alone.tokens)
    assert llm.engine.stats().accepted_tokens > before.accepted_tokens


def test_speculation_can_be_off(talker, monkeypatch):
    with LLM.load(talker, speculation="off") as llm:
        monkeypatch.setattr(llm.engine, "_clock", itertools.count().__next__)
        llm.complete("one two three four five " * 8, **GREEDY)
        assert llm.engine.stats().draft_tokens == 0


def test_stop_string_ends_the_answer(llm):
    whole = llm.complete("Once", **GREEDY).text
    stop = whole[10:14]
    position = whole.find(stop)
    answer = llm.complete("Once", stop=(stop,), **GREEDY)
    assert (answer.text, answer.reason, answer.stop) == (whole[:position], "stop", stop)
    assert (
        "".join(piece.text for piece in llm.complete("Once", stop=(stop,), stream=True, **GREEDY)) == whole[:position]
    )


def test_stop_string_ends_the_request_without_reader(llm):
    options = {"temperature": 0, "max_tokens": 3000, "ignore_eos": True}
    stop = llm.complete("Once", **GREEDY).text[10:14]
    before = llm.engine.stats().generated_tokens
    reply = llm.complete("Once", stop=(stop,), stream=True, **options)
    while not reply.stopped:
        next(iter(reply))
    assert [event.reason for event in reply.stream if isinstance(event, Done)] == ["cancelled"]
    assert llm.engine.stats().generated_tokens - before < 3000


def test_stop_token_ends_the_answer(llm):
    whole = llm.complete("Once", **GREEDY)
    stop = whole.tokens[5].id
    first = next(i for i, token in enumerate(whole.tokens) if token.id == stop)
    answer = llm.complete("Once", stop_token_ids=(stop,), **GREEDY)
    assert answer.reason == "stop"
    begin = llm.encode("Once")
    decode = llm.tokenizer.decode
    assert answer.text == decode(begin + [token.id for token in whole.tokens[:first]]).removeprefix(decode(begin))


def test_every_eos_of_the_generation_config_ends_a_turn(copy):
    with LLM.load(copy) as llm:
        tokens = [token.id for token in llm.chat(HELLO, **GREEDY).tokens]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[7]]}))
    with LLM.load(copy) as llm:
        answer = llm.chat(HELLO, **GREEDY)
    assert answer.reason == "stop"
    assert [token.id for token in answer.tokens] == tokens[: tokens.index(tokens[7]) + 1]


def test_caller_overrides_recommended_sampling(copy):
    (copy / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "top_k": 7, "do_sample": True}))
    with LLM.load(copy) as llm:
        assert llm.sampling() == Sampling(temperature=0.3, top_k=7)
        assert llm.sampling(temperature=0.9) == Sampling(temperature=0.9, top_k=7)
    (copy / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": False}))
    with LLM.load(copy) as llm:
        assert llm.sampling().greedy


def test_several_answers_and_their_logprobs(llm):
    answer = llm.chat(HELLO, n=3, seed=4, max_tokens=8, logprobs=2, prompt_logprobs=1)
    texts = {answer.text, *(other.text for other in answer.alternatives)}
    assert len(texts) == 3
    assert all(token.logprob <= token.top[0][1] and len(token.top) == 2 for token in answer.tokens)
    assert len(answer.prompt_logprobs) == answer.prompt_tokens
    again = llm.chat(HELLO, n=3, seed=4, max_tokens=8)
    assert {again.text, *(other.text for other in again.alternatives)} == texts


def test_cancelling_ends_a_reply(llm):
    reply = llm.chat(HELLO, stream=True, max_tokens=3000, ignore_eos=True)
    next(iter(reply))
    reply.cancel()
    assert reply.answer.reason == "cancelled"
    assert 1 <= len(reply.answer.tokens) < 3000


def test_plain_dialogue_ends_before_the_next_user_turn(copy):
    with LLM.load(copy, chat_format="plain") as llm:
        reply = llm.submit(llm.encode_chat(HELLO), llm.sampling(**GREEDY), chat=True)[0]
        assert "\nUser:" in reply.request.sampling.stop
        assert not reply.answer.text.startswith(" ")


OWN = "{% for m in messages %}<<{{ m.content }}>>{% endfor %}[INST]"


@pytest.mark.parametrize("chat_format", [None, "template", "file"])
def test_template_that_contradicts_the_guess_is_used(copy, tmp_path, chat_format):
    file = tmp_path / "own.jinja" if chat_format == "file" else copy / "chat_template.jinja"
    file.write_text(OWN)
    with LLM.load(copy, chat_format=str(file) if chat_format == "file" else chat_format) as llm:
        assert llm.tokenizer.decode(llm.encode_chat(HELLO)) == "<<Hello there.>>[INST]"
        assert llm.chat(HELLO, **GREEDY).text
        assert ("no built-in format, not even mistral-v1" in llm.format.note) == (chat_format is None)


def test_date_of_the_prompt_can_be_set(copy):
    (copy / "chat_template.jinja").write_text("{{ date_string | default('someday') }}{{ strftime_now('%Y-%m-%d') }}")
    with LLM.load(copy) as llm:

        def prompt(**options):
            return llm.tokenizer.decode(llm.encode_chat(HELLO, **options))

        assert prompt(now=datetime(2027, 1, 2)) == "someday2027-01-02"
        assert prompt(now=datetime(2027, 1, 2), chat_template_kwargs={"date_string": "x "}) == "x 2027-01-02"
        assert llm.chat(HELLO, chat_template_kwargs={"date_string": "long ago"}, **GREEDY).prompt_tokens


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda llm: llm.chat(HELLO, top_p=2), errors.InvalidParameter, "top_p"),
        (lambda llm: llm.chat(HELLO, tmperature=1), errors.InvalidParameter, "tmperature"),
        (lambda llm: llm.chat(HELLO, n=2, stream=True), errors.InvalidParameter, "n: "),
        (lambda llm: llm.chat([]), errors.InvalidMessages, "empty"),
        (lambda llm: llm.chat([{"role": "wizard", "content": "x"}]), errors.InvalidMessages, "wizard"),
        (lambda llm: llm.chat([{"role": "user"}]), errors.InvalidMessages, "content"),
        (lambda llm: llm.complete("word " * 5000), errors.PromptTooLong, "tokens"),
        (lambda llm: llm.complete(["ok", "word " * 5000]), errors.PromptTooLong, "tokens"),
        (lambda llm: llm.complete("x" * 10**6), errors.InvalidRequest, "1000000 characters"),
    ],
)
def test_invalid_requests_are_refused_before_running(llm, call, error, named):
    before = llm.engine.stats().prompt_tokens
    with pytest.raises(error) as caught:
        call(llm)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert llm.engine.stats().prompt_tokens == before


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"model": "no/such/folder"}, errors.NotFound, "moesaic pull"),
        ({"dtype": "int3"}, errors.InvalidParameter, "int3"),
        ({"kv_cache_dtype": "int4"}, errors.InvalidParameter, "int4"),
        ({"device": "toaster"}, errors.InvalidParameter, "toaster"),
        ({"context": 10**6}, errors.InvalidParameter, "4096"),
        ({"context": 1}, errors.InvalidParameter, "context"),
        ({"chat_format": "telegram"}, errors.NotFound, "mistral-v1"),
    ],
)
def test_loading_refuses_invalid_options(talker, options, error, named):
    with pytest.raises(error, match=named):
        LLM.load(**{"model": talker} | options)


def test_tokenizer_larger_than_the_model_is_refused(copy):
    transformers_model("Mixtral", {}).save_pretrained(copy)
    with pytest.raises(errors.InvalidRequest, match="32000 tokens, but the model only 97"):
        LLM.load(copy)


def test_int8_cache_answers(talker):
    with LLM.load(talker, kv_cache_dtype="int8") as small:
        assert len(small.chat(HELLO, **GREEDY).tokens) == 24


def test_closed_engine_raises(talker):
    llm = LLM.load(talker)
    llm.close()
    with pytest.raises(errors.EngineStopped):
        llm.chat(HELLO)


def test_classifier(talker, tmp_path):
    names = {"id2label": {0: "sad", 1: "glad"}, "pad_token_id": 0, "vocab_size": 32000}
    model = transformers_model("Mixtral", names, "ForSequenceClassification")
    model.save_pretrained(tmp_path)
    shutil.copy(talker / "tokenizer.model", tmp_path)
    with pytest.raises(errors.InvalidRequest, match="Classifier"):
        LLM.load(tmp_path)
    with pytest.raises(errors.InvalidRequest, match="LLM"):
        Classifier.load(talker)
    classifier = Classifier.load(tmp_path)
    texts = ["What a lovely day.", "Oh no!"]
    for text, probabilities in zip(texts, classifier.classify(texts), strict=True):
        ids = torch.tensor([classifier.tokenizer.encode(text, bos=True)])
        with torch.inference_mode():
            expected = model(ids).logits.softmax(-1)[0].tolist()
        assert probabilities == pytest.approx({"sad": expected[0], "glad": expected[1]}, abs=1e-5)
    with pytest.raises(errors.PromptTooLong):
        classifier.classify(["word " * 500])
