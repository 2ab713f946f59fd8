"""Embeddings of texts: the mean of a model's last hidden states. Chat models are not trained for it.

This module does not use the engine, since each text needs only one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moesaic.errors import InvalidRequest, PromptTooLong
from moesaic.models import Decoder
from moesaic.ops import Batch
from moesaic.text import length


def token_ids(
    model: Decoder,
    encode: Callable[[str], list[int]],
    texts: Sequence[str | Sequence[int]],
    truncate: int | None,
    bos_id: int | None,
) -> list[list[int]]:
    """Return the token ids of texts to embed.

    Args:
        model: the model that embeds them.
        encode: returns the token ids of a text.
        texts: texts or token ids.
        truncate: the number of tokens of each text that are kept, the last ones; -1: as many as the model supports.
        bos_id: the beginning-of-text token, which stays in front.

    Raises:
        InvalidRequest: a text is empty.
        PromptTooLong: a text has more tokens than the model supports.
    """
    most = model.max_length if truncate == length.MODEL_LIMIT else truncate
    prompts = []
    for text in texts:
        if isinstance(text, str) and most is None:
            length.check_characters(len(text), model.max_length, answer=0)
        ids = encode(text) if isinstance(text, str) else list(text)
        ids = ids if most is None else length.truncate(ids, most, bos_id)
        if not ids:
            raise InvalidRequest("the text to embed is empty")
        if len(ids) > model.max_length:
            raise PromptTooLong(len(ids), model.max_length, answer=0)
        prompts.append(ids)
    return prompts


@torch.inference_mode()
def vectors(model: Decoder, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return a vector of length 1 for each prompt: the mean of its last hidden states."""
    device = next(model.parameters()).device
    means = [model(Batch.whole([ids], device)).float().mean(0) for ids in prompts]
    return [(mean / mean.norm()).tolist() for mean in means]
