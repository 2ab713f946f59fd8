"""What ends an answer, and special tokens in a prompt: the same on every route."""

from __future__ import annotations

import pytest

from moesaic.llm import LLM
from moesaic.local_backend import LocalBackend
from tests.support.byte_llama import write_byte_llama
from tests.support.http import post
from tests.support.server import running

HELLO = [{"role": "user", "content": "Hi"}]
EOT, MORE = "261", "263"
"""Ids of ``<|eot_id|>`` and ``<|more|>``."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A server of a Llama 3 whose configuration names only ``<|end_of_text|>`` as its end, as the first release did."""
    llm = LLM.load(write_byte_llama(tmp_path_factory.mktemp("llama")))
    with running(lambda: LocalBackend(llm)) as server:
        yield server


def complete(server, **body):
    [choice] = post(server, "/v1/completions", {"prompt": "Hi", "max_tokens": 30} | body).json()["choices"]
    return choice


def chat(server, **body):
    [choice] = post(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 30} | body).json()["choices"]
    return choice


def test_the_end_of_a_turn_ends_every_kind_of_answer(llama):
    bias = {"logit_bias": {EOT: 100}}
    ended = (complete(llama, **bias), chat(llama, **bias))
    assert [(choice["finish_reason"], choice["stop_reason"]) for choice in ended] == [("stop", int(EOT))] * 2
    assert complete(llama, ignore_eos=True, max_tokens=3, **bias)["finish_reason"] == "length"


def test_the_end_of_a_turn_ends_tgis_answer(tmp_path):
    llm = LLM.load(write_byte_llama(tmp_path, always=int(EOT)))
    with running(lambda: LocalBackend(llm)) as server:
        body = {"inputs": "Hi", "parameters": {"max_new_tokens": 4, "details": True}}
        details = post(server, "/generate", body).json()["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("eos_token", 1)


@pytest.mark.parametrize("stops", [["DEF"], ["EFG", "DEF"], "DEF"])
def test_a_stop_string_is_kept_on_request(llama, stops):
    body = {"guided_choice": ["ABCDEFGH"], "stop": stops}
    assert complete(llama, **body)["text"] == "ABC"
    kept = complete(llama, include_stop_str_in_output=True, **body)
    assert (kept["text"], kept["finish_reason"], kept["stop_reason"]) == ("ABCDEF", "stop", "DEF")
    assert chat(llama, include_stop_str_in_output=True, **body)["message"]["content"] == "ABCDEF"


def test_a_stop_token_is_kept_on_request(llama):
    body = {"guided_choice": ["ABCDEFGH"], "stop_token_ids": [ord("D")]}
    assert complete(llama, **body)["text"] == "ABC"
    assert complete(llama, include_stop_str_in_output=True, **body)["text"] == "ABCD"


@pytest.mark.parametrize("shown", [True, False])
def test_a_stop_string_may_name_a_special_token(llama, shown):
    body = {"logit_bias": {MORE: 100}, "stop": ["<|more|>"], "skip_special_tokens": not shown, "max_tokens": 5}
    for choice in (complete(llama, **body), chat(llama, **body)):
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert (text, choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "<|more|>")
    kept = complete(llama, include_stop_str_in_output=True, **body)
    assert kept["text"] == "<|more|>"


def test_special_tokens_in_a_prompt_are_read_the_same_on_every_route(tales):
    def count(**more):
        body = {"prompt": "Once</s>upon", "max_tokens": 1} | more
        return post(tales, "/v1/completions", body).json()["usage"]["prompt_tokens"]

    parameters = {"max_new_tokens": 1, "decoder_input_details": True}
    prefill = post(tales, "/generate", {"inputs": "Once</s>upon", "parameters": parameters}).json()["details"][
        "prefill"
    ]
    tokenized = post(tales, "/tokenize", {"prompt": "Once</s>upon"}).json()["count"]
    assert count() == len(prefill) == tokenized
    assert (
        count(parse_special=False)
        == post(tales, "/tokenize", {"prompt": "Once</s>upon", "parse_special": False}).json()["count"]
        > count()
    )
