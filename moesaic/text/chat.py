"""Built-in chat formats, which encode a conversation as token ids.

This module defines what a chat format is, lists the built-in ones, and truncates conversations to a token budget. The
text of a message never becomes a control token: control tokens are inserted as ids, and the text between them is
encoded separately. The module ``chat_choice`` decides which format a checkpoint uses.

Mistral's formats follow mistral-common for each version (``_mistral``). ``llama3`` and ``llama3.1`` follow Meta's model
cards (``_llama3``). ``aime`` follows the worker interface of the AIME API server, which uses the form of Llama 2.
ChatML, Zephyr, Vicuna, Alpaca and OpenChat put fixed texts around the messages (``_markup``). For formats without tool
support, the system prompt describes the tools and asks the model to write calls as JSON.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from moesaic.errors import InvalidMessages, InvalidRequest, NotFound, PromptTooLong
from moesaic.text import _dialogue, _llama3, _mistral, syntax, template_kwargs
from moesaic.text._markup import MARKUPS
from moesaic.text._turns import Variables, as_plain_text
from moesaic.text.grammar import Grammar
from moesaic.text.messages import Message, validate
from moesaic.text.syntax import Syntax
from moesaic.text.tagged_calls import TaggedCallParser
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tool_parser import ToolCallParser
from moesaic.text.tools import Tools

__all__ = ["FORMATS", "ChatFormat", "Message", "get_format", "truncate", "validate"]

Encoder = Callable[[list[Message], Tokenizer, Tools | None, Variables], list[int]]


@dataclass(frozen=True)
class ChatFormat:
    """Chat format: how a conversation is encoded, and which tokens or strings end an answer.

    ``build`` returns the ids of the prompt up to the start of the answer. If the last message is the assistant's, the
    ids end with the text of that message, so that the model continues it.
    """

    name: str
    build: Encoder
    required_tokens: tuple[str, ...] = ()
    """Control tokens that the tokenizer must have."""
    end_tokens: tuple[str, ...] = ()
    """Control tokens that end an answer, in addition to the tokenizer's end-of-text tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an answer, for tokenizers that lack the end token. A text that is the name of a control token of
    the tokenizer is not used."""
    strip_answer: bool = False
    """Whether white space at the beginning of an answer is removed, because it belongs to the format."""
    syntax: Syntax = syntax.PLAIN
    """Form in which the model writes tool calls."""
    native_tools: bool = False
    """Whether ``build`` writes tools and calls itself if ``syntax`` is plain JSON. If not, ``encode`` first writes them
    into the text of the messages."""
    kwargs: frozenset[str] = frozenset()
    """Names of the variables in ``chat_template_kwargs`` that this format uses."""
    loose: bool = False
    """Whether a checkpoint's template counts as equal to this format even if spaces or the position of the system
    prompt differ."""
    note: str = ""
    """One line for the user about the choice of this format for a checkpoint; empty if there is nothing to say."""

    def supports(self, tokenizer: Tokenizer) -> bool:
        """Return whether the tokenizer has the control tokens that this format requires."""
        return all(token in tokenizer.control for token in self.required_tokens)

    def tool_syntax(self, tokenizer: Tokenizer) -> Syntax:
        """Return the form of tool calls: ``syntax`` if the tokenizer has its control tokens, otherwise plain JSON."""
        native = all(token in tokenizer.control for token in self.syntax.control_tokens)
        return self.syntax if native else syntax.PLAIN

    def tool_call_parser(self, tokenizer: Tokenizer, tools: Tools) -> ToolCallParser:
        """Return a parser that finds the tool calls in one answer."""
        chosen = self.tool_syntax(tokenizer)
        return TaggedCallParser(chosen, tools) if chosen.opening else ToolCallParser(chosen, tools)

    def forced_call_grammar(self, tokenizer: Tokenizer, tools: Tools) -> Grammar:
        """Return the grammar of an answer that must be a tool call.

        Raises:
            InvalidParameter: the schemas of the tools are too long for one grammar.
        """
        return syntax.forced_grammar(self.tool_syntax(tokenizer), tools, tokenizer.control)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        continue_final: bool = False,
        tools: Tools | None = None,
        kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> list[int]:
        """Return the token ids of the prompt, from the beginning-of-text token to the start of the answer.

        Args:
            messages: the conversation.
            tokenizer: the tokenizer of the model.
            continue_final: whether the model continues the last message, which must be the assistant's. The ids then
                end with its text.
            tools: the tools that the answer may call; None: no tools.
            kwargs: the request's ``chat_template_kwargs``; names that the format does not use are logged.
            now: the local time that the prompt may contain; None: the current time.

        Raises:
            InvalidMessages: the messages are invalid (``validate``), or the last role contradicts ``continue_final``.
            InvalidParameter: ``kwargs`` are invalid (``template_kwargs.check``).
            InvalidRequest: the tokenizer lacks control tokens that this format requires.
        """
        variables = Variables(template_kwargs.check(kwargs, self.name, self.kwargs), now or datetime.now())
        turns = validate(messages)
        if not self.supports(tokenizer):
            usable = ", ".join(name for name, other in FORMATS.items() if other.supports(tokenizer))
            missing = next(token for token in self.required_tokens if token not in tokenizer.control)
            raise InvalidRequest(
                f"chat format {self.name!r} needs the token {missing}, which this tokenizer lacks; use {usable}"
            )
        ends_with_answer = turns[-1]["role"] == "assistant"
        if ends_with_answer and not continue_final:
            raise InvalidMessages("the last message is the assistant's: add a user message, or ask to continue it")
        if continue_final and not ends_with_answer:
            raise InvalidMessages("nothing to continue: the last message is not the assistant's")
        if self.tool_syntax(tokenizer) is syntax.PLAIN and not self.native_tools:
            turns, tools = as_plain_text(turns, tools), None
        return self.build(turns, tokenizer, tools, variables)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids of the tokens that end an answer, without those that only generation_config.json names."""
        return tokenizer.eos_ids | {tokenizer.control[token] for token in self.end_tokens if token in tokenizer.control}

    def stop_texts(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """Return the texts that end an answer: ``stop_strings`` without names of this tokenizer's control tokens."""
        return tuple(text for text in self.stop_strings if text not in tokenizer.control)


def truncate(
    messages: Sequence[Mapping[str, Any]], count: Callable[[list[Message]], int], budget: int
) -> tuple[list[Message], int]:
    """Remove the oldest messages, as few as possible, so that a conversation fits into ``budget`` tokens.

    A user message is removed together with the answers to it. System messages and everything from the last user message
    on are kept.

    Args:
        messages: the conversation.
        count: function that returns the number of tokens of a conversation.
        budget: maximum number of tokens.

    Returns:
        The conversation that is left, and the number of messages that were removed.

    Raises:
        InvalidMessages: the messages are invalid (``validate``).
        PromptTooLong: the messages that must be kept exceed the budget.
    """
    turns = validate(messages)
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    # A cut at the first user message removes something only if the assistant opened the conversation.
    cuts = sorted({0, *users})

    def kept(cut: int) -> list[Message]:
        return validate([turn for index, turn in enumerate(turns) if index >= cut or turn["role"] == "system"])

    best = bisect.bisect_left(cuts, True, key=lambda cut: count(kept(cut)) <= budget)
    if best == len(cuts):
        raise PromptTooLong(count(kept(cuts[-1])), budget)
    dropped = sum(turn["role"] != "system" for turn in turns[: cuts[best]])
    return kept(cuts[best]), dropped


def get_format(name: str) -> ChatFormat:
    """Return the chat format with the given name.

    Raises:
        NotFound: the name is unknown; the message lists the available formats.
    """
    if name not in FORMATS:
        raise NotFound(f"unknown chat format {name!r}; available formats: {', '.join(FORMATS)}")
    return FORMATS[name]


INST = ("[INST]", "[/INST]")
SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


def _mistral_format(
    version: int, name: str = "", more: tuple[str, ...] = (), form: Syntax = syntax.MISTRAL
) -> ChatFormat:
    build = _mistral.encoder(version)
    return ChatFormat(name or f"mistral-v{version}", build, required_tokens=(*INST, *more), syntax=form, loose=True)


FORMATS: Mapping[str, ChatFormat] = {
    form.name: form
    for form in (
        ChatFormat("mistral-v1", _mistral.encode_v1, loose=True),
        _mistral_format(2),
        _mistral_format(3),
        _mistral_format(3, "mistral-tekken"),
        _mistral_format(7, more=SYSTEM),
        _mistral_format(11, more=(*SYSTEM, "[ARGS]"), form=syntax.MISTRAL_11),
        _mistral_format(13, more=(*SYSTEM, "[ARGS]"), form=syntax.MISTRAL_13),
        ChatFormat("aime", _dialogue.encode_aime, loose=True),
        ChatFormat("llama3", _llama3.encode_llama3, required_tokens=HEADERS, end_tokens=TURN_ENDS),
        ChatFormat(
            "llama3.1",
            _llama3.encode_llama31,
            required_tokens=HEADERS,
            end_tokens=TURN_ENDS,
            syntax=syntax.LLAMA,
            kwargs=frozenset({"date_string"}),
        ),
        ChatFormat(
            "chatml",
            MARKUPS["chatml"].encode,
            end_tokens=("<|im_end|>", "<|endoftext|>"),
            stop_strings=("<|im_end|>",),
        ),
        ChatFormat("zephyr", MARKUPS["zephyr"].encode),
        ChatFormat("vicuna", MARKUPS["vicuna"].encode, strip_answer=True),
        ChatFormat("alpaca", MARKUPS["alpaca"].encode, stop_strings=("\n### Instruction:",)),
        ChatFormat(
            "openchat",
            MARKUPS["openchat"].encode,
            end_tokens=("<|end_of_turn|>",),
            stop_strings=("<|end_of_turn|>",),
            strip_answer=True,
        ),
        ChatFormat("plain", _dialogue.encode_plain, stop_strings=("\nUser:",), strip_answer=True),
    )
}
