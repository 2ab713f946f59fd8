"""Tokenizers written into GGUF files: the file gives the token ids of the tokenizer that it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings

from moesaic import builtin, gguf
from moesaic.errors import TokenizerError
from moesaic.gguf import GgufFile
from moesaic.text import gguf_metadata, template
from moesaic.text.tokenizer import Tokenizer
from tests.support import checkpoints
from tests.text.test_tokenizer import MADE, SOME, TEXTS


def write(folder: Path, ends: Any = None, more: int = 0) -> Path:
    """Write the tokenizer of a folder into a GGUF file; the model has ``more`` rows than the tokenizer has tokens."""
    values = gguf_metadata.read(folder, Tokenizer.open(folder).vocab_size + more, ends)
    path = folder / "written" / "vocabulary.gguf"
    path.parent.mkdir()
    path.write_bytes(gguf.header(gguf.encode(values).values(), []))
    return path


def check_ids(one: Tokenizer, other: Tokenizer) -> None:
    @settings(max_examples=20, deadline=None)
    @given(SOME)
    def check(text: str) -> None:
        assert one.encode(text) == other.encode(text)
        assert one.encode(text, prefix=False) == other.encode(text, prefix=False)
        assert one.decode(one.encode(text)) == other.decode(other.encode(text))

    for text in TEXTS:
        assert one.encode(text) == other.encode(text), text
    check()


@pytest.mark.parametrize("name", ["v1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v2", "v3", "v7"))])
def test_published_sentencepiece_models(name, files, opened, tmp_path):
    shutil.copy(files[name], tmp_path / "tokenizer.model")
    ours, theirs = Tokenizer.open(write(tmp_path, more=3)), opened(name)
    assert (ours.bos_id, ours.eos_ids, ours.control) == (theirs.bos_id, theirs.eos_ids, theirs.control)
    assert ours.vocab_size == theirs.vocab_size + 3 and ours.is_special(theirs.vocab_size)
    check_ids(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tekken", "llama3"])
def test_published_byte_level_tokenizers(name, files, opened, tmp_path):
    target = files[name].name if name == "tekken" else "tokenizer.model"
    shutil.copy(files[name], tmp_path / target)
    ours, theirs = Tokenizer.open(write(tmp_path)), opened(name)
    assert (ours.bos_id, ours.eos_ids, ours.control) == (theirs.bos_id, theirs.eos_ids, theirs.control)
    check_ids(ours, theirs)


@pytest.fixture
def published_json(opened: Callable[[str], Tokenizer], tmp_path: Path) -> Path:
    """A folder with Mistral's first vocabulary as a tokenizer.json, in the form in which it was published."""
    ours, n, d = opened("v1"), tokenizers.normalizers, tokenizers.decoders
    made = tokenizers.Tokenizer.from_str(ours._vocabulary.core.to_str())
    made.normalizer = n.Sequence([n.Prepend("\u2581"), n.Replace(" ", "\u2581")])
    made.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tree = json.loads(made.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = {"<unk>": 0, **ours.control}
    tree["added_tokens"] = [
        {"id": token_id, "content": text, "special": True, **flags} for text, token_id in names.items()
    ]
    tree["model"]["vocab"] |= names
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    return tmp_path


def test_a_published_tokenizer_json_with_sentencepiece_tokens(published_json, opened):
    ours = Tokenizer.open(write(published_json))
    assert (ours.bos_id, ours.eos_ids, ours.control) == (1, {2}, opened("v1").control)
    check_ids(ours, opened("v1"))


def test_a_vocabulary_that_does_not_merge_every_pair_is_refused(published_json):
    path = published_json / "tokenizer.json"
    tree = json.loads(path.read_text())
    del tree["model"]["merges"][5000]
    path.write_text(json.dumps(tree))
    with pytest.raises(TokenizerError, match="it does not merge every pair of tokens that form a token"):
        write(published_json)
    tales, _ = builtin.resolve("tales")
    with pytest.raises(TokenizerError, match="it does not merge every pair of tokens that form a token"):
        gguf_metadata.read(tales, 4096, None)


@pytest.mark.parametrize(("kind", "split"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("smollm", "smollm")])
def test_byte_level_tokenizers(kind, split, tmp_path):
    made, p = MADE["llama3" if kind == "llama3" else "gpt2"](), tokenizers.pre_tokenizers
    if kind == "smollm":
        made.pre_tokenizer = p.Sequence([p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)])
    made.add_special_tokens(["<|im_end|>"])
    made.add_tokens(["plain text"])
    tree = json.loads(made.to_str())
    tree["model"]["ignore_merges"] = kind == "llama3"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    path, theirs = write(tmp_path, [1, 500]), Tokenizer.open(tmp_path)
    ours = Tokenizer.open(path)
    assert ours.control == theirs.control and ours.eos_ids == theirs.eos_ids == {1}
    with GgufFile(path) as file:
        assert file.text("tokenizer.ggml.pre") == split
        ids = [file.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")]
        assert ids == [0, 1, 500] and file.metadata["tokenizer.ggml.add_bos_token"] is False
    check_ids(ours, theirs)
    assert ours.encode("a plain text b") == theirs.encode("a plain text b")


def test_the_post_processor_says_whether_a_text_begins_with_a_token(tmp_path):
    made = MADE["llama3"]()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tree = json.loads(made.to_str())
    tree["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert Tokenizer.open(write(tmp_path)).bos_id == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tree: tree.update(normalizer={"type": "NFC"}), "it changes the text before it is split"),
        (lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True), "it changes the text before it is split"),
        (lambda tree: tree["pre_tokenizer"].update(use_regex=False), "GGUF files have no name for the rules"),
        (lambda tree: tree["model"].update(ignore_merges=True), "GGUF files have no name for the rules"),
    ],
)
def test_tokenizers_that_gguf_files_cannot_express_are_refused(change, problem, tmp_path):
    tree = json.loads(MADE["gpt2"]().to_str())
    change(tree)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(TokenizerError, match=f"cannot be written into a GGUF file: {problem}") as caught:
        write(tmp_path)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_rows_and_more_ends_than_names_are_refused(tmp_path):
    MADE["gpt2"]().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"it has \d+ tokens, but the model has only"):
        write(tmp_path, more=-1)
    with pytest.raises(TokenizerError, match="answers end at 4 tokens, but a GGUF file names 3"):
        write(tmp_path, [5, 6, 7])


def test_the_chat_template_is_written(tmp_path):
    MADE["gpt2"]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    assert template.load(write(tmp_path)) == "{{ x }}"


def test_a_folder_without_a_tokenizer_has_no_metadata(tmp_path):
    checkpoints.write(tmp_path / "model", checkpoints.config())
    assert gguf_metadata.read(tmp_path / "model", 24, None) == {}
