"""`moesaic eval`: lm-eval in this process, beside its own adapter for transformers, with tasks that need no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic.llm import LLM
from tests.support.client import SCRIPTS, environment, run

pytestmark = pytest.mark.clients
TALES = Path(moesaic.__file__).parent / "builtin/tales"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SAME = ("choices", "shots", "cut", "limit", "whole", "windows")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    packages = ("lm-eval==0.4.13", "accelerate==1.12.0", "peft==0.18.1")
    python = environment("lm-eval-hf", *packages, on_top=True)
    folder = tmp_path_factory.mktemp("eval")
    return dict(run(python, "lm_eval_in_process.py", str(TALES), str(folder), HF_HOME=str(folder / "hf"), **OFFLINE))


@pytest.mark.parametrize("case", SAME)
def test_likelihoods_equal_those_of_the_adapter_for_transformers(found: dict[str, Any], case: str) -> None:
    ours, theirs = found["pairs"][case]
    assert len(ours["answers"]) == len(theirs["answers"]) == (2 if case == "limit" else 6)
    for mine, other in zip(_numbers(ours["answers"]), _numbers(theirs["answers"]), strict=True):
        assert mine == pytest.approx(other, abs=2e-3)
    [mine], [other] = ours["results"].values(), theirs["results"].values()
    assert mine.keys() == other.keys()
    for key in mine.keys() - {"alias", "name"}:
        close = other[key] if isinstance(other[key], str) else pytest.approx(other[key], rel=1e-3)
        assert mine[key] == close, key


def _numbers(answers: Any) -> list[float]:
    """Return all numbers and flags in a nested list, which may be written as text."""
    if isinstance(answers, list | tuple):
        return [number for answer in answers for number in _numbers(answer)]
    return [float(answers)]


def test_windows_and_cuts_change_the_numbers(found: dict[str, Any]) -> None:
    for case, other in (("cut", "shots"), ("windows", "whole"), ("told, cut", "told")):
        assert found["pairs"][case][0]["answers"] != found["pairs"][other][0]["answers"]


@pytest.mark.parametrize("case", ["told", "told, cut"])
def test_answers_equal_those_of_the_adapter_for_transformers(found: dict[str, Any], case: str) -> None:
    ours, theirs = found["pairs"][case]
    assert ours["answers"] == theirs["answers"] and all(answer for [answer] in ours["answers"])


def test_chat_prompts_have_the_ids_of_the_chat_format(found: dict[str, Any]) -> None:
    lines = (SCRIPTS / "lm_eval_tasks/choices.jsonl").read_text().splitlines()
    with LLM.load("tales", dtype="float32", format="float32") as llm:
        for line, [answer] in zip(lines, found["chat"]["answers"], strict=True):
            asked = f"Tell a story that begins with: {json.loads(line)['text']}"
            told = llm.chat([{"role": "user", "content": asked}], temperature=0.0, max_tokens=24, stop=(".",))
            assert answer == told.text


def test_unknown_tasks_are_refused(found: dict[str, Any]) -> None:
    assert found["unknown"] == [2]
