"""Continuation of an answer that a lost worker began. The part of it that readers already have is not sent again.

The model continues behind the known tokens (``GenerationRequest.resume``) and repeats the whole answer. The text up to
a token is a function of the tokens up to it, so counting tokens and characters is enough. AIME API workers report text
without tokens; such an answer is continued from its text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, ToolCall
from moesaic.errors import InvalidRequest


@dataclass
class _AnswerReplay:
    """The part of one answer that readers have, and how much of the model's repetition of it is still to be dropped."""

    prompt_done: bool = False
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    tokens: int = 0
    """Number of tokens still to be dropped."""
    characters: int = 0
    """Number of characters still to be dropped."""
    calls: dict[int, int] = field(default_factory=dict)
    """Number of characters of arguments still to be dropped, by the index of the tool call."""


class ReplayFilter:
    """Drops the events of a continued request that repeat what readers already have."""

    def __init__(self, log: Iterable[Event]) -> None:
        """Create a filter that drops events which readers already have; these are the events in ``log``."""
        self._answers: dict[int, _AnswerReplay] = {}
        for event in log:
            answer = self._answer(event)
            if isinstance(event, PromptDone):
                answer.prompt_done = True
            elif isinstance(event, Finished):
                answer.finished = True
            else:
                answer.ids += [token.id for token in event.tokens]
                answer.text += event.text
                for call in event.calls:
                    answer.calls[call.index] = answer.calls.get(call.index, 0) + len(call.arguments)
        for answer in self._answers.values():
            answer.tokens, answer.characters = len(answer.ids), len(answer.text)

    def _answer(self, event: Event) -> _AnswerReplay:
        return self._answers.setdefault(event.index, _AnswerReplay())

    def all_finished(self, count: int) -> bool:
        """Return whether all ``count`` answers of the request have finished in the log."""
        return sum(answer.finished for answer in self._answers.values()) >= count

    def continued(self, request: GenerationRequest) -> GenerationRequest:
        """Return ``request``, changed so that its answers continue after the log.

        Raises:
            InvalidRequest: the log has text without tokens, and the request cannot be continued from text.
        """
        first = self._answers.get(0, _AnswerReplay())
        if not first.text or first.ids:
            return replace(request, resume=self.resume())
        first.characters = 0  # nothing will be repeated
        if isinstance(request.prompt, str):
            return replace(request, prompt=request.prompt + first.text)
        if request.messages is None or len(self._answers) > 1:
            raise InvalidRequest(
                "the worker of this answer was lost, and the answer cannot be continued: send the request again"
            )
        last = request.messages[-1]
        if request.continue_final:
            joined = {**last, "content": f"{last.get('content', '')}{first.text}"}
            return replace(request, messages=(*request.messages[:-1], joined))
        return replace(
            request, messages=(*request.messages, {"role": "assistant", "content": first.text}), continue_final=True
        )

    def resume(self) -> tuple[tuple[int, ...], ...]:
        """Return the token ids in the log for each answer, for ``GenerationRequest.resume``."""
        if not any(answer.ids for answer in self._answers.values()):
            return ()
        empty = _AnswerReplay()
        return tuple(tuple(self._answers.get(index, empty).ids) for index in range(1 + max(self._answers)))

    def fresh(self, event: Event) -> Event | None:
        """Return the part of an event that readers do not have yet; None if they have all of it."""
        answer = self._answer(event)
        if answer.finished:
            return None
        if isinstance(event, PromptDone):
            return None if answer.prompt_done else event
        if isinstance(event, Finished) or not (answer.tokens or answer.characters or answer.calls):
            return event
        tokens = event.tokens[answer.tokens :]
        answer.tokens -= len(event.tokens) - len(tokens)
        text = event.text[answer.characters :]
        answer.characters -= len(event.text) - len(text)
        calls = tuple(fresh for call in event.calls if (fresh := _fresh_call(call, answer.calls)) is not None)
        return Delta(event.index, text, tokens, calls) if text or tokens or calls else None


def _fresh_call(call: ToolCall, known: dict[int, int]) -> ToolCall | None:
    if call.index not in known:
        return call
    arguments = call.arguments[known[call.index] :]
    known[call.index] -= len(call.arguments) - len(arguments)
    return msgspec.structs.replace(call, id="", name="", arguments=arguments) if arguments else None
