"""A checkpoint's own Jinja template, run only when somebody asks for it, in a child that can do little.

Knows the environment that Hugging Face's templates are written for, and the limits of the child:
memory, processor time, output, no network in it to speak of (a sandboxed template has no name to reach
one by). Does not know which formats are built in (``chat``), which are used wherever one fits.

The text of a message stays text: before rendering, a mark that cannot be guessed is put into every
name of a special token that a message contains; after rendering, names without the mark become control
tokens and the mark is dropped.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, InvalidMessages, InvalidRequest
from moesaic.text import _render
from moesaic.text._vocabulary import read_bounded
from moesaic.text.messages import Message, validate
from moesaic.text.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 256 << 10
OUTPUT_SPARE = 64 << 10  # characters that a rendering may have beyond four times its input
WALL_SECONDS = 10.0  # the processor limit strikes first, unless the machine is overloaded


class TemplateError(ConfigError):
    """A checkpoint's template is no template, breaks a limit, or fails for every conversation."""


def load(folder: Path) -> str:
    """Return the chat template of a checkpoint directory.

    Raises:
        TemplateError: there is none, or it is too long.
        TokenizerError: a file that cannot be read.
    """
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template: Any = None
    try:
        if alone.is_file():
            template = read_bounded(alone).decode()
        elif config.is_file():
            template = json.loads(read_bounded(config)).get("chat_template")
    except (ValueError, AttributeError, RecursionError) as error:
        raise TemplateError(alone if alone.is_file() else config, "is damaged: it cannot be decoded") from error
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), "")
    if not isinstance(template, str) or not template:
        raise TemplateError(folder, "has no chat template: use one of the built-in chat formats")
    return template


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """Return what ``template`` makes of a conversation, as text; ``bos`` and ``eos`` are names of tokens.

    Raises:
        InvalidMessages: see ``messages.validate``, or the template itself refuses this conversation.
        TemplateError: the template is malformed, tries what the sandbox forbids, or breaks a limit.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError("chat template", f"longer than {MAX_TEMPLATE_CHARS} characters")
    turns = _turns(messages)
    limit = 4 * (len(template) + sum(len(turn["content"]) for turn in turns)) + OUTPUT_SPARE
    values = {
        "messages": turns,
        "bos_token": bos,
        "eos_token": eos,
        "add_generation_prompt": add_generation_prompt,
    }
    outcome = _in_child({"template": template, "values": values, "limit": limit})
    if "text" in outcome:
        return str(outcome["text"])
    if outcome["kind"] == "refused":
        raise InvalidMessages(f"the chat template refuses this conversation: {outcome['error']}")
    raise TemplateError("chat template", outcome["error"])


def encode(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the ids of a rendered conversation: the template's special tokens are special, the messages' are text.

    Raises:
        InvalidMessages, TemplateError: see ``render``.
    """
    names = {id: name for name, id in tokenizer.control.items()}
    bos = "" if tokenizer.bos_id is None else names.get(tokenizer.bos_id, "")
    eos = names.get(min(tokenizer.eos_ids), "") if tokenizer.eos_ids else ""
    mark = f"\ue000{secrets.token_hex(16)}\ue001"
    marked: list[Message] = [
        {"role": turn["role"], "content": _break(turn["content"], tokenizer, mark)} for turn in _turns(messages)
    ]
    text = render(template, marked, bos=bos, eos=eos, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode_marked(text, mark)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    turns = validate(messages)
    if any(turn["role"] == "tool" for turn in turns):
        raise InvalidMessages("a checkpoint's own template is not given results of tools: choose a chat format")
    return turns


def _break(text: str, tokenizer: Tokenizer, mark: str) -> str:
    """Return ``text`` with the mark behind the first character of every special token's name in it."""
    found = [match.start() for match in tokenizer.find_control(text)]
    while found:
        for at in reversed(found):
            text = text[: at + 1] + mark + text[at + 1 :]
        # A name may have overlapped one that is broken now.
        found = [match.start() for match in tokenizer.find_control(text)]
    return text


def _in_child(job: dict[str, Any]) -> dict[str, Any]:
    """Run ``_render`` on one job in a process of its own and return what it reports."""
    # Isolated (-I): no environment variables, no user's packages, no current directory on the path. The file is
    # run by its path, so that the child imports nothing of Moesaic.
    command = [sys.executable, "-I", str(Path(_render.__file__))]
    try:
        child = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=WALL_SECONDS, check=False, env={}
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateError("chat template", f"took longer than {WALL_SECONDS:.0f} s") from error
    except OSError as error:
        raise InvalidRequest(f"no process can be started to render the chat template ({error.strerror})") from error
    if child.returncode < 0:
        raise TemplateError("chat template", f"was stopped at {_render.CPU_SECONDS} s of processor time")
    try:
        outcome = json.loads(child.stdout)
    except ValueError as error:
        raise TemplateError("chat template", f"ended the process that renders it (exit {child.returncode})") from error
    assert isinstance(outcome, dict)
    return outcome
