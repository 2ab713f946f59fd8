"""One question, one answer, no session: for pipes and scripts.

Standard output gets the answer and nothing else.
"""

from __future__ import annotations

import json
import sys

from moesaic.console.conversation import Conversation, Turn
from moesaic.console.visible import visible
from moesaic.errors import InvalidRequest

LONGEST = 64 << 20
"""Bytes of input that are read at most; no context holds as many."""


def read_input() -> str:
    """Return all of standard input, without the newline at its end.

    Raises:
        InvalidRequest: there is none, too much, or it is no UTF-8.
    """
    data = sys.stdin.buffer.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise InvalidRequest(f"standard input has more than {LONGEST} bytes, which no context holds")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise InvalidRequest("standard input is empty: there is nothing to answer")
    return text.removesuffix("\n").removesuffix("\r")


def answer(conversation: Conversation, text: str, *, as_json: bool = False, stats: bool = False) -> None:
    """Write the answer to ``text`` as it comes, or as one JSON object.

    Args:
        conversation: where it is asked.
        text: the question.
        as_json: one object with text, reason, tokens, seconds, ...
        stats: tokens, tokens/s and time to first token, on standard error.

    Raises:
        MoesaicError: it cannot be asked, or the answer failed.
    """
    with conversation.ask(text) as turn:
        if as_json:
            for _ in turn:
                pass
            print(_object(turn), flush=True)
        else:
            _stream(turn)
    if stats:
        print(turn.statistics, file=sys.stderr)


def _stream(turn: Turn) -> None:
    terminal = sys.stdout.isatty()
    try:
        for piece in turn:
            sys.stdout.write(visible(piece) if terminal else piece)
            sys.stdout.flush()
    finally:
        if not turn.text.endswith("\n"):
            print(flush=True)


def _object(turn: Turn) -> str:
    statistics = turn.statistics
    return json.dumps(
        {
            "text": turn.text,
            "reason": statistics.reason,
            "tokens": statistics.tokens,
            "prompt_tokens": statistics.prompt_tokens,
            "seconds": round(statistics.seconds, 6),
            "first_token_seconds": None if statistics.first is None else round(statistics.first, 6),
            "tokens_per_second": round(statistics.tokens_per_second, 3),
        },
        ensure_ascii=sys.stdout.isatty(),
    )
