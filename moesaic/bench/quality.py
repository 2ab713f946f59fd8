"""How well a model predicts a text: perplexity per token, and bits per byte.

Knows texts in files, and how they are cut for a model. Does not know how the model came about.

Every document is BOS, its text, EOS. It is read in windows of ``length`` tokens that do not overlap:
each token but the document's first is predicted once, from what stands before it in its window (Hugging
Face's "perplexity of fixed-length models" with stride = length). The first of a window thus sees one
token, so a longer window gives a lower perplexity: compare only numbers of one length and one tokenizer.
Bits per byte (arXiv:2101.00027 §3.1) compare across tokenizers.
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

from moesaic import models
from moesaic.errors import InvalidParameter, InvalidRequest, NotFound, NumericalError
from moesaic.loading import Loaded
from moesaic.ops import Batch, Cache
from moesaic.text.tokenizer import Tokenizer

STEP_TOKENS = 2048
"""Tokens computed at once, at least one window; bounds the memory of activations."""
LOGIT_ROWS = 256
"""Rows whose logits exist at once; a vocabulary of 128,000 in float32 takes 131 MB for them."""


@dataclass(frozen=True)
class Quality:
    """How well texts were predicted."""

    documents: int
    tokens: int
    """Tokens predicted: all but each document's first."""
    bytes: int
    """UTF-8 bytes of the texts."""
    nats: float
    """Sum of -log p over the tokens."""

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """What coding the texts with this model would take; EOS is counted among the bits."""
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
    """Return how well the model predicts ``texts``, each a document of its own.

    Args:
        loaded: the model.
        tokenizer: its tokenizer.
        texts: documents.
        length: tokens in a window.
        progress: called with the tokenized documents computed so far and in all.
        cache: the dtype of a key/value cache that attention reads, as in a chat; None: there is none.

    Raises:
        InvalidParameter: the model was not made for windows of this length.
        InvalidRequest: there is nothing to predict.
        NumericalError: the model computed NaN or infinity.
    """
    longest = loaded.model.max_length
    if not 1 <= length <= longest:
        raise InvalidParameter("length", f"is {length}, but the model was made for 1 to {longest} tokens")
    tokens, size, nats = 0, 0, 0.0
    for done, text in enumerate(texts):
        size += len(text.encode("utf-8", "replace"))
        for steps in _steps(_windows(_document(tokenizer, text), length)):
            nats += _nats(loaded, steps, cache)
            tokens += sum(len(targets) for _, targets in steps)
        if progress is not None:
            progress(done + 1, len(texts))
    if not tokens or not size:
        raise InvalidRequest("there is no text to predict")
    if not math.isfinite(nats):
        raise NumericalError("the model computed NaN or infinity")
    return Quality(len(texts), tokens, size, nats)


def _document(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode(text, bos=True), *sorted(tokenizer.eos_ids)[:1]]


Window = tuple[list[int], list[int]]  # what the model reads, and what comes after each of it


def _windows(ids: list[int], length: int) -> Iterator[Window]:
    for begin in range(0, len(ids) - 1, length):
        targets = ids[begin + 1 : begin + 1 + length]
        yield ids[begin : begin + len(targets)], targets


def _steps(windows: Iterator[Window]) -> Iterator[list[Window]]:
    """Group windows to as many as are computed at once."""
    step: list[Window] = []
    for window in windows:
        if step and sum(len(ids) for ids, _ in step) + len(window[0]) > STEP_TOKENS:
            yield step
            step = []
        step.append(window)
    if step:
        yield step


def _nats(loaded: Loaded, windows: list[Window], cache: torch.dtype | None) -> float:
    """Return the sum of -log p of the windows' targets."""
    model = loaded.model
    device = next(model.parameters()).device
    batch = Batch.whole([ids for ids, _ in windows], device)
    hidden: Tensor = model(batch if cache is None else _cached(batch, model.cache_shapes, cache))
    wanted = torch.tensor([id for _, targets in windows for id in targets], device=device)
    parts = zip(hidden.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True)
    losses = [F.cross_entropy(model.logits(rows).float(), ids, reduction="sum").double() for rows, ids in parts]
    return float(torch.stack(losses).sum())


def _cached(batch: Batch, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Batch:
    """Return ``batch`` with a cache, in which each sequence has one block."""
    size, device = max(batch.lengths), batch.tokens.device
    slots = [s * size + place for s, length in enumerate(batch.lengths) for place in range(length)]
    return replace(
        batch,
        slots=torch.tensor(slots, device=device),
        tables=torch.arange(len(batch.lengths), device=device)[:, None],
        cache=Cache.zeros(shapes, len(batch.lengths), size, dtype, device),
    )


def row(format: str | None, loaded: Loaded, found: Quality, length: int) -> dict[str, Any]:
    """Return what was ``found`` of a model in ``format`` (None: as stored), beside how large it is."""
    size = sum(each.nbytes for each in loaded.model.parameters())
    return {
        "format": format or "as stored",
        "model_bytes": size,
        "bits_per_weight": 8 * size / models.parameters(loaded.model),
        "documents": found.documents,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "length": length,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield rows as people read them: one as two lines, several as a table beside the first."""
    first = rows[0]
    if len(rows) == 1:
        yield f"perplexity {first['perplexity']:.4f} per token, {first['bits_per_byte']:.4f} bits per byte"
    else:
        width = max(len(each["format"]) for each in rows)
        yield f"{'':<{width}}  {'bits a weight':>13}  {'perplexity':>10}  {'bits a byte':>11}  {'difference':>10}"
        for each in rows:
            numbers = f"{each['bits_per_weight']:>13.2f}  {each['perplexity']:>10.4f}  {each['bits_per_byte']:>11.4f}"
            yield f"{each['format']:<{width}}  {numbers}  {each['perplexity'] / first['perplexity'] - 1:>+10.2%}"
    yield f"{first['documents']:,} documents, {first['tokens']:,} tokens, windows of {first['length']}"


def read_texts(path: Path) -> list[str]:
    """Return the documents in a file: one in a ``.txt``, one in each line's "text" in a ``.jsonl`` or ``.jsonl.xz``.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it is of another kind, or damaged; the message names the line.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    try:
        if path.name.endswith(".txt"):
            return [path.read_text("utf-8")]
        if path.name.endswith(".jsonl"):
            return _lines(path, path.read_text("utf-8"))
        if path.name.endswith(".jsonl.xz"):
            with lzma.open(path, "rt", encoding="utf-8") as file:
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
            raise InvalidRequest(f'{path}, line {number}: "text" is no string')
    return texts
