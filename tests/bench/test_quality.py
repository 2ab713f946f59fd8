"""Perplexity against its definitions, computed token by token with transformers."""

import json
import lzma
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.bench import quality, windows
from moesaic.errors import InvalidParameter, InvalidRequest, MoesaicError, NotFound
from moesaic.loading import Loaded
from moesaic.text.tokenizer import Tokenizer
from tests.support.loading import load_model

TEXTS = ["Once upon a time there was a rabbit, and it had seven brothers.", "", "Grüße 🐇", "word " * 50]


@pytest.fixture(scope="module")
def loaded(talker: Path) -> Loaded:
    return load_model(talker)


@pytest.fixture(scope="module")
def tokenizer(talker: Path) -> Tokenizer:
    return Tokenizer.open(talker)


@torch.no_grad()
def naive(path: Path, tokenizer: Tokenizer, length: int) -> tuple[float, int]:
    """Return (sum of -log p, tokens): each token from those before it, back to the last multiple of ``length``."""
    model = transformers.MixtralForCausalLM.from_pretrained(path)
    nats, count = 0.0, 0
    for text in TEXTS:
        ids = [1, *tokenizer.encode(text), 2]
        for place in range(1, len(ids)):
            begin = (place - 1) // length * length
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1]
            nats -= float(logits.double().log_softmax(-1)[ids[place]])
            count += 1
    return nats, count


@pytest.mark.parametrize("length", [1, 7, 512])
def test_every_token_is_predicted_once(talker: Path, loaded: Loaded, tokenizer: Tokenizer, length: int) -> None:
    nats, count = naive(talker, tokenizer, length)
    found = quality.perplexity(loaded, tokenizer, TEXTS, length)
    assert (found.documents, found.tokens) == (4, count)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in TEXTS), rel=1e-5)


def test_grouping_of_windows_does_not_change_the_result(
    loaded: Loaded, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    whole = quality.perplexity(loaded, tokenizer, TEXTS, 7, lambda done, total: seen.append((done, total)))
    assert seen == [(14, 14)]
    monkeypatch.setattr(windows, "STEP_TOKENS", 16)
    monkeypatch.setattr(quality, "LOGIT_ROWS", 3)
    seen.clear()
    again = quality.perplexity(loaded, tokenizer, TEXTS, 7, lambda done, total: seen.append((done, total)))
    assert len(seen) > 5 and seen[-1] == (14, 14) and seen == sorted(seen)
    assert again.nats == pytest.approx(whole.nats, rel=1e-6)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3), (torch.int8, 1e-2)])
def test_cache_changes_the_result_by_its_rounding(
    loaded: Loaded, tokenizer: Tokenizer, dtype: torch.dtype, close: float
) -> None:
    whole = quality.perplexity(loaded, tokenizer, TEXTS, 20)
    found = quality.perplexity(loaded, tokenizer, TEXTS, 20, cache=dtype)
    assert found.nats == pytest.approx(whole.nats, rel=close)
    assert dtype == torch.float32 or found.nats != whole.nats


def losses(path: Path, read: list[int], counted: list[int]) -> list[float]:
    """Return -log p of the tokens of ``read`` at the places ``counted``, each after all tokens before it."""
    model = transformers.MixtralForCausalLM.from_pretrained(path)
    with torch.no_grad():
        logprobs = model(torch.tensor([read])).logits[0].double().log_softmax(-1)
    return [-float(logprobs[place - 1, read[place]]) for place in counted]


@pytest.mark.parametrize("length", [3, 8, 15])
def test_second_half_of_each_window_counts_as_in_llama_cpp(
    talker: Path, loaded: Loaded, tokenizer: Tokenizer, length: int
) -> None:
    stream = [1, *tokenizer.encode("\n\n".join(TEXTS))]
    expected = []
    for chunk in range(len(stream) // length):
        read = [1, *stream[chunk * length + 1 : (chunk + 1) * length]]
        expected += losses(talker, read, list(range(length // 2 + 1, length)))
    found = quality.perplexity(loaded, tokenizer, [*TEXTS[:-1], TEXTS[-1] + "\n"], length, convention="llama.cpp")
    assert found.tokens == len(expected) == len(stream) // length * (length - length // 2 - 1)
    assert found.nats == pytest.approx(sum(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(statistics.mean(expected)), rel=1e-4)
    error = statistics.pstdev(expected) / math.sqrt(len(expected) - 1)
    assert found.standard_error == pytest.approx(found.perplexity * error, rel=1e-4)
    text = "".join(tokenizer.bytes(token_id).decode("latin") for token_id in stream)
    assert 0 < found.bytes < len(text)


def test_standard_error_is_that_of_independent_tokens(talker: Path, loaded: Loaded, tokenizer: Tokenizer) -> None:
    read = [1, *tokenizer.encode(TEXTS[0]), 2]
    expected = losses(talker, read, list(range(1, len(read))))
    found = quality.perplexity(loaded, tokenizer, TEXTS[:1])
    error = statistics.stdev(expected) / math.sqrt(len(expected))
    assert found.standard_error == pytest.approx(found.perplexity * error, rel=1e-4)


def test_windows_of_a_vocabulary_without_bos_keep_their_first_token(
    loaded: Loaded, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "bos_id", None)
    ids = tokenizer.encode("\n\n".join(TEXTS))
    text = quality.prepare(loaded, tokenizer, TEXTS, 8, "llama.cpp")
    assert [window.ids for window in text.windows] == [ids[begin : begin + 7] for begin in range(0, len(ids) - 7, 8)]
    assert text.windows[1].targets == ids[13:16]


def test_invalid_arguments_are_refused(loaded: Loaded, tokenizer: Tokenizer) -> None:
    for length in (0, 4097):
        with pytest.raises(InvalidParameter, match="length"):
            quality.perplexity(loaded, tokenizer, TEXTS, length)
    for nothing in ([], [""]):
        with pytest.raises(InvalidRequest, match="no text"):
            quality.perplexity(loaded, tokenizer, nothing)
        with pytest.raises(InvalidRequest, match="no text"):
            quality.perplexity(loaded, tokenizer, nothing, convention="llama.cpp")
    with pytest.raises(InvalidParameter, match="at least 3"):
        quality.perplexity(loaded, tokenizer, TEXTS, 2, convention="llama.cpp")
    with pytest.raises(InvalidRequest, match="needs two windows, 1024 tokens"):
        quality.perplexity(loaded, tokenizer, TEXTS, convention="llama.cpp")
    with pytest.raises(InvalidParameter, match=r"documents or llama\.cpp"):
        quality.perplexity(loaded, tokenizer, TEXTS, convention="vllm")


def test_text_files_are_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "source": "x"}) + "\n" for text in TEXTS)
    (tmp_path / "a.txt").write_text(TEXTS[2], "utf-8")
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    assert quality.read_texts(tmp_path / "a.txt") == [TEXTS[2]]
    assert quality.read_texts(tmp_path / "a.jsonl") == quality.read_texts(tmp_path / "a.jsonl.xz") == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"x", "expected a .txt"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', "line 2"),
        ("a.jsonl", b'{"text": "x"}\n\n{', "line 3"),
        ("a.jsonl", b'["text"]', "line 1"),
        ("a.jsonl.xz", b"\xfd7zXZ", "cannot be read"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}')[:-9], "cannot be read"),
    ],
)
def test_invalid_text_files_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoesaicError, match=words):
        quality.read_texts(tmp_path / name)
    with pytest.raises(NotFound):
        quality.read_texts(tmp_path / "missing.txt")
