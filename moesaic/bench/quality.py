"""How well a model predicts a text: perplexity per token, and bits per byte.

A document is BOS, its text and EOS. It is read in windows of ``length`` tokens that do not overlap. Each token but the
document's first is predicted once, from the tokens before it in its window (Hugging Face's "perplexity of fixed-length
models" with stride = length). The first prediction of a window thus sees one token, so longer windows give a lower
perplexity: compare only numbers of one length and one tokenizer. Bits per byte (arXiv:2101.00027 §3.1) can be compared
across tokenizers.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import InvalidParameter, InvalidRequest, NotFound, NumericalError
from moesaic.loading import Loaded, limited_torch_threads
from moesaic.ops import Batch, Cache
from moesaic.text.tokenizer import Tokenizer
from moesaic.token_rows import check_ids, check_tokenizer

STEP_TOKENS = 2048
"""Maximum tokens computed at once, but at least one window; limits the memory of activations."""
LOGIT_ROWS = 256
"""Rows whose logits exist at once: 131 MB for a vocabulary of 128,000 in float32."""


@dataclass(frozen=True)
class Quality:
    """Quality of the predictions for a list of texts."""

    documents: int
    tokens: int
    """Number of predicted tokens: all but the first of each document."""
    bytes: int
    """Size of the texts in UTF-8."""
    nats: float
    """Sum of -log p over the predicted tokens."""

    @property
    def perplexity(self) -> float:
        """Exponential of the mean of -log p per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte that a code based on this model needs for the texts, including EOS."""
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def perplexity(
    loaded: Loaded,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int = 512,
    progress: Callable[[int, int], None] | None = None,
    cache: torch.dtype | None = None,
) -> Quality:
    """Return how well a model predicts ``texts``; each text is a document.

    Args:
        loaded: the model.
        tokenizer: the model's tokenizer.
        texts: the documents.
        length: tokens of a window.
        progress: called with the number of documents computed so far and the total.
        cache: data type of a key/value cache that attention reads, as in a chat; None: no cache.

    Raises:
        InvalidParameter: ``length`` is larger than the model's maximum, or less than 1.
        InvalidRequest: the texts are empty, have a token that the model lacks, or the tokenizer belongs to another
            model.
        NumericalError: the model computed NaN or infinity.
    """
    longest = loaded.model.max_length
    if not 1 <= length <= longest:
        raise InvalidParameter("length", f"is {length}, but the model was made for 1 to {longest} tokens")
    rows = loaded.model.vocab_size
    check_tokenizer(tokenizer, rows, loaded.path)
    tokens, size, nats = 0, 0, 0.0
    for done, text in enumerate(texts):
        size += len(text.encode("utf-8", "replace"))
        ids = document(tokenizer, text, rows)
        check_ids("file", ids, tokenizer, rows)
        for step in _steps(windows(ids, length)):
            with limited_torch_threads(loaded.model):
                nats += _nats(loaded, step, cache)
            tokens += sum(len(targets) for _, targets in step)
        if progress is not None:
            progress(done + 1, len(texts))
    if not tokens or not size:
        raise InvalidRequest("there is no text to predict")
    if not math.isfinite(nats):
        raise NumericalError("the model computed NaN or infinity")
    return Quality(len(texts), tokens, size, nats)


def document(tokenizer: Tokenizer, text: str, rows: int) -> list[int]:
    """Return the ids of a text between BOS and EOS, which are left out if the model, with ``rows`` ids, has none."""
    ends = sorted(token_id for token_id in tokenizer.eos_ids if token_id < rows)
    return [*tokenizer.encode(text, bos=True), *ends[:1]]


Window = tuple[list[int], list[int]]
"""Tokens that the model reads, and the token to predict after each of them."""


def windows(ids: list[int], length: int) -> Iterator[Window]:
    """Yield the windows of at most ``length`` tokens of a document with these ids."""
    for start in range(0, len(ids) - 1, length):
        targets = ids[start + 1 : start + 1 + length]
        yield ids[start : start + len(targets)], targets


def _steps(document_windows: Iterator[Window]) -> Iterator[list[Window]]:
    """Group windows into steps of at most ``STEP_TOKENS`` tokens."""
    step: list[Window] = []
    for window in document_windows:
        if step and sum(len(ids) for ids, _ in step) + len(window[0]) > STEP_TOKENS:
            yield step
            step = []
        step.append(window)
    if step:
        yield step


def _nats(loaded: Loaded, step: list[Window], cache: torch.dtype | None) -> float:
    """Return the sum of -log p over the targets of a step's windows."""
    model = loaded.model
    device = next(model.parameters()).device
    batch = Batch.whole([ids for ids, _ in step], device)
    hidden: Tensor = model(batch if cache is None else _cached(batch, model.cache_shapes, cache))
    expected = torch.tensor([token_id for _, targets in step for token_id in targets], device=device)
    parts = zip(hidden.split(LOGIT_ROWS), expected.split(LOGIT_ROWS), strict=True)
    losses = [F.cross_entropy(model.logits(rows).float(), ids, reduction="sum").double() for rows, ids in parts]
    return float(torch.stack(losses).sum())


