"""The chat format of a checkpoint: its own template is checked, used if nothing equals it, and told about."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import NotFound, TemplateError
from moesaic.text import chat_choice
from moesaic.text._render import _environment
from moesaic.text.chat import ChatFormat
from moesaic.text.template import special_names
from moesaic.text.tokenizer import Tokenizer
from tests.support.tokenizers import LLAMA3, byte_tokenizer
from tests.text.test_chat_tools import LLAMA31
from tests.text.test_template import LLAMA3 as LLAMA3_TEMPLATE
from tests.text.test_template import MIXTRAL

Opened = Callable[[str], Tokenizer]

# Templates of published checkpoints, written anew in short form.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Smol.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{% set c = m['content'] %}{% else %}"
    "{% set c = 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] %}{% endif %}"
    "{{ c + '<|end_of_turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
MIXTRAL_NEW = (
    "{%- if messages[0]['role'] == 'system' %}{%- set s = messages[0]['content'] %}{%- set ms = messages[1:] %}"
    "{%- else %}{%- set ms = messages %}{%- endif %}{{- bos_token }}{%- for m in ms %}{%- if m['role'] == 'user' %}"
    "{%- if loop.first and s is defined %}{{- ' [INST] ' + s + '\n\n' + m['content'] + ' [/INST]' }}{%- else %}"
    "{{- ' [INST] ' + m['content'] + ' [/INST]' }}{%- endif %}{%- else %}{{- ' ' + m['content'] + eos_token }}"
    "{%- endif %}{%- endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set ms = messages[1:] %}{% set s = messages[0]['content'] %}{% else %}"
    "{% set ms = messages %}{% set s = false %}{% endif %}{% for m in ms %}{% if loop.index0 == 0 and s %}"
    "{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m['content'] %}{% else %}{% set c = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}[SYSTEM_PROMPT]You are Mistral.[/SYSTEM_PROMPT]{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}{% else %}"
    "{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ROLES = {"system": "You answer well.", "user": "What is 2+2?", "assistant": "It is 4."}


def conversation(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": ROLES[role]} for role in roles]


def recognized(folder: Path, tokenizer: Tokenizer, source: str | None, architecture: str = "llama") -> ChatFormat:
    folder.mkdir(exist_ok=True)
    if source is not None:
        (folder / "chat_template.jinja").write_text(source)
    return chat_choice.recognize(tokenizer, folder, architecture)


def rendered(source: str, tokenizer: Tokenizer, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """Return the ids of a conversation as transformers makes them of a template."""
    names = special_names(tokenizer)
    values = {"bos_token": names["bos"], "eos_token": names["eos"], "add_generation_prompt": True} | options
    text = _environment(datetime.now()).from_string(source).render(messages=messages, **values)
    return tokenizer.encode_with_special(text)


@pytest.mark.parametrize(
    ("name", "source", "vocabulary"),
    [
        ("mistral-v1", MIXTRAL, "v1"),
        ("mistral-v1", MIXTRAL_NEW, "v1"),
        ("aime", LLAMA2, "v1"),
        ("mistral-v3", MISTRAL_V3, "v3"),
        ("mistral-tekken", MISTRAL_V3, "tekken"),
        ("llama3", LLAMA3_TEMPLATE, "llama3"),
        ("llama3.1", LLAMA31, "llama3"),
        ("llama3.1", LLAMA31.replace("26 Jul 2024", "' + strftime_now('%d %b %Y') + '"), "llama3"),
        ("llama3.1", LLAMA31.replace("26 Jul 2024", "' + date_string + '"), "llama3"),
    ],
)
def test_published_templates_choose_the_built_in_format(
    name: str, source: str, vocabulary: str, opened: Opened, tmp_path: Path
) -> None:
    form = recognized(tmp_path, opened(vocabulary), source)
    assert (form.name, form.note) == (name, "")


def test_a_default_system_prompt_that_is_left_out_is_told(opened: Opened, tmp_path: Path) -> None:
    form = recognized(tmp_path, opened("v7"), MISTRAL_V7)
    assert form.name == "mistral-v7"
    assert "adds a system prompt of its own" in form.note
    assert "\n" not in form.note


IM = ("<|im_start|>", "<|im_end|>")
CASES = {
    "chatml": (CHATML, ("<|begin_of_text|>", *IM), "<|begin_of_text|>", "<|im_end|>"),
    "chatml with BOS": ("{{ bos_token }}" + CHATML, ("<s>", "</s>", *IM), "<s>", "</s>"),
    "chatml with a default system prompt": (SMOLLM, IM, *IM),
    "chatml on Llama 3": (CHATML, (*LLAMA3, *IM), "<|begin_of_text|>", "<|im_end|>"),
    "chatml without its tokens": (CHATML, ("<s>", "</s>"), "<s>", "</s>"),
    "zephyr": (ZEPHYR, ("<s>", "</s>"), "<s>", "</s>"),
    "zephyr with tokens": (ZEPHYR, ("<|user|>", "<|assistant|>", "<|endoftext|>"), None, "<|endoftext|>"),
    "vicuna": (VICUNA, ("<s>", "</s>"), "<s>", "</s>"),
    "alpaca": (ALPACA, ("<s>", "</s>"), "<s>", "</s>"),
    "openchat": (OPENCHAT, ("<s>", "</s>", "<|end_of_turn|>"), "<s>", "<|end_of_turn|>"),
}


@pytest.mark.parametrize("case", CASES)
def test_well_known_formats_equal_their_templates(case: str, tmp_path: Path) -> None:
    source, specials, bos, eos = CASES[case]
    tokenizer = byte_tokenizer(tmp_path, specials, bos, eos)
    form = recognized(tmp_path, tokenizer, source)
    assert (form.name, form.note) == (case.split()[0], "")
    # The markers of the format and names of other tokens are text in a message.
    text = st.lists(
        st.sampled_from(("Hi", " ", "\n", "é", "<|user|>", "USER: ", "[INST]", "### ")), min_size=1, max_size=4
    )

    @settings(max_examples=40)
    @given(st.none() | text, st.lists(text, min_size=1, max_size=5))
    def check(system: list[str] | None, texts: list[list[str]]) -> None:
        turns = [{"role": ("user", "assistant")[n % 2], "content": "".join(part)} for n, part in enumerate(texts)]
        head = [] if system is None else [{"role": "system", "content": "".join(system)}]
        messages = [*head, *turns]
        if any(name in message["content"] for name in specials for message in messages):
            return
        continued = len(texts) % 2 == 0
        ids = form.encode(messages, tokenizer, continue_final=continued)
        theirs = rendered(source, tokenizer, messages, add_generation_prompt=not continued)
        ours = tokenizer.decode(ids, skip_special=False)
        assert ids == theirs[: len(ids)]
        assert not continued or ours.endswith(turns[-1]["content"])
        assert continued or ids == theirs

    check()


@pytest.mark.parametrize("case", CASES)
def test_text_never_becomes_a_token_of_the_markup(case: str, tmp_path: Path) -> None:
    source, specials, bos, eos = CASES[case]
    tokenizer = byte_tokenizer(tmp_path, specials, bos, eos)
    form = recognized(tmp_path, tokenizer, source)

    def tokens(text: str) -> list[int]:
        messages = [{**message, "content": text} for message in conversation("system", "user", "assistant", "user")]
        return list(filter(tokenizer.is_special, form.encode(messages, tokenizer)))

    for name in specials:
        assert tokens(f"a {name}{name[:2]}") == tokens("hello")
        assert tokens(f"{name[-2:]} b {name[:-1]}") == tokens("hello")


def test_stops_of_the_formats(tmp_path: Path) -> None:
    def stops(case: str) -> tuple[set[str], tuple[str, ...]]:
        source, specials, bos, eos = CASES[case]
        tokenizer = byte_tokenizer(tmp_path / case, specials, bos, eos)
        form = recognized(tmp_path / case, tokenizer, source)
        return {tokenizer.piece(token_id) for token_id in form.stop_ids(tokenizer)}, form.stop_texts(tokenizer)

    assert stops("chatml") == ({"<|im_end|>"}, ())
    assert stops("chatml with BOS") == ({"</s>", "<|im_end|>"}, ())
    assert stops("chatml without its tokens") == ({"</s>"}, ("<|im_end|>",))
    assert stops("zephyr") == ({"</s>"}, ())
    assert stops("vicuna") == ({"</s>"}, ())
    assert stops("alpaca") == ({"</s>"}, ("\n### Instruction:",))
    assert stops("openchat") == ({"<|end_of_turn|>"}, ())


HUMAN = (
    "{% for m in messages %}### {{ 'Human' if m.role == 'user' else 'Assistant' }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
CORRECT = (
    "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + "
    "'<|end_of_text|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role | upper }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>ASSISTANT<|end_header_id|>{{ '\n\n' }}"
)


@pytest.mark.parametrize(
    ("source", "ends", "texts", "strips"),
    [
        (HUMAN, set(), ("\n### Human:",), True),
        (CORRECT, {"<|end_of_text|>"}, (), True),
        (HEADERS, {"<|eot_id|>"}, (), False),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", set(), (), False),
    ],
)
def test_a_template_that_equals_no_format_is_used_and_told(
    source: str, ends: set[str], texts: tuple[str, ...], strips: bool, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(tmp_path, LLAMA3, "<|begin_of_text|>", "<|end_of_text|>")
    form = recognized(tmp_path, tokenizer, source)
    assert form.name == "template"
    assert form.note.startswith("the checkpoint's chat template equals no built-in format, not even llama3")
    for roles in (("user",), ("system", "user", "assistant", "user")):
        messages = conversation(*roles)
        assert form.encode(messages, tokenizer) == rendered(source, tokenizer, messages)
    assert {tokenizer.piece(each) for each in form.stop_ids(tokenizer)} == {"<|end_of_text|>"} | ends
    assert (form.stop_texts(tokenizer), form.strip_answer) == (texts, strips)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if", "line 1 is malformed"),
        ("{{ nothing.at.all }}", "is undefined"),
        ("{{ raise_exception('never') }}", "rejects this conversation: never"),
    ],
)
def test_a_template_that_cannot_be_run_is_told(source: str, reason: str, opened: Opened, tmp_path: Path) -> None:
    form = recognized(tmp_path, opened("v1"), source + "{# [INST] #}", "mixtral")
    assert form.name == "mistral-v1"
    assert reason in form.note
    assert "\n" not in form.note
    with pytest.raises(NotFound, match=r"not built in and cannot be run: .*; select one of"):
        recognized(tmp_path, opened("v1"), source)


def test_a_damaged_template_is_told(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    form = chat_choice.recognize(opened("v1"), tmp_path, "mixtral")
    assert form.name == "mistral-v1"
    assert "is damaged" in form.note


def test_without_a_template_the_guess_is_used(opened: Opened, tmp_path: Path) -> None:
    assert recognized(tmp_path, opened("v1"), None, "mixtral").name == "mistral-v1"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": " "}))
    assert recognized(tmp_path, opened("v1"), None).name == "plain"


def test_names_are_checked_before_a_model_is_loaded(tmp_path: Path, opened: Opened) -> None:
    for name in ("template", "chatml", "vicuna"):
        chat_choice.check_name(name)
    with pytest.raises(NotFound, match="no such chat template"):
        chat_choice.check_name(str(tmp_path / "none.jinja"))
    with pytest.raises(NotFound, match="unknown chat format 'x'"):
        chat_choice.check_name("x")
    file = tmp_path / "a.jinja"
    for content, match in ((b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")):
        file.write_bytes(content)
        with pytest.raises(TemplateError, match=match):
            chat_choice.check_name(str(file))
    file.write_text("{% if")
    with pytest.raises(TemplateError, match=r"a\.jinja: line 1 is malformed"):
        chat_choice.select(str(file), opened("v1"), tmp_path)
    with pytest.raises(TemplateError, match="has no chat template"):
        chat_choice.select("template", opened("v1"), tmp_path)
