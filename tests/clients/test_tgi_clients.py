"""Clients that were written for TGI, unchanged, against a real server: huggingface_hub and text-generation."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from tests.support.client import environment, run

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def hugging(served):
    return run(environment("huggingface_hub", "huggingface_hub==2.4.0"), "huggingface.py", served)


@pytest.fixture(scope="module")
def older(served):
    python = environment("text-generation", "text-generation==0.7.0", "huggingface_hub==0.36.0")
    return run(python, "text_generation_client.py", served)


def test_a_stream_is_the_whole(hugging):
    whole, stream = hugging["whole"], hugging["stream"]
    assert hugging["version"] == "2.4.0"
    assert stream["tokens"] == whole["tokens"] and len(stream["tokens"]) == 20
    text = "".join(stream["tokens"])
    assert text == hugging["plain"] == hugging["plain stream"] == hugging["under v1"] == hugging["async"]
    assert whole["text"] == stream["text"] == hugging["with prompt"] == f"Once upon a time{text}"
    assert stream["ended"] == [False] * 19 + [True]
    assert stream["reason"] == whole["reason"] == "length"
    assert stream["tops"] == whole["tops"] == [2] * 20


def test_details(hugging):
    first, *others = hugging["whole"]["prefill"]
    assert first is None and all(value < 0 for value in others)
    assert hugging["stream"]["input_length"] == len(others) + 1
    assert hugging["best of"] == [True, 1]
    text, reason = hugging["stopped"]
    assert text.endswith("the") and reason == "stop_sequence"


def test_chat(hugging):
    text, reason, tokens = hugging["chat"]
    assert text == hugging["chat stream"] and (reason, tokens) == ("length", 20)


@pytest.mark.skipif(find_spec("moesaic.text.grammar") is None, reason="this build knows no grammars")
def test_forms_of_answers(hugging):
    found = [json.loads(text) for text in hugging["forms"].values()]
    assert all(each.keys() == {"name"} for each in found)
    assert hugging["regex"].isdigit() and len(hugging["regex"]) == 3


def test_refusals_are_the_clients_own_errors(hugging):
    said = hugging["refused"]
    assert said["top_p False"] == said["top_p True"] == "Input validation error: `top_p` must be > 0.0 and < 1.0"
    assert "`max_new_tokens` must be strictly positive" in said["max_new_tokens True"]
    assert "`truncate` must be strictly positive and less than 1023. Given: 0" in said["length False"]
    assert hugging["chat refused"] == [400, True]


def test_the_tutorials_program(hugging):
    history = hugging["program"]["history"]
    assert len(history) == 2 and all(answer for _, answer in history)
    assert hugging["program"]["again"] == history[0][1]  # its seed is always 42
    assert hugging["slider at its ends"]
    assert hugging["twenty"] == [[history[0][1]], 20]


def test_the_older_client(older):
    assert older["version"] == "0.7.0" and older["hub"].startswith("0.")
    whole, stream = older["whole"], older["stream"]
    assert whole["tokens"] == stream["tokens"] and whole["text"] == stream["text"] == "".join(stream["tokens"])
    assert whole["reason"] == stream["reason"] == "length" and whole["seed"] is None
    assert whole["prefill"][0] is None and whole["prefill"][1] < 0
    assert older["drawn"][0] and older["drawn"][1] == 42
    assert older["best of"] == 1
    assert older["stopped"][0].endswith("the") and older["stopped"][1] == "stop_sequence"
    assert older["chat"]
    assert "`truncate` must be strictly positive and less than" in older["refused"]
    assert older["async"] == [whole["text"]] * 2
