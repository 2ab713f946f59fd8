"""Input items of OpenAI's Responses API, and their conversion to the form of chat completions.

Follows https://platform.openai.com/docs/api-reference/responses. Text messages, function calls and their outputs are
supported. Reasoning items are ignored. All others (images, files, hosted tools, references) are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesaic.errors import InvalidMessages, InvalidParameter
from moesaic.serve.dialects import _openai as openai

TEXTS = ("input_text", "output_text", "text", "refusal")
ROLES = ("user", "assistant", "system", "developer")


def turns(items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the messages, as chat completions have them, for a list of input items.

    Function calls are added to the assistant's message before them.

    Raises:
        InvalidMessages: an item has an unsupported type, or lacks a field of its type.
    """
    pending: dict[str, Any] | None = None  # an assistant's turn that may still get function calls
    for index, item in enumerate(items):
        kind, where = item.get("type") or "message", f"input[{index}]"
        if kind == "reasoning":
            continue
        if kind == "function_call":
            pending = pending or {"role": "assistant", "content": ""}
            pending["tool_calls"] = [*pending.get("tool_calls", ()), _call(item, where)]
            continue
        if pending:
            yield pending
            pending = None
        if kind == "function_call_output":
            yield {
                "role": "tool",
                "tool_call_id": _string(item, "call_id", where),
                "content": _text(item, "output", where),
            }
        elif kind == "message":
            turn = _message(item, where)
            if turn["role"] == "assistant":
                pending = turn
            else:
                yield turn
        else:
            raise InvalidMessages(f"{where} has the unsupported type {kind!r:.40}")
    if pending:
        yield pending


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ROLES:
        raise InvalidMessages(f"{where} has the unknown role {role!r:.40}; expected {', '.join(ROLES)}")
    return {"role": "system" if role == "developer" else role, "content": _text(item, "content", where)}


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = {"name": _string(item, "name", where), "arguments": _string(item, "arguments", where)}
    return {"id": _string(item, "call_id", where), "type": "function", "function": function}


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidMessages(f"{where}: {name} is missing or not a string")
    return value


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    """Return the text in the field ``name`` of an item: a string, or a list of text parts, which are joined."""
    content = item.get(name)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidMessages(f"{where} has no {name}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind in TEXTS else None
        if not isinstance(text, str):
            raise InvalidMessages(f"{where} has a part of type {kind!r:.40}, which is not supported")
        texts.append(text)
    return "".join(texts)


def listed(source: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a request's ``input`` as items with ids, as ``/v1/responses/{id}/input_items`` lists them."""
    return [_listed(item) for item in as_items(source)]


def as_items(values: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return a request's ``input`` as a list of items. A string becomes one message of the user."""
    return [{"role": "user", "content": values}] if isinstance(values, str) else values


def _listed(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type") or "message"
    out = {**item, "type": kind, "status": item.get("status") or "completed"}
    if not isinstance(item.get("id"), str):
        out["id"] = openai.new_id("msg" if kind == "message" else "fc", "_")
    if kind == "message" and isinstance(item.get("content"), str):
        part_type = "output_text" if item.get("role") == "assistant" else "input_text"
        out["content"] = [{"type": part_type, "text": item["content"]}]
    return out


def tools(definitions: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Convert tool definitions of the Responses API to the form of chat completions.

    Raises:
        InvalidParameter: a tool is not a function with a name.
    """
    out = []
    for index, tool in enumerate(definitions):
        if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            kind = tool.get("type")
            raise InvalidParameter("tools", f"tools[{index}] is of type {kind!r:.40}: expected a function with a name")
        function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
        out.append({"type": "function", "function": function})
    return tuple(out)


def tool_choice(choice: str | Mapping[str, Any] | None, *, any_tools: bool) -> str | dict[str, Any]:
    """Convert ``tool_choice`` of the Responses API to the form of chat completions.

    None becomes "auto" if the request has any tools, else "none".

    Raises:
        InvalidParameter: the choice has an unknown form.
    """
    if choice is None:
        return "auto" if any_tools else "none"
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, str) or choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise InvalidParameter("tool_choice", "expected none, auto, required, or a function's name")
    return {"type": "function", "function": {"name": choice["name"]}}


def grammar(form: Mapping[str, Any] | None) -> tuple[str, Any] | None:
    """Return the grammar that ``text.format`` sets, as its kind and its value; None: it sets none.

    Raises:
        InvalidParameter: the format has an unknown form.
    """
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return "json_object", {}
    if form.get("type") == "json_schema" and isinstance(form.get("schema"), dict):
        return "json_schema", form["schema"]
    raise InvalidParameter("text.format", "expected type text, json_object, or json_schema with a schema")
