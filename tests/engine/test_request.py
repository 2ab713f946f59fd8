import math

import pytest

from moesaic.engine import Request, Sampling
from moesaic.errors import InvalidParameter

NAN, INF = math.nan, math.inf

WRONG = {
    "temperature": [-0.1, 100.5, NAN, INF, True, "1", None],
    "top_k": [-1, 1.5, True, None],
    "top_p": [0, -0.1, 1.01, 2, NAN, False],
    "typical_p": [0, 1.01, NAN],
    "min_p": [-0.1, 1.1, NAN],
    "repetition_penalty": [0, -1, INF, 101],
    "frequency_penalty": [-2.1, 2.1, NAN],
    "presence_penalty": [-2.1, 2.1, NAN],
    "logit_bias": [{-1: 1.0}, {1: NAN}, {1: 101}, {"1": 1.0}, {True: 1.0}, dict.fromkeys(range(301), 1.0), [1]],
    "stop": ["x", ("",), ("é" * 129,), ("x",) * 17, (1,)],
    "bad_words": ["x", ("",), ("é" * 129,), ("x",) * 257, (1,)],
    "allowed_token_ids": [(), (-1,), (1.0,), "12", (True,), 5],
    "stop_token_ids": [(-1,), (1.0,), "12", (True,), 5],
    "max_tokens": [0, -1, 1.0, True],
    "min_tokens": [-1, 1.0, None],
    "n": [0, 129, True, 1.0],
    "seed": [2**64, -(2**63) - 1, 1.0, True],
    "logprobs": [-1, 21, True, 1.0],
    "prompt_logprobs": [-1, 21, True],
    "ignore_eos": [1, None, "yes"],
    "speculation": [1, None, "yes"],
}
RIGHT = {
    "temperature": [0, 0.7, 100],
    "top_k": [0, 1, 10**6],
    "top_p": [1e-6, 1],
    "typical_p": [0.5],
    "min_p": [0, 1],
    "repetition_penalty": [0.1, 100],
    "frequency_penalty": [-2, 2],
    "presence_penalty": [-2, 2],
    "logit_bias": [{}, {0: -100, 5: 100.0}, dict.fromkeys(range(300), 1.0)],
    "stop": [(), ("x",) * 16, ("é" * 128,)],
    "bad_words": [(), ("x",) * 256, ("é" * 128,)],
    "allowed_token_ids": [None, (0,), (5, 0)],
    "stop_token_ids": [(), (0, 5)],
    "max_tokens": [None, 1],
    "min_tokens": [0, 5],
    "n": [1, 128],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
    "speculation": [True, False],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_invalid_value_is_an_error_that_names_the_field(name, value):
    with pytest.raises(InvalidParameter) as caught:
        Sampling(**{name: value})
    assert caught.value.param == name
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_values_at_the_bounds_are_valid(name, value):
    assert getattr(Sampling(**{name: value}), name) == value


def test_the_tables_cover_every_field():
    assert set(WRONG) == set(RIGHT) == set(Sampling.__dataclass_fields__)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidParameter) as caught:
        Sampling(min_tokens=3, max_tokens=2)
    assert caught.value.param == "min_tokens"


def test_checked_values_are_copied():
    bias = {1: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[2] = NAN
    assert sampling.logit_bias == {1: 1.0}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"ids": ()}, "prompt"),
        ({"ids": (-1,)}, "prompt"),
        ({"ids": (1.0,)}, "prompt"),
        ({"ids": "abc"}, "prompt"),
        ({"eos_ids": (-2,)}, "eos_ids"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 2**31}, "priority"),
    ],
)
def test_an_invalid_request_is_an_error(change, param):
    with pytest.raises(InvalidParameter) as caught:
        Request(**({"ids": (1,)} | change))
    assert caught.value.param == param


def test_ignore_eos_leaves_the_stop_ids():
    assert Request((1,), Sampling(stop_token_ids=(5,)), eos_ids=(2,)).stop_ids == {2, 5}
    assert Request((1,), Sampling(stop_token_ids=(5,), ignore_eos=True), eos_ids=(2,)).stop_ids == {5}
