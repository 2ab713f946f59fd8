"""Classification of texts with models that have a sequence-classification head.

This module does not use the engine, since each text needs only one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from moesaic.errors import InvalidRequest, PromptTooLong
from moesaic.load_options import LoadOptions
from moesaic.loading import Loaded, Progress, limited_torch_threads, load_model
from moesaic.ops import Batch
from moesaic.plan import Plan, make_plan
from moesaic.text.tokenizer import Tokenizer
from moesaic.token_rows import check_ids, check_tokenizer


class Classifier:
    """A model with a sequence-classification head.

    Attributes:
        loaded: the model and the configuration of its checkpoint.
        tokenizer: the tokenizer of the checkpoint.
        labels: the names of the classes.
    """

    def __init__(self, loaded: Loaded, tokenizer: Tokenizer) -> None:
        self.loaded, self.tokenizer = loaded, tokenizer
        self.labels = loaded.model.shape.labels

    @classmethod
    def load(cls, model: str | Path, *, progress: Progress | None = None, **options: Any) -> Self:
        """Load a classifier; ``options`` are fields of ``LoadOptions``. Errors are as for ``LLM.load``."""
        return cls.from_plan(make_plan(Path(model), LoadOptions(**options)), progress=progress)

    @classmethod
    def from_plan(cls, plan: Plan, *, progress: Progress | None = None) -> Self:
        """Load the classifier of a plan."""
        path = plan.spec.path
        if not plan.labels:
            raise InvalidRequest(f"{path} has no classification head: use LLM.load")
        tokenizer = Tokenizer.open(path)
        loaded = load_model(plan, progress=progress)
        check_tokenizer(tokenizer, loaded.model.vocab_size, loaded.path)
        return cls(loaded, tokenizer)

    @torch.inference_mode()
    def classify(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return the probability of every label for each text, from the scores of the head at its last token.

        Raises:
            PromptTooLong: a text has more tokens than the model supports.
            InvalidRequest: a text is empty, or has a token that the model lacks.
        """
        prompts = [self.tokenizer.encode(text, bos=True) for text in texts]
        for ids in prompts:
            if len(ids) > self.loaded.model.max_length:
                raise PromptTooLong(len(ids), self.loaded.model.max_length, answer=0)
            if not ids:
                raise InvalidRequest("the text to classify is empty")
            check_ids("input", ids, self.tokenizer, self.loaded.model.vocab_size)
        with limited_torch_threads(self.loaded.model):
            return [self._scores(ids) for ids in prompts]

    def _scores(self, ids: list[int]) -> dict[str, float]:
        model = self.loaded.model
        device = next(model.parameters()).device
        hidden = model(Batch.whole([ids], device))
        probabilities = model.logits(hidden[-1:]).softmax(-1)[0].tolist()
        return dict(zip(self.labels, probabilities, strict=True))
