"""Answer to a single message, for pipes and scripts.

Only the answer is written to standard output.
"""

from __future__ import annotations

import json
import sys

from moesaic.console.conversation import Conversation, Turn
from moesaic.console.visible import visible
from moesaic.errors import InvalidRequest

MAX_INPUT_BYTES = 64 << 20
"""Maximum size of the input in bytes, which is far more than any context length."""


def read_input() -> str:
    """Return the text on standard input, without a newline at its end.

    Raises:
        InvalidRequest: the input is empty, too long, or not UTF-8.
    """
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise InvalidRequest(f"standard input is too long: the limit is {MAX_INPUT_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8 (invalid byte at offset {error.start})") from error
    if not text.strip():
        raise InvalidRequest("standard input is empty: pipe a message into the command, or use -m TEXT")
    return text.removesuffix("\n").removesuffix("\r")


def answer(conversation: Conversation, text: str, *, as_json: bool = False, stats: bool = False) -> None:
    """Ask ``text``, and write the answer to standard output, piece by piece or as one JSON object.

    Args:
        conversation: the conversation that the question and the answer are added to.
        text: the question.
        as_json: whether to write one object with text, reason, tokens, seconds, and more.
        stats: whether to write tokens, tokens/s and the time to the first token to standard error.

    Raises:
        MoesaicError: the question is invalid, or the answer failed.
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
    first = statistics.first_token_seconds
    return json.dumps(
        {
            "text": turn.text,
            "reason": statistics.reason,
            "tokens": statistics.tokens,
            "prompt_tokens": statistics.prompt_tokens,
            "seconds": round(statistics.seconds, 6),
            "first_token_seconds": None if first is None else round(first, 6),
            "tokens_per_second": round(statistics.tokens_per_second, 3),
        },
        ensure_ascii=sys.stdout.isatty(),
    )
