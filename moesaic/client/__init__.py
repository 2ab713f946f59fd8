"""Ask a Moesaic server, or another that speaks OpenAI's dialect, from Python.

    with Client("http://127.0.0.1:8000") as client:
        print(client.chat("Tell me a story about a fox.", max_tokens=60).text)
        with client.chat("And another one.", stream=True) as stream:
            for piece in stream:
                print(piece.text, end="", flush=True)

``AsyncClient`` is the same with ``await``. ``asking`` makes bodies of what is asked, ``replies`` and ``events`` read
what comes, ``answers`` are the values that come out, ``retrying`` says when to ask again, ``resuming`` keeps an answer
one answer over several connections; ``sync`` and ``asynchronous`` move the bytes, with httpx, which is imported when a
client is made. Knows the API. Does not know any model: it needs no torch.
"""

from __future__ import annotations

from moesaic.client.answers import (
    Answer,
    CallPiece,
    Embeddings,
    Model,
    Piece,
    TokenLogprob,
    Tokens,
    ToolCall,
    Usage,
)
from moesaic.client.asking import ChatOptions, CompleteOptions, Timeouts
from moesaic.client.asynchronous import AsyncClient, AsyncStream
from moesaic.client.retrying import Retries
from moesaic.client.sync import Client, Stream

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "CallPiece",
    "ChatOptions",
    "Client",
    "CompleteOptions",
    "Embeddings",
    "Model",
    "Piece",
    "Retries",
    "Stream",
    "Timeouts",
    "TokenLogprob",
    "Tokens",
    "ToolCall",
    "Usage",
]
