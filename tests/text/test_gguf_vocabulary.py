"""Vocabularies in GGUF files, compared with the tokenizers that they were made from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import pre_tokenizers

from moesaic.errors import CheckpointError, TokenizerError
from moesaic.gguf import GgufFile
from moesaic.text import template
from moesaic.text._vocabulary import byte_alphabet, merges
from moesaic.text.tokenizer import Tokenizer
from tests.support import gguf_files
from tests.text.test_tokenizer import SOME, TEXTS

SENTENCEPIECE = ("v1", "v2", "v3", "v7")
BYTE_LEVEL = ("tekken", "llama3")
SPLITS = {"tekken": "tekken", "llama3": "llama-bpe"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ALPHABET = byte_alphabet()
Write = Callable[..., Path]


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id or 0,
        "tokenizer.ggml.eos_token_id": min(tokenizer.eos_ids),
    }


def sentencepiece_metadata(file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what llama.cpp's converter writes for a SentencePiece model."""
    model = ModelProto.FromString(file.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        **special_ids(tokenizer),
    }


def byte_level_metadata(tokenizer: Tokenizer, split: str) -> dict[str, Any]:
    """Return what llama.cpp's converter writes for a vocabulary of ranked bytes."""
    names = {token_id: name for name, token_id in tokenizer.control.items()}
    texts = {
        i: "".join(ALPHABET[byte] for byte in tokenizer.bytes(i)) for i in range(tokenizer.vocab_size) if i not in names
    }
    pairs = merges(texts.values(), set(texts.values()))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": [names.get(i) or texts[i] for i in range(tokenizer.vocab_size)],
        "tokenizer.ggml.token_type": [CONTROL if i in names else NORMAL for i in range(tokenizer.vocab_size)],
        "tokenizer.ggml.merges": [f"{first} {second}" for first, second in pairs],
        **special_ids(tokenizer),
    }