def _cached(batch: Batch, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Batch:
    """Return ``batch`` with a cache, in which each sequence has one block."""
    size, device = max(batch.lengths), batch.tokens.device
    slots = [row * size + index for row, length in enumerate(batch.lengths) for index in range(length)]
    return replace(
        batch,
        slots=torch.tensor(slots, device=device),
        tables=torch.arange(len(batch.lengths), device=device)[:, None],
        cache=Cache.zeros(shapes, len(batch.lengths), size, dtype, device),
    )


def row(format_name: str | None, loaded: Loaded, measured: Quality, length: int) -> dict[str, Any]:
    """Return the quality and the size of a model in a format, as a dictionary for a results file.

    ``format_name`` None means the format of the checkpoint; ``length`` is the tokens of a window.
    """
    plan = loaded.plan
    return {
        "format": format_name or "as stored",
        "model_bytes": plan.weight_bytes,
        "bits_per_weight": 8 * plan.weight_bytes / plan.parameters,
        "documents": measured.documents,
        "tokens": measured.tokens,
        "bytes": measured.bytes,
        "length": length,
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
    }


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines of text: one result of ``row`` as a sentence, several as a table of differences from the first."""
    first = rows[0]
    if len(rows) == 1:
        yield f"perplexity {first['perplexity']:.4f} per token, {first['bits_per_byte']:.4f} bits per byte"
    else:
        width = max(len(entry["format"]) for entry in rows)
        yield f"{'':<{width}}  {'bits/weight':>13}  {'perplexity':>10}  {'bits/byte':>11}  {'difference':>10}"
        for entry in rows:
            numbers = (
                f"{entry['bits_per_weight']:>13.2f}  {entry['perplexity']:>10.4f}  {entry['bits_per_byte']:>11.4f}"
            )
            yield f"{entry['format']:<{width}}  {numbers}  {entry['perplexity'] / first['perplexity'] - 1:>+10.2%}"
    yield f"{first['documents']:,} documents, {first['tokens']:,} tokens, windows of {first['length']}"


def read_texts(path: Path) -> list[str]:
    """Return the documents of a file: a .txt is one; a .jsonl or .jsonl.xz has one in the "text" of each line.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: the file has another suffix or is damaged; the message has the line's number.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    try:
        if path.name.endswith(".txt"):
            return [path.read_text("utf-8-sig")]
        if path.name.endswith(".jsonl"):
            return _lines(path, path.read_text("utf-8-sig"))
        if path.name.endswith(".jsonl.xz"):
            with lzma.open(path, "rt", encoding="utf-8-sig") as file:
                return _lines(path, file.read())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    raise InvalidRequest(f"{path}: expected a .txt, .jsonl or .jsonl.xz")


def _lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidRequest(f'{path}, line {number}: expected a JSON object with a "text"') from error
        if not isinstance(texts[-1], str):
            raise InvalidRequest(f'{path}, line {number}: "text" is not a string')
    return texts
