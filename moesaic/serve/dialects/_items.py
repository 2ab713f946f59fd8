"""The items that OpenAI's Responses API is made of: how they become the turns of a conversation.

Follows https://platform.openai.com/docs/api-reference/responses. Known are messages of text, calls of functions
and their results; reasoning is passed over; all else (images, files, hosted tools, references) is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesaic.errors import InvalidMessages, InvalidParameter
from moesaic.serve.dialects import _openai as openai

TEXTS = ("input_text", "output_text", "text", "refusal")
ROLES = ("user", "assistant", "system", "developer")


def turns(items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the turns that items stand for; calls belong to the assistant's turn in front of them.

    Raises:
        InvalidMessages: an item is of a kind that cannot be read, or not what its kind says.
    """
    waiting: dict[str, Any] | None = None  # the assistant's turn, to which calls may yet be added
    for place, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input[{place}]"
        if kind == "reasoning":
            continue
        if kind == "function_call":
            waiting = waiting or {"role": "assistant", "content": ""}
            waiting["tool_calls"] = [*waiting.get("tool_calls", ()), _call(item, where)]
            continue
        if waiting:
            yield waiting
            waiting = None
        if kind == "function_call_output":
            yield {
                "role": "tool",
                "tool_call_id": _string(item, "call_id", where),
                "content": _text(item, "output", where),
            }
        elif kind == "message":
            turn = _message(item, where)
            if turn["role"] == "assistant":
                waiting = turn
            else:
                yield turn
        else:
            raise InvalidMessages(f"{where} is of type {kind!r:.40}, which is not understood here")
    if waiting:
        yield waiting


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ROLES:
        raise InvalidMessages(f"{where} has the role {role!r:.40}; it can be {', '.join(ROLES)}")
    return {"role": "system" if role == "developer" else role, "content": _text(item, "content", where)}


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = {"name": _string(item, "name", where), "arguments": _string(item, "arguments", where)}
    return {"id": _string(item, "call_id", where), "type": "function", "function": function}


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidMessages(f"{where} has no {name}, or one that is no text")
    return value


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    """Return the text of a field that may also hold parts."""
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
            raise InvalidMessages(f"{where} has a part of type {kind!r:.40}, which this model cannot read")
        texts.append(text)
    return "".join(texts)


def listed(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was given as items with ids, as they are listed later."""
    return [_listed(item) for item in as_items(given)]


def as_items(given: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return what was given as items; a text is a user's message."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _listed(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    out = {"status": "completed", **item, "type": kind}
    if not isinstance(item.get("id"), str):
        out["id"] = openai.new_id("msg" if kind == "message" else "fc", "_")
    if kind == "message" and isinstance(item.get("content"), str):
        said = "output_text" if item.get("role") == "assistant" else "input_text"
        out["content"] = [{"type": said, "text": item["content"]}]
    return out


def tools(given: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return tools as chat completions have them.

    Raises:
        InvalidParameter: one is no function.
    """
    out = []
    for place, tool in enumerate(given):
        if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            kind = tool.get("type")
            raise InvalidParameter("tools", f"tools[{place}] is of type {kind!r:.40}: expected a function with a name")
        function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
        out.append({"type": "function", "function": function})
    return tuple(out)


def tool_choice(given: str | Mapping[str, Any] | None, *, any_tools: bool) -> str | dict[str, Any]:
    """Return a choice as chat completions have it.

    Raises:
        InvalidParameter: it is of no known form.
    """
    if given is None:
        return "auto" if any_tools else "none"
    if isinstance(given, str) and given in ("none", "auto", "required"):
        return given
    if isinstance(given, str) or given.get("type") != "function" or not isinstance(given.get("name"), str):
        raise InvalidParameter("tool_choice", "expected none, auto, required, or a function's name")
    return {"type": "function", "function": {"name": given["name"]}}


def grammar(form: Mapping[str, Any] | None) -> tuple[str, Any] | None:
    """Return the grammar of ``text.format``.

    Raises:
        InvalidParameter: it is of no known form.
    """
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return "json_object", {}
    if form.get("type") == "json_schema" and isinstance(form.get("schema"), dict):
        return "json_schema", form["schema"]
    raise InvalidParameter("text.format", "expected type text, json_object, or json_schema with a schema")
