"""Training data in the forms that people have, and the lines that cannot be used."""

from __future__ import annotations

import json
import lzma

import pytest

from moesaic.errors import InvalidRequest, NotFound
from moesaic.train import data

QUESTION, ANSWER = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}


def file(folder, *lines, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "What is 2 + 2?", "output": "4"},
        {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
        {"prompt": "What is 2 + 2?", "completion": "4"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
    ],
)
def test_every_form_of_a_conversation_is_read(tmp_path, line):
    [record] = data.conversations(file(tmp_path, line)).good
    assert [dict(message) for message in record.messages] == [QUESTION, ANSWER]
    assert record.number == 1


def test_alpaca_input_follows_the_instruction(tmp_path):
    [record] = data.conversations(file(tmp_path, {"instruction": "Add.", "input": "2 and 2", "output": "4"})).good
    assert record.messages[0]["content"] == "Add.\n\n2 and 2"


def test_tools_are_kept(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    [record] = data.conversations(file(tmp_path, {"messages": [QUESTION, ANSWER], "tools": [tool]})).good
    assert [each.name for each in record.tools.allowed] == ["add"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "no JSON"),
        ({}, "keys none"),
        ({"text": "a"}, "keys text"),
        ({"messages": "a"}, "no list"),
        ({"messages": []}, ""),
        ({"messages": [QUESTION]}, "no answer"),
        ({"messages": [{"role": "robot", "content": "a"}, ANSWER]}, "role"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]"),
        ({"conversations": [{"from": "parrot", "value": "a"}]}, "parrot"),
        ({"instruction": 3, "output": "4"}, "instruction"),
        ({"prompt": 3, "completion": "4"}, "prompt"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path, line, reason):
    good = {"messages": [QUESTION, ANSWER]}
    records = data.conversations(file(tmp_path, good, "", line, good))
    assert [record.number for record in records.good] == [1, 4]
    [bad] = records.bad
    assert bad.number == 3 and reason in bad.reason and str(bad).startswith("line 3: ")


def test_a_file_without_a_usable_line_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match=r"no usable line.*line 1"):
        data.conversations(file(tmp_path, {"text": "a"}))
    with pytest.raises(InvalidRequest, match="no usable line"):
        data.conversations(file(tmp_path, ""))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(NotFound):
        data.conversations(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidRequest, match="ends with"):
        data.conversations(file(tmp_path, {}, name="data.csv"))
    broken = tmp_path / "data.jsonl.xz"
    broken.write_bytes(lzma.compress(b'{"prompt": "a", "completion": "b"}\n' * 100)[:-20])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        data.conversations(broken)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "\xe4"}')
    with pytest.raises(InvalidRequest, match="UTF-8"):
        data.conversations(latin)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, {"role": "assistant", "content": "5"}]},
    ],
)
def test_every_form_of_a_preference_is_read(tmp_path, line):
    [record] = data.preferences(file(tmp_path, line)).good
    assert (record.prompt, record.chosen, record.rejected) == ((QUESTION,), "4", "5")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "keys prompt, chosen"),
        ({"prompt": "a", "chosen": [QUESTION], "rejected": "c"}, "chosen"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
    ],
)
def test_a_bad_preference_is_named_with_its_reason(tmp_path, line, reason):
    records = data.preferences(file(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, line))
    assert [(bad.number, reason in bad.reason) for bad in records.bad] == [(2, True)]
