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
    """Return the token ids of each text to embed, after truncation.

    Args:
        model: the model that embeds them.
        encode: function that returns the token ids of a text.
        texts: the texts, each as a text or as token ids.
        truncate: number of the last tokens of each text that are kept; -1: as many as the model supports; None: all.
        bos_id: id of the beginning-of-text token, which truncation keeps in front; None: there is none.

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
    """Return an embedding for each prompt, given as token ids: its mean last hidden state, scaled to length 1."""
    device = next(model.parameters()).device
    means = [model(Batch.whole([ids], device)).float().mean(0) for ids in prompts]
    return [(mean / mean.norm()).tolist() for mean in means]
