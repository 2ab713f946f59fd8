"""Chat formats that put fixed texts around the turns: ChatML, Zephyr, Vicuna, Alpaca and OpenChat.

A name of a special token in these texts becomes that token if the tokenizer has it, and stays text otherwise, as in the
chat templates of the checkpoints. The text of a message never becomes a special token. If a checkpoint has a template,
``chat_choice`` takes two things from it: the default system prompt, and whether a beginning-of-text token is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.text._guard import Guard
from moesaic.text._turns import Variables
from moesaic.text.messages import Message
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools

EOS = "{eos}"
"""Placeholder in a fixed text for the name of the tokenizer's end-of-text token."""

Around = tuple[str, str]
"""The fixed texts before and after a message."""


@dataclass(frozen=True)
class Markup:
    """The fixed texts before and after the messages of each role in one chat format."""

    system: Around
    user: Around
    assistant: Around
    answer: str
    """The text after the last message of the user; the model writes its answer behind it. It is the text before an
    assistant's message, in some formats without its last space."""
    default_system: str = ""
    """System prompt for a conversation that has none. If this is empty, such a conversation gets no system turn."""
    bos: bool = True
    """Whether the prompt begins with the beginning-of-text token, if the tokenizer has one."""

    def encode(
        self, messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None, _variables: Variables
    ) -> list[int]:
        """Return the token ids of a conversation.

        If the last message is the assistant's, nothing follows its text, so that the model continues it.
        """
        guard = Guard(tokenizer)
        # The guard at each border keeps a message from completing a name that the markup begins, and the reverse.
        text = guard.text.join(self._parts(messages, tokenizer, guard))
        name = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
        return guard.encode(name + text if self.bos and not text.startswith(name or "\0") else text)

    def _parts(self, messages: list[Message], tokenizer: Tokenizer, guard: Guard) -> Iterator[str]:
        eos = tokenizer.piece(min(tokenizer.eos_ids)) if tokenizer.eos_ids else ""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        for index, turn in enumerate(messages):
            before, after = {"system": self.system, "user": self.user, "assistant": self.assistant}[turn["role"]]
            yield before.replace(EOS, eos)
            yield guard.protect(turn["content"])
            if turn["role"] != "assistant" or index < len(messages) - 1:
                yield after.replace(EOS, eos)
        if messages[-1]["role"] != "assistant":
            yield self.answer.replace(EOS, eos)


MARKUPS = {
    "chatml": Markup(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        answer="<|im_start|>assistant\n",
    ),
    "zephyr": Markup(
        system=("<|system|>\n", "{eos}\n"),
        user=("<|user|>\n", "{eos}\n"),
        assistant=("<|assistant|>\n", "{eos}\n"),
        answer="<|assistant|>\n",
    ),
    "vicuna": Markup(
        system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "{eos}"),
        answer="ASSISTANT:",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
    "alpaca": Markup(
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:\n", "{eos}\n\n"),
        answer="### Response:\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.",
    ),
    "openchat": Markup(
        system=("", "<|end_of_turn|>"),
        user=("GPT4 Correct User: ", "<|end_of_turn|>"),
        assistant=("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        answer="GPT4 Correct Assistant:",
    ),
}
