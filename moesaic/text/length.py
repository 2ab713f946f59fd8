"""The length of prompts: a bound that is checked before tokenizing, and truncation to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.errors import PromptTooLong

MAX_CHARACTERS_PER_TOKEN = 16
"""Upper bound for any text. A prompt that cannot fit is refused by its length, before it is tokenized."""

MODEL_LIMIT = -1
"""Number of tokens that stands for as many as the model supports, as in vLLM's ``truncate_prompt_tokens``."""


def check_characters(characters: int, limit: int, *, answer: int = 1) -> None:
    """Refuse a prompt that has too many characters to fit.

    Args:
        characters: the number of characters of the prompt.
        limit: the most tokens of the prompt.
        answer: the tokens of the context length that an answer needs.

    Raises:
        PromptTooLong: it has too many; the number of tokens in the error is an estimate.
    """
    if characters > MAX_CHARACTERS_PER_TOKEN * (limit + answer):
        tokens = -(-characters // MAX_CHARACTERS_PER_TOKEN)
        raise PromptTooLong(tokens, limit, answer=answer, characters=characters)


def truncate(ids: Sequence[int], count: int, bos_id: int | None) -> list[int]:
    """Return at most ``count`` token ids of a prompt: the last ones, behind its beginning-of-text token if it has one.

    The prompt is tokenized as a whole before, so the kept tokens are those that the model would have read anyway.
    """
    if len(ids) <= count:
        return list(ids)
    bos = [ids[0]] if bos_id is not None and ids[0] == bos_id else []
    return [*bos, *ids[len(ids) - count + len(bos) :]]
