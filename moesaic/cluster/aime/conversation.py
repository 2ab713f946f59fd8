"""Between AIME's parameters and what is asked of a model: a chat as ``chat_context``, and how tokens are chosen.

One reading for both sides: what clients send us, and what AIME's server hands to our workers. And the other way
round: a request of ours as the parameters that AIME's workers take, if they can do it at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.backend import GenerationRequest
from moesaic.cluster.aime.settings import Definition
from moesaic.errors import InvalidMessages, InvalidParameter, InvalidRequest

JOIN = "\n\n"
"""Between turns of one role, which become one."""
COLDEST = 0.01
"""What stands for temperature 0 where AIME's workers are asked: 0 itself ends one that does several jobs at once."""
CHOICES = ("temperature", "top_k", "top_p", "max_tokens")
"""Fields of ``moesaic.Sampling`` that AIME's workers know."""
NEUTRAL: Mapping[str, Any] = {"n": 1, "repetition_penalty": 1, "typical_p": 1}
"""Values of other fields that change nothing, where that is not nothing."""
IGNORED = ("seed",)
"""Fields that they cannot heed, and need not: a gateway gives each job a seed."""


def asked(values: Mapping[str, Any], model: str) -> GenerationRequest:
    """Return what AIME's parameters ask for.

    A conversation whose last turn is the assistant's is continued there. ``top_p`` 0 and ``top_k`` 0 are off, as at
    AIME's workers; temperature 0 takes the likeliest token.

    Raises:
        InvalidRequest: there is nothing to answer, or the conversation is none.
    """
    context, last = values.get("chat_context") or [], values.get("prompt_input") or ""
    text = values.get("text_context") or ""
    if not (isinstance(last, str) and isinstance(text, str)):
        raise InvalidParameter("prompt_input", "and text_context must be strings")
    sampling = _sampling(values)
    if text:
        if context or last:
            raise InvalidParameter("text_context", "excludes chat_context and prompt_input: send one of them")
        return GenerationRequest(model=model, prompt=text, sampling=sampling)
    if not isinstance(context, list):
        raise InvalidParameter("chat_context", "must be a list of objects with role and content")
    messages = turns([*context, *([{"role": "user", "content": last}] if last else [])])
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
    most = values.get("max_gen_tokens")
    if most is not None:
        if most < 1:
            raise InvalidParameter("max_gen_tokens", f"is {most}, expected at least 1")
        out["max_tokens"] = most
    return out


def turns(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Return a conversation with a system text first, if there is one, then user and assistant by turns.

    Turns of one role in a row become one, as everywhere here.

    Raises:
        InvalidMessages: it is empty, has other roles or contents, or does not begin with the user.
    """
    found: list[dict[str, str]] = []
    for place, message in enumerate(messages):
        turn = _turn(place, message)
        if found and found[-1]["role"] == turn["role"]:
            found[-1]["content"] += JOIN + turn["content"]
        else:
            found.append(turn)
    spoken = found[1:] if found and found[0]["role"] == "system" else found
    if not spoken:
        raise InvalidMessages("there is nothing to answer: send prompt_input, or a chat_context with a user's turn")
    if any(turn["role"] == "system" for turn in spoken):
        raise InvalidMessages("chat_context has a system text that is not at its beginning")
    if spoken[0]["role"] != "user":
        raise InvalidMessages("chat_context must begin with the user, or with a system text and then the user")
    return found


def _turn(place: int, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidMessages(f"chat_context[{place}] must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise InvalidMessages(f"chat_context[{place}] has the role {role!r:.80}; it can be system, user, assistant")
    if isinstance(content, list):
        content = "".join(_part(place, part) for part in content)
    if not isinstance(content, str) or message.get("tool_calls"):
        raise InvalidMessages(f"chat_context[{place}] has no content that is text, or calls of tools")
    return {"role": role, "content": content}


def _part(place: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise InvalidMessages(f"chat_context[{place}] has a part that is no text: models here read text only")
    return text


def parameters_for(
    request: GenerationRequest, definition: Definition, said: str = "", tokens: int = 0
) -> dict[str, Any]:
    """Return the parameters by which one of AIME's workers does this.

    Args:
        ask: what is asked.
        definition: the endpoint whose parameters they are; its defaults stand where nothing was asked for.
        said: what there is of the answer already; the worker goes on behind it.
        tokens: about how many tokens that has.

    Raises:
        InvalidRequest: such workers cannot do it; the message says what of it.
    """
    _check_able(request)
    sampling = request.sampling
    out = {each.name: each.default for each in definition.inputs if each.default is not None}
    for name in ("top_k", "top_p"):
        if sampling.get(name) is not None:
            out[name] = sampling[name]
    temperature = sampling.get("temperature", out.get("temperature"))
    if temperature is not None:
        out["temperature"] = max(COLDEST, temperature)
        if temperature < COLDEST:
            out["top_k"] = 1
    most = sampling.get("max_tokens") or out.get("max_gen_tokens")
    if most is not None:
        out["max_gen_tokens"] = max(1, most - tokens)
    return out | _content(request, definition, said)


def _check_able(request: GenerationRequest) -> None:
    """Raise unless AIME's workers can do it."""
    others = {name: value for name, value in request.sampling.items() if name not in (*CHOICES, *IGNORED)}
    strange = [name for name, value in others.items() if _changes(name, value)]
    named = {
        "tools": request.tools,
        "a grammar": request.grammar,
        "a prompt of tokens": request.prompt is not None and not isinstance(request.prompt, str),
        "truncation": request.truncate,
        "special tokens in a prompt": request.parse_special,
        "special tokens in the answer": not request.skip_special,
        **dict.fromkeys(strange, True),
    }
    if unable := [name for name, wanted in named.items() if wanted]:
        raise InvalidRequest(f"this model is served by AIME's workers, which cannot do {', '.join(unable)}")


def _changes(name: str, value: Any) -> bool:
    if name in ("logprobs", "prompt_logprobs"):  # 0 is a wish, too
        return value is not None
    return bool(value) and value != NEUTRAL.get(name)


def _content(request: GenerationRequest, definition: Definition, said: str) -> dict[str, Any]:
    """Return the conversation, or the text to be continued, as the endpoint's worker reads it."""
    if request.messages is None:
        if definition.parameter("text_context") is None:
            raise InvalidRequest("this model is served by AIME's workers, which cannot go on from a text: send a chat")
        return {"text_context": f"{request.prompt}{said}", "prompt_input": ""}
    messages = turns(request.messages)
    if request.continue_final != (messages[-1]["role"] == "assistant"):
        raise InvalidMessages("the last message is the assistant's: add a user message, or ask to continue it")
    if said:
        messages = turns([*messages[:-1], _continued(messages[-1], said)] if request.continue_final else messages)
        messages += [] if request.continue_final else [{"role": "assistant", "content": said}]
    chat = definition.parameter("chat_context")
    last = ""
    if chat is None or chat.kind == "json":  # the older kind of worker puts ``prompt_input`` behind the context
        last = messages.pop()["content"] if messages[-1]["role"] == "user" else ""
    return {"chat_context": messages, "prompt_input": last}


def _continued(turn: Mapping[str, str], said: str) -> dict[str, str]:
    return {"role": turn["role"], "content": turn["content"] + said}
