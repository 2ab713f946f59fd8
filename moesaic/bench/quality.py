"""How well a model predicts a text: perplexity per token, and bits per byte.

``windows`` describes the two conventions of what is predicted from what. Longer windows give a lower perplexity, so
compare only numbers of one convention, one length and one tokenizer. Bits per byte (arXiv:2101.00027 §3.1) can be
compared across tokenizers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.bench.estimates import Estimate
from moesaic.bench.windows import Corpus, Window, corpus
from moesaic.errors import InvalidParameter, InvalidRequest, NumericalError
from moesaic.loading import Loaded, limited_torch_threads
from moesaic.ops import Batch, Cache
from moesaic.text.tokenizer import Tokenizer
from moesaic.text_files import open_text
from moesaic.token_rows import check_tokenizer

LOGIT_ROWS = 256
"""Rows whose logits exist at once: 131 MB for a vocabulary of 128,000 in float32."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """Quality of the predictions for a list of texts."""

    documents: int
    tokens: int
    """Number of predicted tokens."""
    bytes: int
    """Size of the predicted text in UTF-8."""
    loss: Estimate
    """Mean of -log p over the predicted tokens, in nats."""

    @classmethod
    def of(cls, text: Corpus, losses: Tensor) -> Quality:
        """Return the quality of predictions with ``losses``: -log p of each predicted token of ``text``."""
        return cls(text.documents, len(losses), text.bytes, Estimate.mean(losses))

    @property
    def nats(self) -> float:
        """Sum of -log p over the predicted tokens."""
        return self.loss.value * self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean of -log p per token."""
        return self.loss.exponential().value

    @property
    def standard_error(self) -> float:
        """Standard error of the perplexity, which takes the tokens as independent, as llama.cpp does."""
        return self.loss.exponential().standard_error

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte that a code based on this model needs for the predicted text, including EOS."""
        return self.nats / math.log(2) / self.bytes


def prepare(loaded: Loaded, tokenizer: Tokenizer, texts: Sequence[str], length: int, convention: str) -> Corpus:
    """Return ``texts`` as windows for a model; ``corpus`` describes the arguments.

    Raises:
        InvalidParameter: ``length`` is larger than the model's maximum or too small, or the convention is unknown.
        InvalidRequest: the texts are empty or too short, have a token that the model lacks, or the tokenizer belongs
            to another model.
    """
    longest, rows = loaded.model.max_length, loaded.model.vocab_size
    if not 1 <= length <= longest:
        raise InvalidParameter("length", f"is {length}, but the model was made for 1 to {longest} tokens")
    check_tokenizer(tokenizer, rows, loaded.path)
    return corpus(texts, tokenizer, rows, length, convention)


@torch.inference_mode()
def measure(
    loaded: Loaded, text: Corpus, progress: Progress | None = None, cache: torch.dtype | None = None
) -> Quality:
    """Return how well a model predicts a text.

    Args:
        loaded: the model.
        text: the windows, from ``prepare`` for this model.
        progress: called with the number of windows computed so far and the total.
        cache: data type of a key/value cache that attention reads, as in a chat; None: no cache.

    Raises:
        NumericalError: the model computed NaN or infinity.
    """
    losses = []
    for _, hidden, targets in predictions(loaded, text, progress, cache):
        with limited_torch_threads(loaded.model):
            parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
            losses += [_losses(loaded.model.logits(rows), ids) for rows, ids in parts]
    return Quality.of(text, finite(torch.cat(losses)).cpu())


def perplexity(
    loaded: Loaded,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int = 512,
    progress: Progress | None = None,
    cache: torch.dtype | None = None,
    convention: str = "documents",
) -> Quality:
    """Return how well a model predicts ``texts``. Arguments and errors are those of ``prepare`` and ``measure``."""
    return measure(loaded, prepare(loaded, tokenizer, texts, length, convention), progress, cache)


def predictions(
    loaded: Loaded, text: Corpus, progress: Progress | None = None, cache: torch.dtype | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for one group of windows after another, the hidden states from which the model predicts, and the targets.

    Each item is the number of predictions before it, hidden states [R, d], and the token ids [R] to predict. Arguments
    are those of ``measure``.
    """
    begin = done = 0
    for step in text.steps():
        with limited_torch_threads(loaded.model):
            hidden, targets = _predict(loaded, step, cache)
        yield begin, hidden, targets
        begin, done = begin + len(targets), done + len(step)
        if progress is not None:
            progress(done, len(text.windows))


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return -log p of ``ids`` [R], in float64, for logits [R, V]."""
    return F.cross_entropy(logits, ids, reduction="none").double()


def finite(losses: Tensor) -> Tensor:
    """Return ``losses``; raise NumericalError if the model that they come from computed NaN or infinity."""
    if not bool(losses.isfinite().all()):
        raise NumericalError("the model computed NaN or infinity")
    return losses


def _predict(loaded: Loaded, step: list[Window], cache: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return the hidden states [R, d] that predict the targets of a step's windows, and the targets [R]."""
    model = loaded.model
    device = next(model.parameters()).device
    batch = Batch.whole([ids for ids, _ in step], device)
    hidden: Tensor = model(batch if cache is None else _cached(batch, model.cache_shapes, cache))
    ends = zip(step, batch.starts[1:], strict=True)
    rows = torch.cat([torch.arange(end - len(targets), end) for (_, targets), end in ends])
    expected = torch.tensor([token_id for _, targets in step for token_id in targets], device=device)
    return hidden if len(rows) == len(hidden) else hidden[rows.to(device)], expected


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


