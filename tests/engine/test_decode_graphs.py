"""Decode steps that are replayed give what the model gives when its ops run one by one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from moesaic import formats, models
from moesaic.engine import Engine, decode_graphs
from moesaic.engine.request import Request, Sampling
from moesaic.ops import native
from tests.support.require import require

SIZES = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "window": {"model_type": "mistral", "sliding_window": 9},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
}
FORMATS = ["int4", "bfloat16", "grouped:offset=value"]


def build(kind, weight_format, dtype):
    model = models.build(SIZES | HEADS | KINDS[kind], Path("config.json"), formats.load(weight_format), dtype=dtype)
    for slot in model.slots():
        slot.store(torch.randn(slot.shape) * 0.4)
    return model


def answers(model, cache_dtype, speculation="off", allowed=None, lengths=(3, 17, 1, 9)):
    """Return the events of requests that run together, of which one ends early, and the graphs of the engine.

    The clock ticks once for each reading, so that all steps seem to take the same time, and proposals to be worthwhile.
    """
    options = {"thread": False, "poison": True, "speculation": speculation, "clock": itertools.count().__next__}
    with Engine(model, cache_tokens=512, block_size=4, dtype=cache_dtype, **options) as engine:
        streams = []
        for number, length in enumerate(lengths):
            count = 13 if number == 1 else 60 if len(lengths) == 1 else 20
            sampling = Sampling(
                0.7 * (number % 2), max_tokens=count, seed=number, logprobs=3, allowed_token_ids=allowed
            )
            streams += engine.submit(Request(tuple(range(1, 1 + length)), sampling))
        return [list(stream) for stream in streams], engine._runner._graphs._graphs


@pytest.fixture(autouse=True)
def compiled():
    require(native.why_not("rms_norm", "cpu", None) is None, "the kernels are not compiled")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.int8), (torch.bfloat16, torch.bfloat16)])
def test_answers_are_those_of_single_ops(kind, weight_format, dtypes, monkeypatch):
    dtype, cache_dtype = dtypes
    model = build(kind, weight_format, dtype)
    replayed, graphs = answers(model, cache_dtype)
    assert {len(counts) for counts in graphs} >= {3, 4}  # one request ends before the others
    monkeypatch.setattr(decode_graphs, "MAX_TOKENS", 0)
    assert answers(model, cache_dtype) == (replayed, {})


def test_steps_with_proposals_are_replayed(monkeypatch):
    model = build("mixtral", "int4", torch.float32)
    options = {"allowed": (1, 2, 3), "lengths": (9,)}  # n-grams soon repeat
    replayed, graphs = answers(model, torch.bfloat16, "ngram", **options)
    assert any(max(counts) > 1 for counts in graphs)
    monkeypatch.setattr(decode_graphs, "MAX_TOKENS", 0)
    assert answers(model, torch.bfloat16, "ngram", **options) == (replayed, {})
    assert answers(model, torch.bfloat16, "off", **options) == (replayed, {})


def test_a_model_that_calls_torch_runs_without_graphs():
    replayed, graphs = answers(build("mixtral", "float32", torch.float32), torch.float32)
    assert all(replayed) and not graphs


def test_a_shape_is_recorded_when_it_comes_again():
    model = build("tied", "int4", torch.float32)
    with Engine(model, cache_tokens=512, thread=False, speculation="off") as engine:
        [stream] = engine.submit(Request((1, 2, 3), Sampling(max_tokens=20)))
        recorded = []
        while engine.step():
            recorded.append(len(engine._runner._graphs._graphs))
    assert recorded[:3] == [0, 0, 1] and len(list(stream)) == 21


def test_graphs_that_were_not_used_for_longest_are_dropped(monkeypatch):
    model = build("tied", "int4", torch.float32)
    everything, graphs = answers(model, torch.float32)
    monkeypatch.setattr(decode_graphs, "MAX_BYTES", 1)
    found, last = answers(model, torch.float32)
    assert found == everything and len(graphs) > len(last) == 1
