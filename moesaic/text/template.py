"""Rendering of Jinja chat templates, a checkpoint's own or a file, in a sandboxed child process.

A template is rendered only if no built-in format equals it (``chat_choice``), or if the user asks for it. The child
limits memory, processor time and output. Jinja's sandbox gives a template no access to files or the network.

The text of a message never becomes a control token, and neither do tools and variables of a request (``_guard``).
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moesaic.errors import InvalidMessages, InvalidRequest, MalformedTemplate, NotFound, TemplateError
from moesaic.text import _gguf_vocabulary, _render
from moesaic.text._guard import Guard
from moesaic.text._turns import Variables
from moesaic.text._vocabulary import read_bounded
from moesaic.text.messages import Message, validate
from moesaic.text.tokenizer import Tokenizer, gguf_file
from moesaic.text.tools import ToolCall, Tools

MAX_TEMPLATE_CHARS = 256 << 10
OUTPUT_SPARE = 64 << 10  # maximum output is four times the input plus this number of characters
WALL_SECONDS = 10.0  # the limit on processor time applies first, unless the machine is overloaded
FILE_SUFFIXES = (".jinja", ".jinja2", ".j2")
"""Suffixes of the names of template files."""


def load(folder: Path) -> str:
    """Return the chat template of a checkpoint: a directory, or a GGUF file.

    Raises:
        TemplateError: the checkpoint has no chat template, or its file is damaged.
        TokenizerError: a file cannot be read.
    """
    template = find(folder)
    if template is None:
        raise TemplateError(folder, "has no chat template: use one of the built-in chat formats")
    return template


def find(folder: Path) -> str | None:
    """Return the chat template of a checkpoint, a directory or a GGUF file; None if it has none.

    Raises:
        TemplateError: the file of the template is damaged.
        TokenizerError: a file cannot be read.
    """
    own_file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template: Any = None
    try:
        if own_file.is_file():
            template = read_bounded(own_file).decode("utf-8-sig")
        elif config.is_file():
            template = json.loads(read_bounded(config)).get("chat_template")
    except (ValueError, AttributeError, RecursionError) as error:
        raise TemplateError(
            own_file if own_file.is_file() else config, "is damaged: it cannot be decoded; download it again"
        ) from error
    if template is None and (file := gguf_file(folder)) is not None:
        template = _gguf_vocabulary.chat_template(file)
    if isinstance(template, list):  # several templates with names
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return template if isinstance(template, str) and template.strip() else None


def load_file(path: Path) -> str:
    """Return the chat template in the file ``path``.

    Raises:
        NotFound: there is no such file.
        TemplateError: the file is no text, or empty.
        TokenizerError: the file cannot be read.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such chat template; name an existing file or a chat format")
    try:
        template = read_bounded(path).decode("utf-8-sig")
    except ValueError as error:
        raise TemplateError(path, "is not UTF-8 text") from error
    if not template.strip():
        raise TemplateError(path, "is empty")
    return template


