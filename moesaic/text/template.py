"""Rendering of a checkpoint's own Jinja chat template, in a sandboxed child process.

A template is rendered only if the user asks for it; otherwise a built-in format is used (``chat``). The child limits
memory, processor time and output. Jinja's sandbox gives a template no access to files or the network.

The text of a message never becomes a control token. Before rendering, a random guard string is inserted into each
name of a special token that a message contains. After rendering, names without the guard become control tokens, and
the guard is removed.
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
OUTPUT_SPARE = 64 << 10  # maximum output is four times the input plus this number of characters
WALL_SECONDS = 10.0  # the limit on processor time applies first, unless the machine is overloaded


class TemplateError(ConfigError):
    """Error in a checkpoint's chat template: it is missing, malformed, or exceeds a limit."""


def load(folder: Path) -> str:
    """Return the chat template of a checkpoint directory.

    Raises:
        TemplateError: the checkpoint has no chat template, or its file is damaged.
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
    if isinstance(template, list):  # several templates with names
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), "")
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
    """Return the text that ``template`` renders for a conversation; ``bos`` and ``eos`` are names of tokens.

    Raises:
        InvalidMessages: the messages are invalid (``messages.validate``), or the template rejects them.
        TemplateError: the template is malformed, uses something that the sandbox forbids, or exceeds a limit.
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
        raise InvalidMessages(f"the chat template rejects this conversation: {outcome['error']}")
    raise TemplateError("chat template", outcome["error"])


def encode(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the token ids of a rendered conversation.

    Names of special tokens in the template become special tokens; in the messages they stay text.

    Raises:
        InvalidMessages: the messages are invalid (``messages.validate``), or the template rejects them.
        TemplateError: the template is malformed, uses something that the sandbox forbids, or exceeds a limit.
    """
    names = {token_id: name for name, token_id in tokenizer.control.items()}
    bos = "" if tokenizer.bos_id is None else names.get(tokenizer.bos_id, "")
    eos = names.get(min(tokenizer.eos_ids), "") if tokenizer.eos_ids else ""
    guard = f"\ue000{secrets.token_hex(16)}\ue001"
    guarded: list[Message] = [
        {"role": turn["role"], "content": _insert_guard(turn["content"], tokenizer, guard)} for turn in _turns(messages)
    ]
    text = render(template, guarded, bos=bos, eos=eos, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode_with_special(text, guard)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    turns = validate(messages)
    if any(turn["role"] == "tool" for turn in turns):
        raise InvalidMessages("the checkpoint's own chat template does not support tool results: choose a chat format")
    return turns


def _insert_guard(text: str, tokenizer: Tokenizer, guard: str) -> str:
    """Return ``text`` with the guard after the first character of each name of a special token."""
    starts = [match.start() for match in tokenizer.find_special(text)]
    while starts:
        for start in reversed(starts):
            text = text[: start + 1] + guard + text[start + 1 :]
        # Names can overlap: the rest of a guarded name may be part of another name.
        starts = [match.start() for match in tokenizer.find_special(text)]
    return text


def _in_child(job: dict[str, Any]) -> dict[str, Any]:
    """Run ``_render`` for one job in a child process and return its report."""
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
        outcome = json.loads(child.stdout)
    except ValueError as error:
        raise TemplateError(
            "chat template", f"crashed the process that renders it (exit status {child.returncode})"
        ) from error
    assert isinstance(outcome, dict)
    return outcome
