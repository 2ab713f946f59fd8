"""What OpenAI's Responses API answers: an object whole, and as the events that it grows by.

Follows https://platform.openai.com/docs/api-reference/responses-streaming: every event has a ``sequence_number``;
the last is ``response.completed``, ``response.incomplete`` or ``response.failed``, and never two of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import msgspec

from moesaic.backend import Delta, Event, Finished, PromptDone, TokenInfo
from moesaic.backend import ToolCall as ToolCall
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.endpoint import Failure

Happening = tuple[str, dict[str, Any]]
"""The kind of an event, without ``response.``, and its fields."""


class Output:
    """The items of an answer as they come. ``add`` and ``close`` yield what happens to them."""

    def __init__(self, top: int | None) -> None:
        """Begin; ``top`` is how many alternatives to each token are shown, None: not even its own probability."""
        self.items: list[dict[str, Any]] = []
        self._top = top
        self._places: dict[int, int] = {}  # a call's place among the calls, and among the items
        self._open = False  # whether the last item is
        self._marks: list[dict[str, Any]] = []  # of tokens whose text has not come yet

    def add(self, piece: Delta) -> Iterator[Happening]:
        self._marks += self._logprobs(piece.tokens)
        if piece.text:
            if not self._open or self.items[-1]["type"] != "message":
                yield from self._begin_message()
            part = self.items[-1]["content"][0]
            part["text"] += piece.text
            part["logprobs"] += self._marks
            marks, self._marks = self._marks, []
            yield "output_text.delta", self._at() | {"content_index": 0, "delta": piece.text, "logprobs": marks}
        for call in piece.calls:
            yield from self._add_call(call)

    def _logprobs(self, marks: tuple[TokenInfo, ...]) -> list[dict[str, Any]]:
        return [] if self._top is None else [openai.logprob_entry(mark, self._top) for mark in marks]

    def _at(self, index: int = -1) -> dict[str, Any]:
        index %= len(self.items)
        return {"item_id": self.items[index]["id"], "output_index": index}

    def _begin(self, item: dict[str, Any]) -> Iterator[Happening]:
        yield from self.close("completed")
        self.items.append(item)
        self._open = True
        yield "output_item.added", {"output_index": len(self.items) - 1, "item": msgspec.to_builtins(item)}

    def _begin_message(self) -> Iterator[Happening]:
        head = {"id": openai.new_id("msg", "_"), "type": "message", "status": "in_progress", "role": "assistant"}
        yield from self._begin(head | {"content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield "content_part.added", self._at() | {"content_index": 0, "part": msgspec.to_builtins(part)}
        self.items[-1]["content"].append(part)

    def _add_call(self, call: ToolCall) -> Iterator[Happening]:
        if call.index not in self._places:
            self._places[call.index] = len(self.items)
            head = {"id": openai.new_id("fc", "_"), "type": "function_call", "status": "in_progress"}
            name = {"call_id": call.id or openai.new_id("call", "_"), "name": call.name, "arguments": ""}
            yield from self._begin(head | name)
        index = self._places[call.index]
        if call.arguments:
            self.items[index]["arguments"] += call.arguments
            yield "function_call_arguments.delta", self._at(index) | {"delta": call.arguments}

    def close(self, status: str) -> Iterator[Happening]:
        """End the item that is open, if one is."""
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            yield from self._close_message(item["content"][0])
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield "function_call_arguments.done", self._at() | told
        yield "output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _close_message(self, part: dict[str, Any]) -> Iterator[Happening]:
        part["logprobs"] += self._marks
        self._marks = []
        place = self._at() | {"content_index": 0}
        yield "output_text.done", place | {"text": part["text"], "logprobs": part["logprobs"]}
        yield "content_part.done", place | {"part": part}


class Writer:
    """Turns the events of one request into a response; ``head`` is what of it is known beforehand."""

    def __init__(self, head: Mapping[str, Any], top: int | None, keep: Callable[[dict[str, Any]], None]) -> None:
        """Begin; ``keep`` is told the whole response before the client can know that it is."""
        self._head, self._keep = head, keep
        self._output = Output(top)
        self._count = 0

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        ended: Finished | None = None
        async for event in events:
            if isinstance(event, Delta):
                for _ in self._output.add(event):
                    pass
            elif isinstance(event, Finished):
                ended = event
        assert ended is not None, "an answer ended with neither Ended nor an error"
        for _ in self._output.close(status(ended)):
            pass
        return self._done(ended)

    def _done(self, ended: Finished) -> dict[str, Any]:
        response = self._response(
            status(ended),
            output=self._output.items,
            usage=usage(ended),
            completed_at=openai.now(),
            incomplete_details={"reason": "max_output_tokens"} if ended.reason == "length" else None,
        )
        self._keep(response)
        return response

    def _response(self, state: str, **more: Any) -> dict[str, Any]:
        return {**self._head, "status": state, **more}

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        async for event in events:
            if isinstance(event, PromptDone):
                yield self._begun()
            elif isinstance(event, Delta):
                for happening in self._output.add(event):
                    yield self._frame(*happening)
            else:
                for happening in self._output.close(status(event)):
                    yield self._frame(*happening)
                yield self._frame(status(event), {"response": self._done(event)})

    def _begun(self) -> bytes:
        running = {"response": self._response("in_progress")}
        return self._frame("created", running) + self._frame("in_progress", running)

    def failed(self, failure: Failure) -> bytes:
        """Return the event that says why there is no answer, or no more of one."""
        begun = b"" if self._count else self._begun()
        for _ in self._output.close("incomplete"):
            pass
        error = {"code": "rate_limit_exceeded" if failure.status == 429 else "server_error", "message": failure.message}
        response = self._response("failed", output=self._output.items, error=error)
        return begun + self._frame("failed", {"response": response})

    def _frame(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        content = {"type": f"response.{kind}", "sequence_number": self._count, **fields}
        self._count += 1
        return b"event: response.%b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(content))


def status(ended: Finished) -> str:
    """Return how an answer ended, in OpenAI's words."""
    return "incomplete" if ended.reason == "length" else "completed"


def usage(ended: Finished) -> dict[str, Any]:
    """Return what an answer cost."""
    return {
        "input_tokens": ended.prompt_tokens,
        "input_tokens_details": {"cached_tokens": ended.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": ended.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": ended.prompt_tokens + ended.generated_tokens,
    }


def broken(failure: Failure) -> bytes:
    """Return an error as an event, where there is no response that it could be told of."""
    content = {"type": "error", "code": "server_error", "message": failure.message, "param": failure.param}
    return b"event: error\ndata: " + msgspec.json.encode(content | {"sequence_number": 0}) + b"\n\n"
