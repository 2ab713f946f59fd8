"""Response objects of OpenAI's Responses API, complete or as a stream of events.

Follows https://platform.openai.com/docs/api-reference/responses-streaming: every event has a ``sequence_number``, and
exactly one of ``response.completed``, ``response.incomplete`` and ``response.failed`` ends the stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import msgspec

from moesaic.backend import Delta, Event, Finished, PromptDone, TokenInfo, ToolCall
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.dialects._arguments import parse
from moesaic.serve.endpoint import CONTEXT_LENGTH_EXCEEDED, Failure

OutputEvent = tuple[str, dict[str, Any]]
"""A stream event: its type without the prefix ``response.``, and its fields."""


class OutputItems:
    """The output items (messages and function calls) of an answer so far.

    ``add`` and ``close`` change the items and yield the stream events for the change.
    """

    def __init__(self, top: int | None, *, as_ids: bool = False) -> None:
        """Start without items.

        Args:
            top: number of alternatives shown for each token; None: no log-probabilities are shown.
            as_ids: whether log-probabilities name tokens ``token_id:...``.
        """
        self.items: list[dict[str, Any]] = []
        self._top, self._as_ids = top, as_ids
        self._call_items: dict[int, int] = {}  # index of a tool call -> index of its item
        self._open = False  # whether the last item is open
        self._pending_logprobs: list[dict[str, Any]] = []  # of tokens whose text was not sent yet

    def add(self, piece: Delta) -> Iterator[OutputEvent]:
        self._pending_logprobs += self._logprobs(piece.tokens)
        known = len(self._call_items)
        for call in piece.calls:
            if call.index < known:  # the text after it closes its item
                yield from self._add_call(call)
        if piece.text:
            if not self._open or self.items[-1]["type"] != "message":
                yield from self._begin_message()
            part = self.items[-1]["content"][0]
            part["text"] += piece.text
            part["logprobs"] += self._pending_logprobs
            logprobs, self._pending_logprobs = self._pending_logprobs, []
            yield "output_text.delta", self._at() | {"content_index": 0, "delta": piece.text, "logprobs": logprobs}
        for call in piece.calls:
            if call.index >= known:
                yield from self._add_call(call)

    def _logprobs(self, tokens: tuple[TokenInfo, ...]) -> list[dict[str, Any]]:
        if self._top is None:
            return []
        return [openai.token_logprob(token, self._top, as_ids=self._as_ids) for token in tokens]

    def _at(self, index: int = -1) -> dict[str, Any]:
        index %= len(self.items)
        return {"item_id": self.items[index]["id"], "output_index": index}

    def _begin(self, item: dict[str, Any]) -> Iterator[OutputEvent]:
        yield from self.close("completed")
        self.items.append(item)
        self._open = True
        yield "output_item.added", {"output_index": len(self.items) - 1, "item": msgspec.to_builtins(item)}

    def _begin_message(self) -> Iterator[OutputEvent]:
        head = {"id": openai.new_id("msg", "_"), "type": "message", "status": "in_progress", "role": "assistant"}
        yield from self._begin(head | {"content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield "content_part.added", self._at() | {"content_index": 0, "part": msgspec.to_builtins(part)}
        self.items[-1]["content"].append(part)

    def _add_call(self, call: ToolCall) -> Iterator[OutputEvent]:
        if call.index not in self._call_items:
            self._call_items[call.index] = len(self.items)
            head = {"id": openai.new_id("fc", "_"), "type": "function_call", "status": "in_progress"}
            name = {"call_id": call.id or openai.new_id("call", "_"), "name": call.name, "arguments": ""}
            yield from self._begin(head | name)
        index = self._call_items[call.index]
        if call.arguments:
            self.items[index]["arguments"] += call.arguments
            yield "function_call_arguments.delta", self._at(index) | {"delta": call.arguments}

    def close(self, status: str) -> Iterator[OutputEvent]:
        """Close the item that is still open, if any, and yield the events for that.

        A message gets ``status``. A function call is "completed" if its arguments are complete JSON, else "incomplete".
        """
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            yield from self._close_message(item["content"][0])
        else:
            item["status"] = "incomplete" if parse(item["arguments"]) is None else "completed"
            fields = {"name": item["name"], "arguments": item["arguments"]}
            yield "function_call_arguments.done", self._at() | fields
        yield "output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _close_message(self, part: dict[str, Any]) -> Iterator[OutputEvent]:
        part["logprobs"] += self._pending_logprobs
        self._pending_logprobs = []
        location = self._at() | {"content_index": 0}
        yield "output_text.done", location | {"text": part["text"], "logprobs": part["logprobs"]}
        yield "content_part.done", location | {"part": part}


class Writer:
    """Turns the events of one generation into a response object (``whole``) or into a stream (``frames``)."""

    def __init__(
        self,
        head: Mapping[str, Any],
        top: int | None,
        keep: Callable[[dict[str, Any]], None],
        *,
        as_ids: bool = False,
    ) -> None:
        """Start a response.

        Args:
            head: fields of the response object that are known before the generation.
            top: number of alternatives shown for each token; None: no log-probabilities are shown.
            keep: called with the complete response object, to store it, before the client gets it.
            as_ids: whether log-probabilities name tokens ``token_id:...``.
        """
        self._head, self._keep = head, keep
        self._output = OutputItems(top, as_ids=as_ids)
        self._count = 0

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        finished: Finished | None = None
        async for event in events:
            if isinstance(event, Delta):
                for _ in self._output.add(event):
                    pass
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None, "a stream ended with neither Finished nor an error"
        for _ in self._output.close(status(finished)):
            pass
        return self._done(finished)

    def _done(self, finished: Finished) -> dict[str, Any]:
        response = self._response(
            status(finished),
            output=self._output.items,
            usage=usage(finished),
            completed_at=openai.now(),
            incomplete_details={"reason": "max_output_tokens"} if finished.reason == "length" else None,
        )
        self._keep(response)
        return response

    def _response(self, state: str, **more: Any) -> dict[str, Any]:
        return {**self._head, "status": state, **more}

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        async for event in events:
            if isinstance(event, PromptDone):
                yield self._created()
            elif isinstance(event, Delta):
                for output_event in self._output.add(event):
                    yield self._frame(*output_event)
            else:
                for output_event in self._output.close(status(event)):
                    yield self._frame(*output_event)
                yield self._frame(status(event), {"response": self._done(event)})

    def _created(self) -> bytes:
        running = {"response": self._response("in_progress")}
        return self._frame("created", running) + self._frame("in_progress", running)

    def failed(self, failure: Failure) -> bytes:
        """Return the encoded event ``response.failed``, preceded by the opening events if none was sent yet."""
        head = b"" if self._count else self._created()
        for _ in self._output.close("incomplete"):
            pass
        code = "rate_limit_exceeded" if failure.status == 429 else _code(failure)
        error = {"code": code, "message": failure.message}
        response = self._response("failed", output=self._output.items, error=error)
        return head + self._frame("failed", {"response": response})

    def _frame(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        content = {"type": f"response.{kind}", "sequence_number": self._count, **fields}
        self._count += 1
        return b"event: response.%b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(content))


def _code(failure: Failure) -> str:
    return CONTEXT_LENGTH_EXCEEDED if failure.too_long else "server_error"


def status(finished: Finished) -> str:
    """Return the ``status`` of a response object: "incomplete" if the answer was cut off, else "completed"."""
    return "incomplete" if finished.reason == "length" else "completed"


def usage(finished: Finished) -> dict[str, Any]:
    """Return the ``usage`` object of the Responses API for an answer that has ended."""
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": finished.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.prompt_tokens + finished.generated_tokens,
    }


def stream_error(failure: Failure) -> bytes:
    """Return an error, encoded as the event ``error`` of a stream that has no response object yet."""
    content = {"type": "error", "code": _code(failure), "message": failure.message, "param": failure.param}
    return b"event: error\ndata: " + msgspec.json.encode(content | {"sequence_number": 0}) + b"\n\n"
