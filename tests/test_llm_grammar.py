"""Answers with a grammar, on the model tales and on a random one."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from moesaic import LLM, Grammar, errors
from moesaic.engine import Limits

HELLO = [{"role": "user", "content": "Tell me about a fox."}]
WORD = {"type": "string", "maxLength": 12}
SCHEMAS = {
    "members": {
        "type": "object",
        "properties": {
            "name": WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "wild": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "letters of many bytes": {"enum": ["été", "日本語", "🦊🦊", 'a "quoted" one\n', " leading"]},
    "a list of either": {
        "type": "array",
        "items": {
            "anyOf": [{"type": "null"}, {"const": {"é": [1, 2.5]}}, {"type": "integer", "minimum": -9, "maximum": 9}]
        },
        "minItems": 1,
        "maxItems": 4,
    },
    "references and a pattern": {
        "$defs": {"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}},
        "type": "object",
        "properties": {
            "code": {"$ref": "#/$defs/code"},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/code"}]},
        },
        "required": ["code", "next"],
        "additionalProperties": False,
    },
    "a date": {"type": "string", "format": "date"},
}
WAYS = [{"temperature": 0}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2, "top_p": 0.9}]


@pytest.fixture(scope="module", params=["tales", "random"])
def llm(request, talker):
    with LLM.load("tales" if request.param == "tales" else talker, context=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def random(talker):
    with LLM.load(talker, context=512) as llm:
        yield llm


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_matches_the_schema(llm, name):
    grammar = Grammar("json_schema", SCHEMAS[name])
    for way in WAYS:
        for answer in (
            llm.chat(HELLO, grammar=grammar, max_tokens=400, **way),
            llm.complete("Once", grammar=grammar, max_tokens=400, **way),
        ):
            assert answer.reason == "stop"
            jsonschema.validate(json.loads(answer.text), SCHEMAS[name])


@pytest.mark.parametrize(
    "pattern", [r"(yes|no)( indeed)?", r"[a-f]{3}\d{1,4}", r" {0,2}[éàü]{2,5}🙂", r"\d{4}-\d\d-\d\d"]
)
def test_regular_expressions_match_completely(llm, pattern):
    for way in WAYS:
        answer = llm.chat(HELLO, grammar=Grammar("regex", pattern), max_tokens=60, **way)
        assert answer.reason == "stop"
        assert re.fullmatch(pattern, answer.text)


def test_choice_returns_one_of_the_choices(llm):
    choices = ["a fox", "a fox and a hen", "λύκος", "\n\nUser: nobody"]
    said = {
        llm.chat(HELLO, grammar=Grammar("choice", choices), temperature=3, seed=seed, max_tokens=60).text
        for seed in range(12)
    }
    assert said <= set(choices)
    assert len(said) > 1


def test_lark_grammar(llm):
    grammar = Grammar("lark", 'start: "(" list ")"\nlist: item ("," item){1,3}\nitem: /[0-9]{1,3}/ | "(" list ")"\n')
    for way in WAYS:
        answer = llm.chat(HELLO, grammar=grammar, max_tokens=100, **way)
        assert answer.reason == "length" or answer.text.count("(") == answer.text.count(")") > 0


def test_truncated_json_object_is_a_valid_prefix(llm):
    answer = llm.chat(HELLO, grammar=Grammar("json_object"), temperature=0, max_tokens=40)
    assert answer.text.startswith("{")
    assert answer.reason == "length" or isinstance(json.loads(answer.text), dict)


def test_n_answers_have_independent_grammar_states(llm):
    schema = SCHEMAS["members"]
    answer = llm.chat(HELLO, grammar=Grammar("json_schema", schema), temperature=1.5, seed=5, n=3, max_tokens=200)
    answers = [answer, *answer.alternatives]
    for each in answers:
        jsonschema.validate(json.loads(each.text), schema)
    assert len({each.text for each in answers}) > 1


def test_streamed_answer_equals_the_complete_one(llm):
    grammar = Grammar("json_schema", SCHEMAS["letters of many bytes"])
    whole = llm.chat(HELLO, grammar=grammar, temperature=1.5, seed=4, max_tokens=99)
    pieces = llm.chat(HELLO, grammar=grammar, temperature=1.5, seed=4, max_tokens=99, stream=True)
    assert "".join(piece.text for piece in pieces) == whole.text


def test_max_tokens_ends_an_answer_with_reason_length(random):
    grammar = Grammar("json_schema", {"type": "string", "minLength": 200, "maxLength": 300})
    answer = random.chat(HELLO, grammar=grammar, temperature=0, max_tokens=9)
    assert (answer.reason, len(answer.tokens)) == ("length", 9)
    assert answer.text.startswith('"')
    whole = random.chat(HELLO, grammar=Grammar("choice", ["a b c d"]), temperature=0)
    exact = random.chat(HELLO, grammar=Grammar("choice", ["a b c d"]), temperature=0, max_tokens=len(whole.tokens))
    assert (exact.text, exact.reason) == ("a b c d", "stop")


def test_min_tokens_and_ignored_ends_keep_the_grammar(random):
    for options in ({"min_tokens": 50}, {"ignore_eos": True}, {"min_tokens": 50, "ignore_eos": True}):
        answer = random.chat(HELLO, grammar=Grammar("choice", ["yes", "no"]), temperature=1.5, max_tokens=60, **options)
        assert (answer.text in ("yes", "no"), answer.reason) == (True, "stop")


def test_biases_and_penalties_keep_the_grammar(random):
    schema = SCHEMAS["members"]
    bias = dict.fromkeys(random.tokenizer.encode("xxxx{}[]"), 100.0)
    answer = random.chat(
        HELLO,
        grammar=Grammar("json_schema", schema),
        temperature=1.5,
        seed=3,
        logit_bias=bias,
        repetition_penalty=1.8,
        frequency_penalty=2.0,
        presence_penalty=2.0,
        logprobs=2,
        max_tokens=200,
    )
    jsonschema.validate(json.loads(answer.text), schema)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_requests_without_grammar_get_equal_tokens(random, temperature):
    prompts = [random.encode_chat([{"role": "user", "content": text}]) for text in ("One", "Two?", "And three.")]
    sampling = random.sampling(temperature=temperature, seed=11, max_tokens=40)
    alone = [random.submit(ids, sampling, chat=True)[0].answer.tokens for ids in prompts]
    grammar = Grammar("json_schema", {"type": "array", "items": WORD, "minItems": 9})
    mixed = []
    for ids in prompts:
        mixed += random.submit(ids, sampling, chat=True)
        mixed += random.submit(ids, sampling, chat=True, grammar=grammar)
    assert [reply.answer.tokens for reply in mixed[::2]] == alone
    assert all(reply.answer.text.startswith("[") for reply in mixed[1::2])


def test_preemption_does_not_change_answers(talker):
    grammar = Grammar("json_schema", {"type": "array", "items": WORD, "minItems": 12, "maxItems": 12})
    conversations = [[{"role": "user", "content": f"Fox number {n}."}] for n in range(6)]
    with LLM.load(talker, context=256, cache_tokens=320, limits=Limits(batch_tokens=64, sequences=8)) as small:
        crowded = small.chat(conversations, grammar=grammar, temperature=0, max_tokens=150)
        assert small.engine.stats().preemptions > 0
    with LLM.load(talker) as large:
        alone = [large.chat(each, grammar=grammar, temperature=0, max_tokens=150) for each in conversations]
    assert [answer.text for answer in crowded] == [answer.text for answer in alone]


def test_invalid_grammar_is_refused_before_running(random):
    before = random.engine.stats().prompt_tokens
    with pytest.raises(errors.InvalidParameter, match=r"grammar: .*unclosed group"):
        random.chat(HELLO, grammar=Grammar("regex", "(a"))
    assert random.engine.stats().prompt_tokens == before
