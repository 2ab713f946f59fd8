"""Messages of OpenAI's chat completions, and the fields of a body that decide its prompt.

The routes that tokenize conversations use this module too, so that they get the same tokens as chat completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from msgspec import Meta, Struct

from moesaic.errors import InvalidMessages

ToolDefinitions = Annotated[list[dict[str, Any]], Meta(max_length=128)]


class Message(Struct):
    """One message of a conversation. ``content`` is a text or a list of parts; only text parts are supported."""

    role: Annotated[str, Meta(max_length=32)]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Meta(min_length=1, max_length=4096)]


class ConversationFields(Protocol):
    """The fields of a body that, together with its messages, decide the prompt."""

    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None
    continue_final_message: bool | None
    add_generation_prompt: bool | None
    chat_template_kwargs: dict[str, Any] | None


def conversation(messages: Sequence[Message], body: ConversationFields) -> dict[str, Any]:
    """Return the fields of ``GenerationRequest``, by name, that decide the prompt of a conversation.

    Raises:
        InvalidMessages: a message has a part that is not text.
    """
    turns = tuple(_turn(index, message) for index, message in enumerate(messages))
    continue_final = body.continue_final_message
    if continue_final is None:  # as TGI does, and vLLM without a generation prompt
        continue_final = body.add_generation_prompt is False and turns[-1]["role"] == "assistant"
    return {
        "messages": turns,
        "continue_final": continue_final,
        "tools": tuple(body.tools or ()),
        "tool_choice": body.tool_choice or ("auto" if body.tools else "none"),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "chat_template_kwargs": body.chat_template_kwargs or {},
    }


def _turn(index: int, message: Message) -> Mapping[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(_text(index, part) for part in content)
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.tool_calls:
        out |= {"tool_calls": message.tool_calls, "content": content or ""}
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.name is not None and message.role == "tool":
        out["name"] = message.name
    return out


def _text(index: int, part: Mapping[str, Any]) -> str:
    text = part.get("text")
    if (part.get("type") or "text") not in ("text", "input_text") or not isinstance(text, str):
        raise InvalidMessages(f"messages[{index}] has a part that is not text; this model supports text only")
    return text
