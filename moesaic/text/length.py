"""Limits for prompts: a check of the number of characters before tokenizing, and truncation to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.errors import PromptTooLong

MAX_CHARACTERS_PER_TOKEN = 16
"""Assumed maximum of characters per token. A prompt with too many characters for its limit of tokens is refused before
it is tokenized."""

MODEL_LIMIT = -1
"""Value of ``truncate_prompt_tokens`` that means as many tokens as the model supports, as in vLLM."""


def check_characters(characters: int, limit: int, *, answer: int = 1) -> None:
    """Raise PromptTooLong if a prompt has too many characters for its limit of tokens.

    Args:
        characters: number of characters of the prompt.
        limit: maximum number of tokens of the prompt.
        answer: number of tokens that are reserved for an answer.

    Raises:
        PromptTooLong: the prompt has too many characters; the number of tokens in the error is an estimate.
    """
    if characters > MAX_CHARACTERS_PER_TOKEN * (limit + answer):
        tokens = -(-characters // MAX_CHARACTERS_PER_TOKEN)
        raise PromptTooLong(tokens, limit, answer=answer, characters=characters)


def truncate(ids: Sequence[int], count: int, bos_id: int | None) -> list[int]:
    """Return at most ``count`` token ids of a prompt: the last ones.

    If the prompt begins with the beginning-of-text token, this token is kept as the first. The prompt is tokenized as a
    whole before, so the kept tokens are those that the model would have read anyway.
    """
    if len(ids) <= count:
        return list(ids)
    bos = [ids[0]] if bos_id is not None and ids[0] == bos_id else []
    return [*bos, *ids[len(ids) - count + len(bos) :]]
