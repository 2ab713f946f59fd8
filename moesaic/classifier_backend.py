"""A backend of one classifier in this process: a ``Classifier`` that runs in a thread beside an event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from moesaic.backend import GenerationRequest, ModelInfo, ModelStats, TokenInfo
from moesaic.classifier import Classifier
from moesaic.errors import InvalidRequest
from moesaic.local_backend import in_pool
from moesaic.local_stream import LocalResponseStream


class LocalClassifierBackend:
    """A ``Backend`` for one classifier in this process."""

    def __init__(self, classifier: Classifier, name: str, aliases: Sequence[str] = ()) -> None:
        self._classifier, self._name, self._aliases = classifier, name, tuple(aliases)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moesaic-classify")

    def models(self) -> Sequence[ModelInfo]:
        shape = self._classifier.loaded.model.shape
        return [ModelInfo(self._name, self._aliases, "classify", context=shape.max_length, labels=shape.labels)]

    def stats(self) -> Mapping[str, ModelStats]:
        return {self._name: ModelStats()}

    async def generate(self, request: GenerationRequest) -> LocalResponseStream:
        raise InvalidRequest(f"{self._name} is a classifier and cannot generate text; use /v1/classify")

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        tokenizer = self._classifier.tokenizer
        ids = (
            tokenizer.encode(request.prompt, bos=request.add_bos)
            if isinstance(request.prompt, str)
            else list(request.prompt or ())
        )
        return [TokenInfo(token_id, tokenizer.piece(token_id), tokenizer.is_special(token_id)) for token_id in ids]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return self._classifier.tokenizer.decode(ids, skip_special=False)

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        raise InvalidRequest(f"{self._name} is a classifier; use a chat model for embeddings")

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return list(await in_pool(self._pool, lambda: self._classifier.classify(texts)))

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
