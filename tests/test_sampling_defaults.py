"""generation_config.json: values that mean "off" are read so, and values without a meaning are refused at the start."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic import LLM, Sampling, packed
from moesaic.errors import ConfigError
from moesaic.sampling_defaults import OFF, sampling_defaults
from tests.support import checkpoints
from tests.test_config_keys import any_json

FILE = Path("model/generation_config.json")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": "50"}, {"top_k": 50}),
        ({"top_k": "-1"}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": 1.0}),
        ({"top_p": "0.9"}, {"top_p": 0.9}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"typical_p": 0.0}, {"typical_p": 1.0}),
        ({"min_p": 0}, {"min_p": 0.0}),
        ({"repetition_penalty": 0}, {"repetition_penalty": 1.0}),
        ({"repetition_penalty": 1}, {"repetition_penalty": 1.0}),
        ({"temperature": "0.6"}, {"temperature": 0.6}),
        ({"temperature": " 6e-1 "}, {"temperature": 0.6}),
        ({"temperature": 0}, {"temperature": 0.0}),
        (dict.fromkeys(OFF), {}),
        ({"do_sample": None, "temperature": 0.5}, {"temperature": 0.5}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"do_sample": False, "temperature": 0.5, "top_k": 5}, {"temperature": 0.0, "top_k": 5}),
        ({"do_sample": "false"}, {"temperature": 0.0}),
        ({"do_sample": 0}, {"temperature": 0.0}),
        ({"eos_token_id": [1, 2], "max_new_tokens": "many", "num_beams": 4}, {}),
    ],
)
def test_values_are_read_as_they_are_meant(values, expected):
    found = sampling_defaults(values, FILE)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", 1e9),
        ("temperature", "warm"),
        ("temperature", [0.5]),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", "inf"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", {}),
        ("top_p", 1.5),
        ("top_p", -1),
        ("top_p", ""),
        ("min_p", -1),
        ("repetition_penalty", -1),
        ("repetition_penalty", 10**400),
        ("do_sample", "maybe"),
        ("do_sample", []),
    ],
)
def test_values_without_a_meaning_are_refused_by_file_and_key(name, value):
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name}\b.*in this file") as caught:
        sampling_defaults({name: value}, FILE)
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.sampled_from([*OFF, "do_sample", "other"]), any_json))
def test_any_value_is_a_valid_parameter_or_a_configuration_error(values: dict[str, Any]):
    try:
        defaults = sampling_defaults(values, FILE)
    except ConfigError:
        return
    Sampling(**defaults)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = checkpoints.write(tmp_path / "model", checkpoints.config(vocab_size=320))
    checkpoints.write_tokenizer(path)
    return path


def test_a_request_without_parameters_works_with_values_that_mean_off(folder):
    values = {"top_k": -1, "top_p": 0.0, "temperature": "0.6", "repetition_penalty": 0}
    (folder / "generation_config.json").write_text(json.dumps(values))
    with LLM.load(folder, chat_format="plain") as llm:
        assert llm.defaults == {"top_k": 0, "top_p": 1.0, "temperature": 0.6, "repetition_penalty": 1.0}
        assert len(llm.complete("Hi", max_tokens=2, ignore_eos=True).tokens) == 2


def test_a_model_with_a_value_without_a_meaning_does_not_start(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"top_p": "half"}')
    packed.pack(folder, tmp_path / "packed", "int8")
    before = set(threading.enumerate())
    for path, file in ((folder, "generation_config"), (tmp_path / "packed", "moesaic")):
        with pytest.raises(ConfigError, match=rf"{file}\.json: top_p is 'half', expected a number"):
            LLM.load(path)
    assert not [thread for thread in set(threading.enumerate()) - before if "engine" in thread.name]


def test_ends_may_be_written_as_text(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": ["7", 8.0, 9, -1, "</s>", null]}')
    with LLM.load(folder) as llm:
        assert llm.loaded.eos_ids == {7, 8, 9}
