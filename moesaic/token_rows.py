"""Checks that a model has a row of its embedding for each token of a tokenizer.

Fine-tuned checkpoints often have one added token too many, such as a padding token that was never used. Such a model
works; only that token cannot be used. A tokenizer whose own vocabulary is larger than the model belongs to another
model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.text.tokenizer import Tokenizer

MAX_NAMED = 5
"""Maximum number of tokens without a row that the log names."""

log = logging.getLogger("moesaic.llm")


def check_tokenizer(tokenizer: Tokenizer, rows: int, path: Path) -> None:
    """Check that a model with ``rows`` tokens can read the texts of ``tokenizer``; log the added tokens that it lacks.

    Raises:
        InvalidRequest: the model lacks a token that was not added later, or the one that begins every text.
    """
    if tokenizer.vocab_size <= rows:
        return
    sizes = f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only {rows}"
    if tokenizer.base_size > rows:
        raise InvalidRequest(f"{sizes}: the tokenizer belongs to another model")
    if tokenizer.bos_id is not None and tokenizer.bos_id >= rows:
        name = tokenizer.piece(tokenizer.bos_id)
        raise InvalidRequest(f"{sizes}, and {name!r}, which begins every text, is one of those that it lacks")
    missing = [token_id for token_id in range(rows, tokenizer.vocab_size) if tokenizer.bytes(token_id)]
    names = ", ".join(f"{tokenizer.piece(token_id)!r} ({token_id})" for token_id in missing[:MAX_NAMED])
    more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    end = "; answers do not end by themselves" if tokenizer.eos_ids and min(tokenizer.eos_ids) >= rows else ""
    log.warning("%s; prompts with %s%s are refused%s", sizes, names, more, end)


def check_ids(param: str, ids: Sequence[int], tokenizer: Tokenizer, rows: int) -> None:
    """Raise InvalidParameter for ``param`` if one of ``ids`` is not in a vocabulary of ``rows`` tokens."""
    largest = max(ids, default=0)
    if largest < rows:
        return
    if tokenizer.bytes(largest):
        name = tokenizer.piece(largest)
        raise InvalidParameter(param, f"has the token {name!r} ({largest}), which this model of {rows} tokens lacks")
    raise InvalidParameter(param, f"token id {largest} is not in the vocabulary of {rows} tokens")
