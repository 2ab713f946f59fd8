"""Encoders of the chat formats ``aime``, which the AIME API server uses, and ``plain``, a dialogue in plain text."""

from __future__ import annotations

import re

from moesaic.text._turns import Variables, bos, eos, without_system
from moesaic.text.messages import Message
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools

AIME_MARKERS = re.compile(r"<<SYS>>|<</SYS>>|\[INST\]|\[/INST\]|<s>|</s>")


def encode_aime(
    messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None, _variables: Variables
) -> list[int]:
    """Return the token ids of a conversation in the form of Llama 2, which the AIME API server uses.

    Each pair of a question and its answer begins with the beginning-of-text token. No end-of-text token follows the
    last pair. Markers such as ``[INST]`` are removed from the messages.
    """
    system, turns = without_system(messages)
    texts = [_remove_markers(turn["content"]) for turn in turns]
    if system:
        texts[0] = f"<<SYS>>\n{_remove_markers(system)}\n<</SYS>>\n\n{texts[0]}"
    ids: list[int] = []
    for index in range(0, len(texts), 2):
        answer = f" {texts[index + 1]} " if index + 1 < len(texts) else ""
        ids += bos(tokenizer) + tokenizer.encode(f"[INST] {texts[index]} [/INST]{answer}")
        ids += eos(tokenizer) if index + 2 < len(texts) else []
    return ids


def _remove_markers(text: str) -> str:
    # Repeated, because removing one marker can form another.
    while AIME_MARKERS.search(text):
        text = AIME_MARKERS.sub("", text)
    return text


def encode_plain(
    messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None, _variables: Variables
) -> list[int]:
    """Return the token ids of a conversation as lines that begin with ``User:`` or ``Assistant:``.

    The format is for models that were not trained on a chat format.
    """
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    text = ""
    for turn in messages:
        text += names[turn["role"]] + turn["content"] + ("\n\n" if turn["role"] == "system" else "\n")
    text = text[:-1] if messages[-1]["role"] == "assistant" else text + "Assistant:"
    return tokenizer.encode(text, bos=True)
