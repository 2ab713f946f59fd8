"""Chat formats of Llama 3, and of Llama 3.1 to 3.3, which support tools.

The formats follow Meta's model cards and the chat templates in the checkpoints. The system turn of Llama 3.1 states a
date: ``date_string`` from the request's ``chat_template_kwargs``, or else the current date. The module ``chat_choice``
decides which format a checkpoint uses.
"""

from __future__ import annotations

import json

from moesaic.errors import InvalidParameter
from moesaic.text._turns import Variables, bos
from moesaic.text.messages import Message
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import ToolCall, Tools

DATES = "Cutting Knowledge Date: December 2023\nToday Date: {date_string}\n\n"
TOOL_PROMPT = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n"
)


def encode_llama3(
    messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None, _variables: Variables
) -> list[int]:
    """Return the token ids of a Llama 3 conversation, up to where the model continues.

    If the last message is the assistant's, the ids end with its text. Otherwise they end with the header of a new
    assistant turn.
    """
    return _encode_turns([_role_and_text(message) for message in messages], tokenizer)


def encode_llama31(
    messages: list[Message], tokenizer: Tokenizer, tools: Tools | None, variables: Variables
) -> list[int]:
    """Return the token ids of a Llama 3.1 conversation, which end like those of ``encode_llama3``.

    The system turn begins with the dates that Llama 3.1 expects. The tools are listed in the first user turn.

    Raises:
        InvalidParameter: ``date_string`` is not a text.
    """
    turns = [_role_and_text(message) for message in messages]
    system = turns.pop(0)[1] if messages[0]["role"] == "system" else ""
    if tools is not None:
        tool_list = "".join(
            json.dumps(tool.to_openai(), ensure_ascii=False, indent=4) + "\n\n" for tool in tools.offered
        )
        question = turns.pop(0)[1] if turns and turns[0][0] == "user" else ""
        turns.insert(0, ("user", TOOL_PROMPT + tool_list + question))
    date_string = variables.kwargs.get("date_string")
    if date_string is None:
        date_string = variables.now.strftime("%d %b %Y")
    if not isinstance(date_string, str):
        raise InvalidParameter("chat_template_kwargs", 'date_string must be a text such as "26 Jul 2024"')
    header = ("" if tools is None else "Environment: ipython\n") + DATES.format(date_string=date_string)
    return _encode_turns([("system", header + system), *turns], tokenizer)


def _encode_turns(turns: list[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    control = tokenizer.control
    ids = bos(tokenizer)
    for role, text in turns if turns[-1][0] == "assistant" else [*turns, ("assistant", "")]:
        ids += [control["<|start_header_id|>"], *tokenizer.encode(role), control["<|end_header_id|>"]]
        ids += [*tokenizer.encode("\n\n"), *tokenizer.encode(text), control["<|eot_id|>"]]
    return ids[:-1]  # without the last <|eot_id|> the model continues the turn


def _role_and_text(message: Message) -> tuple[str, str]:
    if message["role"] == "tool":
        return "ipython", json.dumps(message["content"], ensure_ascii=False)
    calls = [_call_text(call) for call in message.get("tool_calls", [])]
    return message["role"], "\n".join(filter(None, (message["content"].strip(), *calls)))


def _call_text(call: ToolCall) -> str:
    try:
        arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        arguments = json.dumps(call.arguments, ensure_ascii=False)
    return f'{{"name": "{call.name}", "parameters": {arguments}}}'
