"""Kullback-Leibler divergence of a model's predictions from those of a reference model, token by token.

The figures are those of llama.cpp's ``llama-perplexity --kl-divergence``, without the rounding of the reference's
log-probabilities to 16 bits. ``Reference`` keeps the hidden states of the reference model in a temporary file, not its
log-probabilities: d numbers per predicted token instead of V. Its head computes the same logits from them again. So
the two models are never in memory together, and the reference runs once for any number of models.

Legend: N predicted tokens of the text, R rows of a group, d hidden size, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.bench.estimates import Estimate, quantile
from moesaic.bench.quality import Progress, Quality, finite, predictions
from moesaic.bench.windows import Corpus
from moesaic.errors import InvalidRequest
from moesaic.formats import _threads
from moesaic.loading import Loaded, limited_torch_threads, torch_threads

ROWS = 64
"""Rows whose log-probabilities exist at once; for a vocabulary of 128,000 in float64, each tensor has 66 MB."""
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


class Reference(AbstractContextManager["Reference"]):
    """The predictions of a reference model for a text; close it to delete its temporary file.

    Attributes:
        text: the text that the model has read.
        name: the name of the model.
        format: the format of its weights.
    """

    @torch.inference_mode()
    def __init__(
        self, loaded: Loaded, text: Corpus, name: str, format_name: str | None, progress: Progress | None = None
    ) -> None:
        """Run the model over ``text``. Afterwards only its head is kept; drop ``loaded`` to free the rest.

        Args:
            loaded: the model.
            text: the windows, from ``quality.prepare`` for this model.
            name: the name of the model, for results.
            format_name: the format that its weights were loaded in; None: as stored.
            progress: as for ``quality.measure``.

        Raises:
            NumericalError: the model computed NaN or infinity.
            InvalidRequest: the folder for temporary files has no space.
        """
        self.text, self.name, self.format = text, name, format_name or "as stored"
        self._head = loaded.model.head
        self._vocab_size = loaded.model.vocab_size
        self._threads = torch_threads(loaded.model)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
        try:
            for _, hidden, _ in predictions(loaded, text, progress):
                self._dtype, self._width, self._device = hidden.dtype, hidden.shape[1], hidden.device
                self._write(finite(hidden))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Delete the temporary file."""
        self._file.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, hidden: Tensor) -> None:
        try:
            self._file.write(hidden.cpu().contiguous().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise InvalidRequest(
                f"the reference's hidden states do not fit into {tempfile.gettempdir()} ({error}): "
                "set TMPDIR to a folder with more space, or shorten the text"
            ) from error

    def logits(self, begin: int, end: int) -> Tensor:
        """Return the logits [end - begin, V] that predict the tokens ``begin`` to ``end`` of the text."""
        size = self._width * self._dtype.itemsize
        data = bytearray((end - begin) * size)
        self._file.seek(begin * size)
        self._file.readinto(data)
        hidden = torch.frombuffer(data, dtype=self._dtype).view(-1, self._width).to(self._device)
        with _threads.torch_threads(self._threads):
            scores: Tensor = self._head(hidden, torch.float32)
        return scores

    @torch.inference_mode()
    def compare(
        self, loaded: Loaded, text: Corpus, progress: Progress | None = None, cache: torch.dtype | None = None
    ) -> tuple[Quality, Divergence]:
        """Return how well a model predicts the text, and how far it is from the reference.

        Arguments are those of ``quality.measure``.

        Raises:
            NumericalError: the model computed NaN or infinity.
            InvalidRequest: the model has another vocabulary than the reference, or other tokens for the text.
        """
        if loaded.model.vocab_size != self._vocab_size:
            sizes = f"{self._vocab_size} tokens, and the model {loaded.model.vocab_size}"
            raise InvalidRequest(f"the reference has another vocabulary than the model: it has {sizes}")
        if text.windows != self.text.windows:
            raise InvalidRequest("the tokenizer of the reference makes other tokens of the text than the model's")
        parts = []
        for begin, hidden, targets in predictions(loaded, text, progress, cache):
            for first in range(0, len(hidden), ROWS):
                rows, ids = hidden[first : first + ROWS], targets[first : first + ROWS]
                expected = self.logits(begin + first, begin + first + len(rows))
                with limited_torch_threads(loaded.model):
                    parts.append(comparison(expected, loaded.model.logits(rows), ids.to(expected.device)).cpu())
        values = Values(*finite(torch.cat(parts)).unbind(1))
        return Quality.of(text, values.losses), Divergence.of(values, text)


@dataclass(frozen=True)
class Values:
    """For each predicted token, in float64 [N]."""

    divergences: Tensor
    """Divergence of the model's distribution from the reference's, in nats."""
    losses: Tensor
    """-log p of the text's token in the model."""
    reference_losses: Tensor
    """The same in the reference."""
    same_top: Tensor
    """1 if both find the same token likeliest, otherwise 0."""
    differences: Tensor
    """Probability of the text's token in the model, less that in the reference."""


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the divergence [R] of the distribution q from p in nats, for log-probabilities [R, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def comparison(expected: Tensor, found: Tensor, targets: Tensor) -> Tensor:
    """Return the columns of ``Values`` [R, 5] for the reference's logits [R, V], the model's, and the tokens [R]."""
    log_p, log_q = expected.double().log_softmax(1), found.to(expected.device).double().log_softmax(1)
    divergences = kl_divergence(log_p, log_q)
    log_p_target, log_q_target = (x.gather(1, targets[:, None])[:, 0] for x in (log_p, log_q))
    same = (log_p.argmax(1) == log_q.argmax(1)).double()
    differences = log_q_target.exp() - log_p_target.exp()
    return torch.stack([divergences, -log_q_target, -log_p_target, same, differences], 1)


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from those of a reference, over the predicted tokens of a text."""

    mean: Estimate
    """Mean divergence per token, in nats."""
    quantiles: Mapping[str, float]
    """Quantiles of the divergence of a token, by percentage."""
    maximum: float
    same_top: Estimate
    """Share of tokens at which both find the same token likeliest."""
    mean_difference: Estimate
    """Mean difference of the probability of the text's token: the model's less the reference's."""
    rms_difference: Estimate
    """Root mean square of this difference."""
    log_ratio: Estimate
    """Logarithm of the model's perplexity divided by the reference's; its error counts that both read the same text."""
    reference: Quality

    @classmethod
    def of(cls, values: Values, text: Corpus) -> Divergence:
        """Return the statistics of ``values``."""
        return cls(
            mean=Estimate.mean(values.divergences),
            quantiles={f"{100 * part:g}": quantile(values.divergences, part) for part in QUANTILES},
            maximum=float(values.divergences.max()),
            same_top=Estimate.mean(values.same_top),
            mean_difference=Estimate.mean(values.differences),
            rms_difference=Estimate.mean(values.differences.square()).root(),
            log_ratio=Estimate.mean(values.losses - values.reference_losses),
            reference=Quality.of(text, values.reference_losses),
        )

    def figures(self, name: str, format_name: str) -> dict[str, Any]:
        """Return the statistics as a dictionary for a results file; the reference has this name and format."""
        reference = {
            "model": name,
            "format": format_name,
            "perplexity": self.reference.perplexity,
            "perplexity_standard_error": self.reference.standard_error,
        }
        return {**asdict(self), "reference": reference}


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table of the divergences in ``rows``, each a row of ``quality.row`` with the key "kl_divergence"."""
    first = rows[0]["kl_divergence"]["reference"]
    error = f"{first['perplexity']:.4f} ± {first['perplexity_standard_error']:.4f}"
    yield f"KL divergence from {first['model']} in {first['format']}, perplexity {error}"
    width = max(len(entry["format"]) for entry in rows)
    names = f"{'mean':>19}  {'99 %':>9}  {'maximum':>9}  {'same top token':>17}  {'mean Δp':>17}  {'RMS Δp':>17}"
    yield f"{'':<{width}}  {names}  {'ln(perplexity ratio)':>20}"
    for entry in rows:
        d = entry["kl_divergence"]
        tail = f"{d['quantiles']['99']:>9.5f}  {d['maximum']:>9.5f}"
        shares = "  ".join(_percent(d[key]) for key in ("same_top", "mean_difference", "rms_difference"))
        numbers = f"{_number(d['mean']):>19}  {tail}  {shares}  {_number(d['log_ratio']):>20}"
        yield f"{entry['format']:<{width}}  {numbers}"


def _number(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.5f} ± {estimate['standard_error']:.5f}"


def _percent(estimate: Mapping[str, float]) -> str:
    text = f"{100 * estimate['value']:.3f} ± {100 * estimate['standard_error']:.3f} %"
    return f"{text:>17}"
