"""An answer that another worker began: what of it has been told, and what of its continuation is new.

A model goes on behind the tokens that were told (``Ask.resume``), and says the whole answer again as if it had just
drawn it; what a reader has already is left out here. Text after k tokens is a function of these tokens, so that
counting characters is enough. A worker of AIME's tells text and no tokens: such an answer is continued as text.
Knows events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, ToolCall
from moesaic.errors import InvalidRequest


@dataclass
class _Answer:
    """Of one answer, what was told, and how much of it is still to be left out."""

    begun: bool = False
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    tokens: int = 0
    characters: int = 0
    calls: dict[int, int] = field(default_factory=dict)  # place -> characters of arguments


class Told:
    """What has been told of a request's answers."""

    def __init__(self, log: Iterable[Event]) -> None:
        self._answers: dict[int, _Answer] = {}
        for event in log:
            answer = self._of(event)
            if isinstance(event, PromptDone):
                answer.begun = True
            elif isinstance(event, Finished):
                answer.ended = True
            else:
                answer.ids += [token.id for token in event.tokens]
                answer.text += event.text
                for call in event.calls:
                    answer.calls[call.index] = answer.calls.get(call.index, 0) + len(call.arguments)
        for answer in self._answers.values():
            answer.tokens, answer.characters = len(answer.ids), len(answer.text)

    def _of(self, event: Event) -> _Answer:
        return self._answers.setdefault(event.index, _Answer())

    def ended(self, count: int) -> bool:
        """Return whether all of so many answers have ended."""
        return sum(answer.ended for answer in self._answers.values()) >= count

    def asked(self, request: GenerationRequest) -> GenerationRequest:
        """Return what to ask so that the answer goes on behind what was told.

        Raises:
            InvalidRequest: text was told without its tokens, and behind it nothing can be asked for.
        """
        first = self._answers.get(0, _Answer())
        if not first.text or first.ids:
            return replace(request, resume=self.resume())
        first.characters = 0  # what comes is new, all of it
        if isinstance(request.prompt, str):
            return replace(request, prompt=request.prompt + first.text)
        if request.messages is None or len(self._answers) > 1:
            raise InvalidRequest("the worker that began this answer told no tokens, and was lost: ask again")
        last = request.messages[-1]
        if request.continue_final:
            joined = {**last, "content": f"{last.get('content', '')}{first.text}"}
            return replace(request, messages=(*request.messages[:-1], joined))
        return replace(
            request, messages=(*request.messages, {"role": "assistant", "content": first.text}), continue_final=True
        )

    def resume(self) -> tuple[tuple[int, ...], ...]:
        """Return the tokens that were told, for ``Ask.resume``."""
        if not any(answer.ids for answer in self._answers.values()):
            return ()
        nothing = _Answer()
        return tuple(tuple(self._answers.get(index, nothing).ids) for index in range(1 + max(self._answers)))

    def fresh(self, event: Event) -> Event | None:
        """Return what of an event is new; None: nothing."""
        answer = self._of(event)
        if answer.ended:
            return None
        if isinstance(event, PromptDone):
            return None if answer.begun else event
        if isinstance(event, Finished) or not (answer.tokens or answer.characters or answer.calls):
            return event
        tokens = event.tokens[answer.tokens :]
        answer.tokens -= len(event.tokens) - len(tokens)
        text = event.text[answer.characters :]
        answer.characters -= len(event.text) - len(text)
        calls = tuple(fresh for call in event.calls if (fresh := _fresh_call(call, answer.calls)) is not None)
        return Delta(event.index, text, tokens, calls) if text or tokens or calls else None


def _fresh_call(call: ToolCall, told: dict[int, int]) -> ToolCall | None:
    if call.index not in told:
        return call
    arguments = call.arguments[told[call.index] :]
    told[call.index] -= len(call.arguments) - len(arguments)
    return replace(call, id="", name="", arguments=arguments) if arguments else None
