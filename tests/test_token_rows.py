"""A tokenizer with added tokens that the model has no row for: the model runs, and only those tokens are refused."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest

from moesaic import LLM, Classifier, Sampling, errors
from moesaic.bench import quality
from moesaic.local_backend import LocalBackend
from moesaic.text.grammar import Grammar
from moesaic.text.tokenizer import Tokenizer
from tests.support import checkpoints
from tests.support.http import post
from tests.support.loading import load_model
from tests.support.server import Server, running

ROWS = 258
EXTRA, WORD = "<|extra|>", "wolf"
"""The tokens 258, a special one, and 259, which is found in ordinary text."""
LACKS = rf"has the token '{WORD}' \(259\), which this model of {ROWS} tokens lacks"
GREEDY = {"temperature": 0, "max_tokens": 6}


def folder(path: Path, rows: int = ROWS, **config: object) -> Path:
    checkpoints.write(path, checkpoints.config(vocab_size=rows, bos_token_id=256, eos_token_id=257, **config))
    checkpoints.write_tokenizer(path, EXTRA, added=(WORD,))
    return path


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM.load(folder(tmp_path_factory.mktemp("model")), chat_format="plain") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm) -> Server:
    with running(lambda: LocalBackend(llm)) as server:
        yield server


def test_the_model_loads_and_the_log_names_the_tokens(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "moesaic"), LLM.load(folder(tmp_path / "model")) as llm:
        assert len(llm.complete("A fox", **GREEDY).tokens) == 6
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"the tokenizer has 260 tokens, but the model only {ROWS}" in line
    assert f"'{EXTRA}' (258), '{WORD}' (259) are refused" in line


def test_nothing_is_logged_for_a_model_with_all_rows(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "moesaic"), LLM.load(folder(tmp_path / "model", rows=320)) as llm:
        assert llm.complete("wolf", **GREEDY).prompt_tokens == 2
    assert not caplog.records


def test_names_of_many_tokens_are_cut(tmp_path, caplog):
    path = folder(tmp_path / "model")
    checkpoints.write_tokenizer(path, *(f"<|{n}|>" for n in range(9)))
    with caplog.at_level(logging.WARNING, "moesaic"), LLM.load(path):
        assert "'<|4|>' (262) and 4 more are refused" in caplog.records[0].getMessage()


@pytest.mark.parametrize("rows", [256, 255, 40])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, rows):
    path = folder(tmp_path / "model", rows=rows)
    reason = "'<s>', which begins every text" if rows == 256 else "the tokenizer belongs to another model"
    with pytest.raises(errors.InvalidRequest, match=f"260 tokens, but the model only {rows}.*{reason}"):
        LLM.load(path)


def test_an_end_without_a_row_ends_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "moesaic"), LLM.load(folder(tmp_path / "model", rows=257)) as llm:
        assert "answers do not end by themselves" in caplog.records[0].getMessage()
        answer = llm.complete("A fox", **GREEDY)
        assert (answer.reason, len(answer.tokens)) == ("length", 6)


def test_prompts_with_the_token_are_refused(llm):
    for attempt in (
        lambda: llm.complete("a wolf", **GREEDY),
        lambda: llm.complete(["a fox", "a wolf"], **GREEDY),
        lambda: llm.chat([{"role": "user", "content": "wolf"}], **GREEDY),
        lambda: llm.embed(["a wolf"]),
        lambda: llm.submit([259], Sampling()),
    ):
        with pytest.raises(errors.InvalidParameter, match=LACKS):
            attempt()
    with pytest.raises(errors.InvalidParameter, match="token id 260 is not in the vocabulary of 258"):
        llm.submit([260], Sampling())
    assert llm.complete(f"a fox {EXTRA}", **GREEDY).text is not None  # a special token's name is ordinary text
    assert llm.engine.stats().running == 0


@pytest.mark.parametrize("options", [{"logit_bias": {259: 100}}, {"stop_token_ids": (258,)}])
def test_parameters_with_the_token_are_refused(llm, options):
    with pytest.raises(errors.InvalidParameter, match="is not in the vocabulary of 258"):
        llm.complete("a fox", **GREEDY, **options)


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar("choice", ["the wolf sleeps"]), "the wolf sleeps"),
        (Grammar("regex", "(wolf){3}"), "wolfwolfwolf"),
        (Grammar("lark", 'start: "wolf" "<|extra|>"'), "wolf<|extra|>"),
        (Grammar("json_schema", {"const": "wolf"}), '"wolf"'),
    ],
)
def test_grammars_spell_the_token_with_others(llm, grammar, expected):
    answer = llm.complete("a fox", temperature=1, seed=3, max_tokens=40, grammar=grammar)
    assert answer.text == expected
    assert max(token.id for token in answer.tokens) < ROWS


ROUTES = {
    "/v1/completions": {"prompt": "a wolf", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a wolf"}], "max_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "a wolf"}], "max_tokens": 2},
    "/v1/responses": {"input": "a wolf", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "a wolf"},
    "/generate": {"inputs": "a wolf", "parameters": {"max_new_tokens": 2}},
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_every_route_refuses_a_prompt_with_the_token(server, path, stream):
    body = ROUTES[path] | ({"model": server.backend.models()[0].name} if path == "/v1/messages" else {})
    answer = post(server, path, body | ({"stream": True} if stream and path != "/v1/embeddings" else {}))
    assert answer.status_code in (400, 422), answer.text
    assert f"has the token '{WORD}' (259)" in answer.text
    assert httpx.get(server.url + "/health").status_code == 200


def test_the_tokenizer_still_knows_the_token(server):
    tokens = post(server, "/tokenize", {"prompt": "a wolf", "add_special_tokens": False}).json()["tokens"]
    assert tokens == [97, 32, 259]
    assert post(server, "/detokenize", {"tokens": tokens}).json() == {"prompt": "a wolf"}
    assert post(server, "/detokenize", {"tokens": [260]}).status_code == 400


def test_a_classifier_refuses_only_texts_with_the_token(tmp_path):
    path = folder(tmp_path / "model", architectures=["LlamaForSequenceClassification"], num_labels=2)
    classifier = Classifier.load(path)
    assert len(classifier.classify(["a fox"])[0]) == 2
    with pytest.raises(errors.InvalidParameter, match=LACKS):
        classifier.classify(["a fox", "a wolf"])


def test_perplexity_refuses_only_texts_with_the_token(llm, tmp_path):
    loaded, tokenizer = llm.loaded, llm.tokenizer
    assert quality.perplexity(loaded, tokenizer, ["a fox"], 16).tokens == 6
    with pytest.raises(errors.InvalidParameter, match=LACKS):
        quality.perplexity(loaded, tokenizer, ["a wolf"], 16)
    small = folder(tmp_path / "small", rows=40)
    with pytest.raises(errors.InvalidRequest, match="the tokenizer belongs to another model"):
        quality.perplexity(load_model(small), Tokenizer.open(small), ["a fox"], 16)
