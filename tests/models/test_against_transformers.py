"""Logits and greedy answers equal those of transformers, for every option that changes the computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moesaic.engine import Engine, Request, Sampling, Token
from moesaic.ops import Batch
from tests.support.models import CASES, moesaic_model, transformers_model

PROMPT = [1, 17, 80, 3, 55, 21, 21, 96, 40, 8, 66, 12, 90, 5]


def greedy(model, count: int, **options) -> list[int]:
    with Engine(model, thread=False, poison=True, dtype=model.dtype, **options) as engine:
        [stream] = engine.submit(Request(tuple(PROMPT), Sampling(temperature=0, max_tokens=count)))
        return [event.id for event in stream if isinstance(event, Token)]


def test_logits(pair):
    model, mine, _ = pair
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids).logits
        found = mine.logits(mine(Batch.whole(ids.tolist()))).view_as(expected)
    assert expected.std() > 0.5  # else equality would say nothing
    assert (found - expected).abs().max() <= 1e-4


def test_greedy_ids(pair):
    model, mine, _ = pair
    expected = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :]
    assert greedy(mine, 64) == expected.tolist()


@pytest.mark.parametrize("case", ["mixtral-top2-of-8", "llama-3.1-rope", "mistral-window"])
def test_bfloat16_logprobs_are_close(case, tmp_path):
    """At the first difference, the token of each side is among the five likeliest of the other."""
    model = transformers_model(*CASES[case]).bfloat16()
    model.save_pretrained(tmp_path)
    mine = moesaic_model(tmp_path, "bfloat16")
    answer = greedy(mine, 48)
    expected = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=48, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    same = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=True)) if a != b), None)
    assert same is None or same >= 1, "not even the first token agrees"
    if same is not None:
        shared = [*PROMPT, *expected[:same]]
        with torch.inference_mode():
            their = F.log_softmax(model(torch.tensor([shared])).logits[0, -1].float(), -1).topk(5).indices
            our = F.log_softmax(mine.logits(mine(Batch.whole([shared]))[-1:])[0], -1).topk(5).indices
        assert answer[same] in their
        assert expected[same] in our


@pytest.mark.parametrize("family", ["Mixtral", "Llama", "Mistral"])
def test_classification_head(family, tmp_path):
    names = {"id2label": {0: "sad", 1: "glad", 2: "neither"}, "pad_token_id": 0}
    model = transformers_model(family, names, "ForSequenceClassification")
    model.save_pretrained(tmp_path)
    mine = moesaic_model(tmp_path)
    assert mine.shape.labels == ("sad", "glad", "neither")
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits
        found = mine.logits(mine(Batch.whole([PROMPT]))[-1:])
    assert (found - expected).abs().max() <= 1e-4
