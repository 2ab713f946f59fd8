"""Python client for Moesaic servers and other servers with an OpenAI-compatible API.

    with Client("http://127.0.0.1:8000") as client:
        print(client.chat("Tell me a story about a fox.", max_tokens=60).text)
        with client.chat("And another one.", stream=True) as stream:
            for piece in stream:
                print(piece.text, end="", flush=True)

``AsyncClient`` has the same methods for asyncio. ``requests`` builds request bodies. ``events`` and ``responses`` parse
what the server sends, and ``answers`` holds the resulting values. ``retry`` decides when to try again, ``resume``
continues a broken stream over a new connection. ``asynchronous`` and ``sync`` do the network I/O over httpx, which is
imported when a client is created; ``sync`` is generated from ``asynchronous``. This package does not import torch.
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
from moesaic.client.asynchronous import AsyncClient, AsyncStream
from moesaic.client.requests import ChatOptions, CompleteOptions, Timeouts
from moesaic.client.retry import Retries
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
