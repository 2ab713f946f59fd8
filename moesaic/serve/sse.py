"""Server-sent events: how events are encoded, and how an error ends a stream in OpenAI's form.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import Any

import msgspec

from moesaic.serve.endpoint import CONTEXT_LENGTH_EXCEEDED, Failure, openai_failure

MEDIA_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
"""The last event of a stream in OpenAI's form."""
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients ignore. It keeps proxies from closing a stream that is silent for a while."""


def frame(content: Any) -> bytes:
    """Return an encoded server-sent event whose data is ``content`` as JSON."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def openai_broken(failure: Failure) -> bytes:
    """Return an error, encoded as the last event of a stream in OpenAI's form. ``[DONE]`` must not follow it."""
    code = CONTEXT_LENGTH_EXCEEDED if failure.too_long else failure.status
    return frame({"error": {**openai_failure(failure)["error"], "code": code}})