def values(
    messages: Sequence[Mapping[str, Any]],
    *,
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the variables of a template, with the names that transformers uses.

    ``bos`` and ``eos`` are the names of the tokens that begin and end a text.
    """
    return {
        **(kwargs or {}),
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "documents": (kwargs or {}).get("documents"),
        "bos_token": bos,
        "eos_token": eos,
        "add_generation_prompt": add_generation_prompt,
    }


def special_names(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the names of the tokens that begin and end a text, as arguments of ``values``; "" if there is none."""
    names = {token_id: name for name, token_id in tokenizer.control.items()}
    return {
        "bos": "" if tokenizer.bos_id is None else names.get(tokenizer.bos_id, ""),
        "eos": names.get(min(tokenizer.eos_ids), "") if tokenizer.eos_ids else "",
    }


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    now: datetime | None = None,
    **options: Any,
) -> str:
    """Return the text that ``template`` renders for a conversation.

    Args:
        template: the source of the template.
        messages: the conversation, in the form that templates read (``template_messages``).
        now: the local time that the template may state; None: the current time.
        **options: the other arguments of ``values``.

    Raises:
        InvalidMessages: the template rejects the messages.
        TemplateError: the template is malformed, uses something that the sandbox forbids, or exceeds a limit.
    """
    [outcome] = render_all(template, [values(messages, **options)], now)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def render_all(
    template: str, renderings: Sequence[Mapping[str, Any]], now: datetime | None = None
) -> list[str | InvalidMessages | TemplateError]:
    """Render a template for several sets of variables (``values``) in one child process.

    Return, for each set, the text or the error of the template. ``now`` is the local time that the template may state.

    Raises:
        InvalidRequest: the child process cannot be started.
        TemplateError: the template is too long, or takes too much time.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError("chat template", f"longer than {MAX_TEMPLATE_CHARS} characters")
    limit = 4 * (len(template) + max(len(json.dumps(each, ensure_ascii=False)) for each in renderings)) + OUTPUT_SPARE
    stated = (now or datetime.now()).isoformat()
    outcomes = _in_child({"template": template, "values": list(renderings), "limit": limit, "now": stated})
    return [_text_or_error(outcome) for outcome in outcomes]


def _text_or_error(outcome: Mapping[str, Any]) -> str | InvalidMessages | TemplateError:
    if "text" in outcome:
        return str(outcome["text"])
    if outcome["kind"] == "refused":
        return InvalidMessages(f"the chat template rejects this conversation: {outcome['error']}")
    kind = MalformedTemplate if outcome["kind"] == "malformed" else TemplateError
    return kind("chat template", str(outcome["error"]))


def encode(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    continue_final: bool = False,
    tools: Tools | None = None,
    variables: Variables | None = None,
) -> list[int]:
    """Return the token ids of the text that ``template`` renders for a conversation.

    Names of special tokens in the template become special tokens. In messages, tools and variables they stay text. With
    ``continue_final`` the prompt ends with the text of the last message, as with ``continue_final_message`` of
    transformers.

    Raises:
        InvalidMessages: the messages are invalid (``messages.validate``), the template rejects them, or it does not
            show the message that is to be continued.
        TemplateError: the template is malformed, uses something that the sandbox forbids, or exceeds a limit.
    """
    variables, guard = variables or Variables(), Guard(tokenizer)
    shown = guard.protect_all(template_messages(messages))
    mark = secrets.token_hex(16) + " "
    if continue_final:
        shown[-1]["content"] += mark
    text = render(
        template,
        shown,
        now=variables.now,
        add_generation_prompt=not continue_final,
        tools=None if tools is None else guard.protect_all([tool.to_openai() for tool in tools.offered]),
        kwargs=guard.protect_all(variables.kwargs),
        **special_names(tokenizer),
    )
    return guard.encode(_before_mark(text, mark) if continue_final else text)


def _before_mark(text: str, mark: str) -> str:
    """Return the text up to ``mark``, which was put behind the last message.

    If the template has removed the space at the end of the mark, white space before the mark is removed as well.
    """
    end = text.rfind(mark.strip())
    if end < 0:
        raise InvalidMessages("the chat template does not show the last message, so it cannot be continued")
    return text[:end] if text.startswith(mark, end) else text[:end].rstrip()


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation in the form that templates read: calls in OpenAI's form, their arguments as objects.

    Raises:
        InvalidMessages: the messages are invalid (``messages.validate``).
    """
    return [_template_message(turn) for turn in validate(messages)]


def _template_message(turn: Message) -> dict[str, Any]:
    out: dict[str, Any] = dict(turn)
    if "tool_calls" in turn:
        out["tool_calls"] = [_template_call(call) for call in turn["tool_calls"]]
    return out


def _template_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    function = {"name": call.name, "arguments": arguments if isinstance(arguments, dict) else call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _in_child(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the program ``_render`` in a child process for one request; return its result for each set of variables."""
    # Isolated mode (-I) ignores environment variables, the user's packages and the current directory. The file is
    # started by its path, so the child imports nothing from Moesaic.
    command = [sys.executable, "-I", str(Path(_render.__file__))]
    try:
        child = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=WALL_SECONDS, check=False, env={}
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateError("chat template", f"took longer than {WALL_SECONDS:.0f} s to render") from error
    except OSError as error:
        raise InvalidRequest(f"cannot start a process to render the chat template ({error.strerror})") from error
    if child.returncode < 0:
        raise TemplateError("chat template", f"used more than {_render.CPU_SECONDS} s of processor time")
    try:
        outcomes = json.loads(child.stdout)
    except ValueError as error:
        raise TemplateError(
            "chat template", f"crashed the process that renders it (exit status {child.returncode})"
        ) from error
    assert isinstance(outcomes, list)
    return outcomes