@pytest.fixture(scope="session")
def converted(
    files: dict[str, Path], opened: Callable[[str], Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Tokenizer]:
    """Return a function that opens the GGUF file made from a published tokenizer."""

    @functools.cache
    def convert(name: str) -> Tokenizer:
        if name in SENTENCEPIECE:
            metadata = sentencepiece_metadata(files[name], opened(name))
        else:
            metadata = byte_level_metadata(opened(name), SPLITS[name])
        return Tokenizer.open(gguf_files.write(tmp_path_factory.mktemp("gguf") / f"{name}.gguf", metadata, {}))

    return convert


@pytest.mark.parametrize("name", SENTENCEPIECE + BYTE_LEVEL)
def test_a_converted_vocabulary_gives_the_same_ids(name, opened, converted):
    theirs, ours = opened(name), converted(name)
    assert ours.control == theirs.control and ours.vocab_size == theirs.vocab_size
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id, theirs.eos_ids)
    assert all(ours.bytes(i) == theirs.bytes(i) for i in range(ours.vocab_size))

    @settings(max_examples=50, deadline=None)
    @given(SOME)
    def check(text: str) -> None:
        ids = theirs.encode(text, bos=True)
        assert ours.encode(text, bos=True) == ids
        assert ours.encode(text, prefix=False) == theirs.encode(text, prefix=False)
        assert ours.encode_with_special(text) == theirs.encode_with_special(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special=False)

    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
    check()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a small vocabulary, changed by its arguments."""

    def make(kind: str = "gpt2", **changes: Any) -> Path:
        if kind == "gpt2":
            tokens = ["<end>", "<turn>", *ALPHABET, "ab", "abc", "\u0120a", "12", "<tool>", "[PAD1]"]
            kinds = [CONTROL, CONTROL, *[NORMAL] * 260, USER_DEFINED, UNUSED]
            metadata: dict[str, Any] = {"pre": "gpt-2", "merges": ["a b", "ab c", "\u0120 a", "1 2"]}
        else:
            tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
            tokens += ["\u2581", "a", "b", "ab", "\u2581ab", "<tool>", "[PAD1]"]
            kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5, USER_DEFINED, UNUSED]
            metadata = {"scores": [-float(number) for number in range(len(tokens))]}
        metadata |= {"model": kind, "tokens": tokens, "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2}
        metadata = {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None}
        return gguf_files.write(tmp_path / "vocabulary.gguf", metadata, {})

    return make


def names(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(token_id) for token_id in tokenizer.encode(text)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_added_text_is_found_before_merges_and_unused_ids_are_no_tokens(kind, write):
    tokenizer = Tokenizer.open(write(kind))
    assert [name.strip() for name in names(tokenizer, "ab<tool>ab[PAD1]")] == ["ab", "<tool>", "ab", *"[PAD1]"]
    assert not tokenizer.is_special(tokenizer.vocab_size - 2)
    assert tokenizer.is_special(tokenizer.vocab_size - 1) and tokenizer.bytes(tokenizer.vocab_size - 1) == b""
    control = "<turn>" if kind == "gpt2" else "<s>"
    assert len(tokenizer.encode(control)) > 1
    assert tokenizer.encode_with_special(control) == [tokenizer.control[control]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_added_texts_with_names_of_control_tokens_are_control_tokens(kind, write):
    tokens = Tokenizer.open(write(kind))._vocabulary.pieces
    size = len(tokens)
    path = write(kind)
    with GgufFile(path) as file:
        pieces = [piece.decode() for piece in file.texts("tokenizer.ggml.tokens", size)]
    pieces[size - 2] = "<|im_end|>"  # in the place of <tool>
    tokenizer = Tokenizer.open(write(kind, tokens=pieces))
    assert tokenizer.control["<|im_end|>"] == size - 2
    assert len(tokenizer.encode("<|im_end|>")) > 1 and tokenizer.encode_with_special("<|im_end|>") == [size - 2]


def test_the_flags_of_the_file_count(write):
    assert Tokenizer.open(write("llama")).encode("ab", bos=True) == [1, 263]
    assert Tokenizer.open(write("llama", add_bos_token=False)).encode("ab", bos=True) == [263]
    assert Tokenizer.open(write("llama", add_space_prefix=False)).encode("ab") == [262]
    assert Tokenizer.open(write("gpt2")).bos_id is None
    assert Tokenizer.open(write("gpt2", add_bos_token=True)).bos_id == 1
    assert Tokenizer.open(write("gpt2", pre="llama-bpe")).bos_id == 1


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["12", "1", " a", " ", " ", ",", ",", " ", "1"]),
        ("smollm", ["1", "2", "1", " a", " ", " ", ",", ",", " ", "1"]),
        ("default", ["12", "1", " a", " ", " ", ",", ",", " ", "1"]),
    ],
)
def test_each_split_has_its_own_ids(split, expected, write):
    assert names(Tokenizer.open(write(pre=split)), "121 a  ,, 1") == expected


def test_words_are_whole_only_where_the_split_says_so(write):
    assert names(Tokenizer.open(write(merges=None, pre="gpt-2")), "abc") == ["a", "b", "c"]
    assert names(Tokenizer.open(write(merges=None, pre="llama-bpe")), "abc") == ["abc"]


def test_a_file_of_llama_3_without_a_split_has_that_of_llama_3(write):
    tokens = ["<|begin_of_text|>", "<turn>", *ALPHABET, "ab", "abc", "\u0120a", "12", "<tool>", "[PAD1]"]
    assert names(Tokenizer.open(write(pre=None, tokens=tokens, merges=None)), "abc") == ["abc"]
    assert names(Tokenizer.open(write(pre=None, merges=None)), "abc") == ["a", "b", "c"]


def test_the_split_of_smollm_is_that_of_its_tokenizer(write):
    """SmolLM's tokenizer.json separates digits, and then splits as GPT-2 does."""
    theirs: Any = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core: Any = Tokenizer.open(write(pre="smollm"))._vocabulary.core
    for text in TEXTS:
        parts = [part for part, _ in core.pre_tokenizer.pre_tokenize_str(text)]
        assert parts == [part for part, _ in theirs.pre_tokenize_str(text)], text


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"pre": "qwen2"}, "splits text as 'qwen2', which is not known; known: llama-bpe"),
        ("gpt2", {"model": "bert"}, "has a vocabulary of kind 'bert'"),
        ("gpt2", {"model": None}, "has a vocabulary of kind None"),
        ("gpt2", {"tokens": None}, "has no vocabulary"),
        ("gpt2", {"token_type": [NORMAL]}, "has 264 tokens, but 264 scores and 1 types"),
        ("gpt2", {"token_type": [9] * 264}, r"has tokens of the unknown types \[9\]"),
        ("gpt2", {"tokens": ["a"] * 264}, "has an empty or a duplicate token"),
        ("gpt2", {"merges": ["a zz"]}, "has the merge 'a zz' of pieces that it does not have"),
        ("gpt2", {"eos_token_id": 264}, "eos_token_id is 264, but there are 264 tokens"),
        ("gpt2", {"add_bos_token": "yes"}, "add_bos_token is Text"),
        ("gpt2", {"tokens": [f"{number}" + "a" * 16_000 for number in range(264)]}, "tokens that are too long"),
        ("llama", {"scores": [1.0]}, "but 1 scores"),
        ("llama", {"scores": [float("nan")] * 266}, "a score that is not a number"),
        ("llama", {"token_type": [NORMAL] * 266}, "its vocabulary has no unknown piece"),
        ("llama", {"tokens": ["<unk>", *(f"x{number}" for number in range(265))]}, "lacks some of the 256 byte pieces"),
    ],
)
def test_vocabularies_that_are_refused(kind, changes, message, write):
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.open(write(kind, **changes))
    assert "\n" not in str(caught.value)


def test_the_chat_template_of_a_file_or_its_folder(write, tmp_path):
    with pytest.raises(template.TemplateError, match="has no chat template"):
        template.load(write())
    gguf_files.write(tmp_path / "vocabulary.gguf", {"tokenizer.chat_template": "{{ x }}"}, {})
    for path in (tmp_path, tmp_path / "vocabulary.gguf"):
        assert template.load(path) == "{{ x }}"
    (tmp_path / "chat_template.jinja").write_text("{{ own }}")
    assert template.load(tmp_path) == "{{ own }}"


def test_gguf_files_beside_another_vocabulary_do_not_count(write, tmp_path, files):
    (tmp_path / "other.gguf").write_bytes(write(chat_template=None).read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(files["v1"].read_bytes())
    assert Tokenizer.open(tmp_path).vocab_size == 32_000
    with pytest.raises(template.TemplateError, match="has no chat template"):
        template.load(tmp_path)


def test_a_folder_with_several_files_has_no_vocabulary_of_its_own(write, tmp_path):
    (tmp_path / "other.gguf").write_bytes(write().read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF models: give the path of one of other\.gguf, vocabulary"):
        Tokenizer.open(tmp_path)
