"""Conversion between generation requests and the parameters of jobs in the protocol of the AIME API server.

``generation_request`` converts the parameters that AIME API clients send to the gateway, and that the AIME API server
sends to Moesaic's workers. ``parameters_for`` converts a request of the gateway into parameters for AIME API workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.backend import GenerationRequest
from moesaic.cluster.aime.settings import Definition
from moesaic.errors import InvalidMessages, InvalidParameter, InvalidRequest

TURN_SEPARATOR = "\n\n"
"""Text that joins consecutive turns of the same role when they are merged."""
MIN_TEMPERATURE = 0.01
"""Replaces temperature 0 in requests to AIME API workers: 0 crashes a worker that runs several jobs at once."""
SUPPORTED_SAMPLING = ("temperature", "top_k", "top_p", "max_tokens")
"""Fields of ``moesaic.Sampling`` that AIME API workers know."""
NEUTRAL: Mapping[str, Any] = {"n": 1, "repetition_penalty": 1, "typical_p": 1}
"""Values of other sampling fields that have no effect, so that a request may contain them."""
IGNORED = ("seed",)
"""Fields that AIME API workers do not support and that may be dropped: the gateway gives every job a seed."""


def generation_request(values: Mapping[str, Any], model: str) -> GenerationRequest:
    """Return the generation request for a job's parameters in the protocol of the AIME API server.

    If the last turn of a conversation is the assistant's, the model continues it. ``top_p`` 0 and ``top_k`` 0 disable
    these filters, as in AIME API workers. Temperature 0 selects the most likely token.

    Raises:
        InvalidRequest: the request has no content, or the conversation is invalid.
    """
    context, last = values.get("chat_context") or [], values.get("prompt_input") or ""
    text = values.get("text_context") or ""
    if not (isinstance(last, str) and isinstance(text, str)):
        raise InvalidParameter("prompt_input", "this field and text_context must be strings")
    sampling = _sampling(values)
    if text:
        if context or last:
            raise InvalidParameter("text_context", "excludes chat_context and prompt_input: send one of them")
        return GenerationRequest(model=model, prompt=text, sampling=sampling)
    if not isinstance(context, list):
        raise InvalidParameter("chat_context", "must be a list of objects with role and content")
    messages = merge_turns([*context, *([{"role": "user", "content": last}] if last else [])])
    return GenerationRequest(
        model=model,
        messages=tuple(messages),
        sampling=sampling,
        continue_final=messages[-1]["role"] == "assistant",
    )


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("temperature", "top_k", "top_p", "max_gen_tokens"):
        value = values.get(name, 0)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InvalidParameter(name, f"is {value!r:.40}, expected a number")
    out = {name: values[name] for name in ("temperature", "top_k") if values.get(name) is not None}
    if values.get("top_p"):
        out["top_p"] = values["top_p"]
    max_tokens = values.get("max_gen_tokens")
    if max_tokens is not None:
        if max_tokens < 1:
            raise InvalidParameter("max_gen_tokens", f"is {max_tokens}, expected at least 1")
        out["max_tokens"] = max_tokens
    return out


def merge_turns(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Return the conversation in ``messages`` as an optional system message and alternating user and assistant turns.

    Consecutive turns of the same role are merged.

    Raises:
        InvalidMessages: the conversation is empty, has other roles or contents, or does not begin with the user.
    """
    turns: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        turn = _turn(index, message)
        if turns and turns[-1]["role"] == turn["role"]:
            turns[-1]["content"] += TURN_SEPARATOR + turn["content"]
        else:
            turns.append(turn)
    dialogue = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not dialogue:
        raise InvalidMessages("there is nothing to answer: send prompt_input, or a chat_context with a user's turn")
    if any(turn["role"] == "system" for turn in dialogue):
        raise InvalidMessages("chat_context has a system message that is not at its beginning: move it there")
    if dialogue[0]["role"] != "user":
        raise InvalidMessages("chat_context must begin with the user, or with a system message and then the user")
    return turns


