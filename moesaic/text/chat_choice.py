"""Choice of the chat format of a checkpoint.

The control tokens of the tokenizer and the text of the chat template give a guess. If the checkpoint has a template,
the guess is checked. The template is rendered for a few short conversations (``own_template``), and a built-in format
is used only if it writes the same. If none does, the template itself is used. If a user should know about the choice,
``ChatFormat.note`` says it in one line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from moesaic.errors import CheckpointError, InvalidRequest, MalformedTemplate, NotFound
from moesaic.text import own_template, template
from moesaic.text._markup import MARKUPS, Markup
from moesaic.text.chat import FORMATS, ChatFormat, get_format
from moesaic.text.messages import Message
from moesaic.text.own_template import CONVERSATIONS, NAME, PROBE_TIME, QUESTION, Examined
from moesaic.text.tokenizer import Tokenizer

log = logging.getLogger("moesaic.text")

DATE_LINE = re.compile(r"Today Date: [^\n]*")


def is_file(name: str) -> bool:
    """Return whether ``name``, which selects a chat format, is the path of a template file."""
    return name.endswith(template.FILE_SUFFIXES)


def check_name(name: str) -> None:
    """Raise an error if ``name`` selects no chat format; the model need not be loaded yet.

    Raises:
        NotFound: there is no such format or template file.
        CheckpointError: the template file cannot be read.
    """
    if is_file(name):
        template.load_file(Path(name))
    elif name != NAME:
        get_format(name)


def select(name: str | None, tokenizer: Tokenizer, folder: Path, architecture: str | None = None) -> ChatFormat:
    """Return the chat format of a checkpoint, and log its note.

    Args:
        name: a built-in format, "template" for the checkpoint's own template, or the path of a template file (its name
            ends with .jinja, .jinja2 or .j2); None: recognized from the checkpoint.
        tokenizer: the tokenizer of the checkpoint.
        folder: the folder of the checkpoint.
        architecture: as for ``guess``.

    Raises:
        NotFound: there is no such format or file; or the checkpoint's template is in no known format and cannot be run.
        CheckpointError: the template that was asked for is missing, damaged or malformed.
    """
    if name is None:
        form = recognize(tokenizer, folder, architecture)
        if form.note:
            log.warning("%s: %s", folder.name, form.note)
        return form
    if name != NAME and not is_file(name):
        return get_format(name)
    path = folder if name == NAME else Path(name)
    examined = own_template.examine(template.load(path) if name == NAME else template.load_file(path), tokenizer)
    if isinstance(examined.error, MalformedTemplate):  # other errors may depend on the conversation
        raise MalformedTemplate(path, str(examined.error).removeprefix("chat template: "))
    return own_template.chat_format(examined, tokenizer, name=name)


def recognize(tokenizer: Tokenizer, folder: Path, architecture: str | None = None) -> ChatFormat:
    """Return the chat format of a checkpoint; its ``note`` says, for example, that it is only a guess.

    Raises:
        NotFound: no built-in format is known for the checkpoint's template, and the template cannot be run.
    """
    source, why = None, ""
    try:
        source = template.find(folder)
        examined = None if source is None else own_template.examine(source, tokenizer)
    except (CheckpointError, InvalidRequest) as error:
        examined, why = None, str(error)
    guessed = guess(tokenizer, architecture=architecture, template=source)
    if examined is not None and examined.texts:
        return _matching(examined, tokenizer, guessed)
    if examined is not None:
        why = str(examined.error)
    if guessed is None:
        reason = f" and cannot be run: {why}" if why else ""
        names = ", ".join(FORMATS)
        raise NotFound(f"this checkpoint's chat format is not built in{reason}; select one of {names}")
    if not why:
        return guessed
    return replace(
        guessed,
        note=f"the checkpoint's chat template cannot be run ({why}); {guessed.name} is used instead, a guess: choose "
        "one with --chat-format",
    )


def _matching(examined: Examined, tokenizer: Tokenizer, guessed: ChatFormat | None) -> ChatFormat:
    """Return the built-in format that writes the same as the examined template; ``guessed`` is tried first.

    If no format does, return the template itself as a format.
    """
    for form in _candidates(examined, tokenizer, guessed):
        asked = ("asked", "talked") if form.loose else ("asked", "talked", "instructed")
        if _equal(form, examined, tokenizer, [name for name in asked if name in examined.texts]):
            return own_template.chat_format(examined, tokenizer, form)
        if form.loose and _equal(form, examined, tokenizer, ["instructed", "instructed_talk"]):
            note = f"the checkpoint's chat template adds a system prompt of its own, which {form.name} leaves out: "
            chosen = replace(form, note=note + "--chat-format template adds it")
            return own_template.chat_format(examined, tokenizer, chosen)
    note = "the checkpoint's chat template equals no built-in format"
    instead = f", not even {guessed.name}, which its tokens suggest" if guessed else ""
    return replace(
        own_template.chat_format(examined, tokenizer),
        note=f"{note}{instead}; the template itself is used, as with --chat-format template",
    )


def _candidates(examined: Examined, tokenizer: Tokenizer, guessed: ChatFormat | None) -> Iterator[ChatFormat]:
    """Yield the built-in formats that the tokenizer supports, ``guessed`` first.

    A format of fixed texts gets the beginning-of-text token and the default system prompt from the template.
    """
    for form in sorted(FORMATS.values(), key=lambda form: form is not guessed):
        if form.supports(tokenizer):
            markup = MARKUPS.get(form.name)
            yield form if markup is None else replace(form, build=_fitted(markup, examined, tokenizer).encode)


def _fitted(markup: Markup, examined: Examined, tokenizer: Tokenizer) -> Markup:
    """Return ``markup`` with the beginning-of-text token and default system prompt that the template writes."""
    asked = examined.texts.get("asked", "")
    bos = template.special_names(tokenizer)["bos"]
    begins = bool(bos) and asked.startswith(bos) and not markup.user[0].startswith(bos)
    head, _, _ = asked.removeprefix(bos if begins else "").partition(markup.user[0] + QUESTION)
    before, after = markup.system
    has_default = head.startswith(before) and head.endswith(after) and len(head) > len(before) + len(after)
    default = head[len(before) : len(head) - len(after)] if has_default else ""
    return replace(markup, bos=begins, default_system=default)


def _equal(form: ChatFormat, examined: Examined, tokenizer: Tokenizer, names: Sequence[str]) -> bool:
    """Return whether ``form`` writes the same as the template in all conversations called ``names``.

    False if there are no names, or if the template could not be rendered for one of them.
    """
    return bool(names) and all(
        name in examined.texts and _same(form, CONVERSATIONS[name], examined.texts[name], tokenizer) for name in names
    )


def _same(form: ChatFormat, conversation: list[Message], text: str, tokenizer: Tokenizer) -> bool:
    ours = form.encode(conversation, tokenizer, kwargs=None, now=PROBE_TIME)
    theirs = tokenizer.encode_with_special(text)
    if list(filter(tokenizer.is_special, ours)) != list(filter(tokenizer.is_special, theirs)):
        return False
    texts = [tokenizer.decode(ids, skip_special=False) for ids in (ours, theirs)]
    if "date_string" in form.kwargs:  # templates of Llama 3.1 state the date of the day or a fixed one
        texts = [DATE_LINE.sub("", each) for each in texts]
    if form.loose:  # Mistral's own templates differ from mistral-common, the reference, in spaces beside markers
        texts = [each.replace(" ", "") for each in texts]
    return texts[0] == texts[1]


def guess(tokenizer: Tokenizer, *, architecture: str | None = None, template: str | None = None) -> ChatFormat | None:
    """Return the format that a checkpoint was probably trained with; None if its template is in no known format.

    The control tokens of the tokenizer decide. If it has none, the text of the chat template decides; the template is
    not run. If there is no template, ``architecture`` ("MixtralForCausalLM" or "mixtral") decides: Mistral's oldest
    format for Mistral's models, and plain dialogue for all others.
    """
    if get_format("llama3").supports(tokenizer):
        return get_format("llama3.1" if "ipython" in (template or "") else "llama3")
    if get_format("mistral-v3").supports(tokenizer):
        return get_format(_mistral_version(tokenizer, template))
    if template is not None and template.strip():
        markers = (
            *(("<<SYS>>", "aime"), ("[INST]", "mistral-v1"), ("<|im_start|>", "chatml"), ("<|user|>", "zephyr")),
            *(("GPT4 Correct", "openchat"), ("### Instruction:", "alpaca"), ("ASSISTANT:", "vicuna")),
            ("Assistant:", "plain"),
        )
        return next((get_format(name) for marker, name in markers if marker in template), None)
    if "<|im_start|>" in tokenizer.control:
        return get_format("chatml")
    family = (architecture or "").lower()
    return get_format("mistral-v1" if "mixtral" in family or "mistral" in family else "plain")


def _mistral_version(tokenizer: Tokenizer, template: str | None) -> str:
    stated = re.match(r"v(\d+)", tokenizer.version or "")
    # Every tekken file has the later control tokens, so for tekken only the stated version counts.
    if stated:
        for version in (13, 11, 7):
            if int(stated[1]) >= version and get_format(f"mistral-v{version}").supports(tokenizer):
                return f"mistral-v{version}"
    system = "[SYSTEM_PROMPT]" in (template or "") if tokenizer.byte_level else True
    if not stated and system and get_format("mistral-v7").supports(tokenizer):
        return "mistral-v7"
    if tokenizer.byte_level:
        return "mistral-tekken"
    return "mistral-v3" if "[PREFIX]" in tokenizer.control else "mistral-v2"
