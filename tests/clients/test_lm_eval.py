"""lm-eval: continuations scored by their likelihood, and answers generated, with tasks that need no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moesaic
from moesaic.llm import LLM
from tests.support.client import SCRIPTS, environment, run

pytestmark = pytest.mark.clients
TALES = Path(moesaic.__file__).parent / "builtin/tales"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def python():
    return environment("lm-eval", "lm-eval[api]==0.4.13", "transformers==5.23.0")


@pytest.mark.parametrize("tokenizer", ["local", "remote"])
def test_scores_and_answers(python, served, tokenizer, tmp_path):
    which = str(TALES) if tokenizer == "local" else "remote"
    found = run(python, "lm_eval_client.py", served, which, str(tmp_path), HF_HOME=str(tmp_path / "hf"), **OFFLINE)
    assert found["accuracy"] == 1.0
    assert len(found["answers"]) == 6 and all(found["answers"])
    assert not any("." in answer for answer in found["answers"])
    lines = (SCRIPTS / "lm_eval_tasks/choices.jsonl").read_text().splitlines()
    llm = LLM.load("tales")
    for line, scores in zip(lines, found["likelihoods"], strict=True):
        doc = json.loads(line)
        for choice, (score, _) in zip(doc["choices"], scores, strict=True):
            assert score == pytest.approx(likelihood(llm, doc["text"], choice), abs=0.02), doc
    llm.close()


def likelihood(llm: LLM, text: str, choice: str) -> float:
    """Return what the model in this process makes of a continuation; lm-eval puts no mark of a beginning in front."""
    read, whole = len(llm.encode(text, bos=False)), llm.encode(text + choice, bos=False)
    [reply] = llm.submit(whole, llm.sampling(max_tokens=1, prompt_logprobs=0))
    scored = reply.answer.prompt_logprobs
    return sum(token.logprob for token in scored[read:] if token.logprob is not None)