def _turn(index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidMessages(f"chat_context[{index}] must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise InvalidMessages(f"chat_context[{index}] has the role {role!r:.80}; expected system, user or assistant")
    if isinstance(content, list):
        content = "".join(_part(index, part) for part in content)
    if not isinstance(content, str) or message.get("tool_calls"):
        raise InvalidMessages(f"chat_context[{index}] must have text content and no tool calls")
    return {"role": role, "content": content}


def _part(index: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise InvalidMessages(f"chat_context[{index}] has a part that is not text: send only text parts")
    return text


def parameters_for(
    request: GenerationRequest, definition: Definition, text: str = "", tokens: int = 0
) -> dict[str, Any]:
    """Return the parameters with which AIME API workers run a request.

    Args:
        request: the generation request.
        definition: the endpoint that the workers serve; its defaults replace missing sampling parameters.
        text: the part of the answer that already exists; the worker continues it.
        tokens: estimated number of tokens of ``text``.

    Raises:
        InvalidRequest: AIME API workers do not support the request; the message lists the unsupported features.
    """
    _check_supported(request)
    sampling = request.sampling
    out = {parameter.name: parameter.default for parameter in definition.inputs if parameter.default is not None}
    for name in ("top_k", "top_p"):
        if sampling.get(name) is not None:
            out[name] = sampling[name]
    temperature = sampling.get("temperature", out.get("temperature"))
    if temperature is not None:
        out["temperature"] = max(MIN_TEMPERATURE, temperature)
        if temperature < MIN_TEMPERATURE:
            out["top_k"] = 1
    max_tokens = sampling.get("max_tokens") or out.get("max_gen_tokens")
    if max_tokens is not None:
        out["max_gen_tokens"] = max(1, max_tokens - tokens)
    return out | _content(request, definition, text)


def _check_supported(request: GenerationRequest) -> None:
    """Raise InvalidRequest unless AIME API workers support all features of the request."""
    others = {name: value for name, value in request.sampling.items() if name not in (*SUPPORTED_SAMPLING, *IGNORED)}
    unsupported = [name for name, value in others.items() if _has_effect(name, value)]
    features = {
        "tools": request.tools,
        "chat_template_kwargs": request.chat_template_kwargs,
        "a grammar": request.grammar,
        "a prompt of tokens": request.prompt is not None and not isinstance(request.prompt, str),
        "truncation": request.truncate,
        "special tokens in the answer": not request.skip_special,
        "a stop string in the answer": request.include_stop,
        **dict.fromkeys(unsupported, True),
    }
    if used := [name for name, is_used in features.items() if is_used]:
        raise InvalidRequest(f"this model is served by AIME API workers, which do not support {', '.join(used)}")


def _has_effect(name: str, value: Any) -> bool:
    if name in ("logprobs", "prompt_logprobs"):  # 0 requests them, too
        return value is not None
    return bool(value) and value != NEUTRAL.get(name)


def _content(request: GenerationRequest, definition: Definition, text: str) -> dict[str, Any]:
    """Return the parameters for the messages or the prompt, continued by ``text``, as the workers expect them."""
    if request.messages is None:
        if definition.parameter("text_context") is None:
            raise InvalidRequest(
                "this model is served by AIME API workers, which do not support text prompts: send a chat"
            )
        return {"text_context": f"{request.prompt}{text}", "prompt_input": ""}
    messages = merge_turns(request.messages)
    if request.continue_final != (messages[-1]["role"] == "assistant"):
        raise InvalidMessages("the last message is the assistant's: add a user message, or ask to continue it")
    if text and request.continue_final:
        messages = merge_turns([*messages[:-1], _continued(messages[-1], text)])
    elif text:
        messages.append({"role": "assistant", "content": text})
    chat = definition.parameter("chat_context")
    last = ""
    if chat is None or chat.kind == "json":  # older workers append ``prompt_input`` to the context
        last = messages.pop()["content"] if messages[-1]["role"] == "user" else ""
    return {"chat_context": messages, "prompt_input": last}


def _continued(turn: Mapping[str, str], text: str) -> dict[str, str]:
    return {"role": turn["role"], "content": turn["content"] + text}