def row(format_name: str | None, loaded: Loaded, measured: Quality, text: Corpus) -> dict[str, Any]:
    """Return the quality and the size of a model in a format, as a dictionary for a results file.

    ``format_name`` None means the format of the checkpoint.
    """
    plan = loaded.plan
    return {
        "format": format_name or "as stored",
        "model_bytes": plan.weight_bytes,
        "bits_per_weight": 8 * plan.weight_bytes / plan.parameters,
        "documents": measured.documents,
        "tokens": measured.tokens,
        "bytes": measured.bytes,
        "convention": text.convention,
        "length": text.length,
        "perplexity": measured.perplexity,
        "perplexity_standard_error": measured.standard_error,
        "bits_per_byte": measured.bits_per_byte,
    }


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines of text: one result of ``row`` as a sentence, several as a table of differences from the first."""
    first = rows[0]
    if len(rows) == 1:
        yield f"perplexity {_with_error(first)} per token, {first['bits_per_byte']:.4f} bits per byte"
    else:
        width = max(len(entry["format"]) for entry in rows)
        yield f"{'':<{width}}  {'bits/weight':>13}  {'perplexity':>19}  {'bits/byte':>11}  {'difference':>10}"
        for entry in rows:
            numbers = f"{entry['bits_per_weight']:>13.2f}  {_with_error(entry):>19}  {entry['bits_per_byte']:>11.4f}"
            yield f"{entry['format']:<{width}}  {numbers}  {entry['perplexity'] / first['perplexity'] - 1:>+10.2%}"
    yield f"{first['documents']:,} documents, {first['tokens']:,} tokens, {_windows(first)}"


def _with_error(entry: Mapping[str, Any]) -> str:
    return f"{entry['perplexity']:.4f} ± {entry['perplexity_standard_error']:.4f}"


def _windows(entry: Mapping[str, Any]) -> str:
    half = " of which the second half counts, as llama.cpp's" if entry["convention"] == "llama.cpp" else ""
    return f"windows of {entry['length']}{half}"


def read_texts(path: Path) -> list[str]:
    """Return the documents of a file: a .txt is one; a .jsonl or .jsonl.xz has one in the "text" of each line.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: the file has another suffix or is damaged; the message has the line's number.
    """
    with open_text(path) as file:
        if path.name.endswith(".txt"):
            return [file.read()]
        if path.name.endswith((".jsonl", ".jsonl.xz")):
            return _lines(path, file)
    raise InvalidRequest(f"{path}: expected a .txt, .jsonl or .jsonl.xz")


def _lines(path: Path, lines: Iterable[str]) -> list[str]:
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidRequest(f'{path}, line {number}: expected a JSON object with a "text"') from error
        if not isinstance(texts[-1], str):
            raise InvalidRequest(f'{path}, line {number}: "text" is not a string')
    return texts
