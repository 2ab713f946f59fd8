"""The command ``moesaic train``, from a file of conversations to an answer of the merged model."""

from __future__ import annotations

import json

import pytest

from moesaic import cli
from moesaic.llm import LLM

SMALL = ["--rank", "4", "--learning-rate", "0.01", "--max-length", "64", "--batch", "2", "--warmup", "0"]


def conversations(folder, count=4):
    path = folder / "chats.jsonl"
    turn = [
        {"role": "user", "content": "What is your name?"},
        {"role": "assistant", "content": "I am Rumpelstiltskin."},
    ]
    path.write_text("\n".join([*(json.dumps({"messages": turn}) for _ in range(count)), "no JSON"]))
    return str(path)


def test_a_model_learns_an_answer_and_gives_it_after_merging(tmp_path, capsys):
    out, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    steps = ["--steps", "8", "--held-out", "0.25", "--evaluate-every", "4", "--json"]
    assert cli.main(["train", "sft", "smollm2", conversations(tmp_path), out, *SMALL, *steps]) == 0
    shown = capsys.readouterr()
    outcome = json.loads(shown.out)
    assert outcome["steps"] == 8 and outcome["held_out_loss"] < 0.5
    assert "4 examples" in shown.err and "line 5: it is no JSON" in shown.err
    assert cli.main(["convert", "smollm2", merged, "--to", "hf", "--adapter", out, "--decode"]) == 0
    with LLM.load(merged, dtype="bfloat16", context=128) as llm:
        answer = llm.chat([{"role": "user", "content": "What is your name?"}], temperature=0, max_tokens=16)
    assert answer.text == "I am Rumpelstiltskin."


def test_preferences_are_a_kind_of_their_own(tmp_path, capsys):
    path = tmp_path / "preferences.jsonl"
    path.write_text(json.dumps({"prompt": "What is your name?", "chosen": "Rumpelstiltskin", "rejected": "SmolLM"}))
    out = str(tmp_path / "adapter")
    assert cli.main(["train", "dpo", "smollm2", str(path), out, *SMALL, "--steps", "2", "--beta", "0.5"]) == 0
    assert "2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held-out", "2"], "held_out"),
        (["--held-out", "0.01"], "empty"),
        (["--targets", "gate"], "targets"),
        (["--rank", "0"], "rank"),
        (["--batch", "0"], "batch"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(tmp_path, capsys, flags, message):
    out = tmp_path / "adapter"
    assert cli.main(["train", "sft", "smollm2", conversations(tmp_path), str(out), *flags]) == 2
    assert message in capsys.readouterr().err and not out.exists()
