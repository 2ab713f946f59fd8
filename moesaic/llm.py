"""Text in, text out: the one door to the engine.

Knows how a checkpoint becomes a model, a tokenizer and an engine, how a conversation becomes a
request, and how its events become text again. Does not know terminals or HTTP.

    llm = LLM.load()                                           # the built-in model
    answer = llm.chat([{"role": "user", "content": "Tell me a story."}], max_tokens=200)
    print(answer.text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch

from moesaic.engine import Engine, Limits, Request, Sampling
from moesaic.errors import InvalidParameter, InvalidRequest, NotFound, Overloaded, PromptTooLong
from moesaic.loading import Loaded, Progress, cache_dtype, load_model, plan_cache, torch_threads
from moesaic.ops import Batch
from moesaic.reply import Answer, Reading, Reply, Text, finished
from moesaic.text import chat, template
from moesaic.text.chat import ChatFormat
from moesaic.text.compiler import Compiler
from moesaic.text.grammar import Grammar
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools

BUILT_IN = Path(__file__).parent / "builtin" / "tales"
"""The checkpoint that is loaded when none is named: a small Mixtral that tells stories."""

OWN_TEMPLATE = "template"
"""The chat format that runs the checkpoint's own template, in a child process with limits."""

CHARACTERS_PER_TOKEN = 16
"""More than any text has, so that a hopelessly long one is refused before it costs a tokenizer's time."""

Messages = Sequence[Mapping[str, Any]]

__all__ = ["LLM", "Answer", "Reply", "Text"]


class LLM(AbstractContextManager["LLM"]):
    """A chat model, ready to answer; safe to share among threads.

    Attributes:
        loaded: the model and its checkpoint.
        tokenizer: between text and ids.
        format: the chat format; None: the checkpoint's own template.
        engine: what runs the requests.
        context: the most tokens that prompt and answer can have together.
        defaults: sampling values that the checkpoint recommends.
    """

    def __init__(
        self, loaded: Loaded, tokenizer: Tokenizer, engine: Engine, chat_format: ChatFormat | None, name: str
    ) -> None:
        self.loaded, self.tokenizer, self.engine = loaded, tokenizer, engine
        self.format, self.name = chat_format, name
        self.context = engine.capacity
        self.defaults = _recommended(loaded.generation)
        self._grammars = Compiler(tokenizer, loaded.model.vocab_size)
        self._template = template.load(loaded.path) if chat_format is None else None

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        format: str | None = None,
        device: str = "cpu",
        context: int | None = None,
        cache_tokens: int | None = None,
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        chat_format: str | None = None,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Load a model and start its engine.

        Args:
            model: a folder in any layout, or None for the built-in model.
            dtype: float32, bfloat16, float16, or auto: what the checkpoint is stored in.
            format: what weights are quantized to while they are read: q8, q4, q3, q2, a format's name, or
                role=format, ...; None: not at all.
            device: where it runs.
            context: the most tokens of prompt and answer; None: what the model was made for, as far
                as a quarter of the free memory holds its key/value cache.
            cache_tokens: places in the key/value cache, shared by all that runs at once; None: sixteen
                contexts, within the same bound.
            kv_cache_dtype: float32, bfloat16, float16, int8 (half of bfloat16's memory, or twice the places), or
                auto: that of the activations.
            block_size: places in a block of the cache.
            chat_format: a name of ``moesaic list chat-formats``, "template" to run the checkpoint's own
                in a sandbox, None to tell by the checkpoint.
            limits: how much may run and wait at once.
            progress: called with the bytes read so far and in all.

        Raises:
            NotFound: no such model or chat format.
            CheckpointError: the checkpoint or its tokenizer is missing, damaged or not understood.
            InvalidParameter: a value is out of range.
        """
        path = BUILT_IN if model is None else Path(model)
        if not path.is_dir():
            raise NotFound(f"{path}: no such folder; `moesaic pull {path}` fetches a model from the hub")
        tokenizer = Tokenizer.open(path)
        loaded = load_model(path, dtype=dtype, weight_format=format, device=device, progress=progress)
        return cls.over(
            loaded,
            tokenizer,
            "built-in" if model is None else path.name,
            context=context,
            cache_tokens=cache_tokens,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            chat_format=chat_format,
            limits=limits,
        )

    @classmethod
    def over(
        cls,
        loaded: Loaded,
        tokenizer: Tokenizer,
        name: str,
        *,
        context: int | None = None,
        cache_tokens: int | None = None,
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        chat_format: str | None = None,
        limits: Limits | None = None,
    ) -> Self:
        """Start an engine for a model that is in memory already; arguments and errors as for ``load``."""
        if loaded.model.shape.labels:
            raise InvalidRequest(f"{loaded.path} is a classifier, which does not chat: use Classifier.load")
        if tokenizer.vocab_size > loaded.model.vocab_size:
            sizes_differ = f"{tokenizer.vocab_size} tokens, but the model only {loaded.model.vocab_size}"
            raise InvalidRequest(f"{loaded.path}: the tokenizer has {sizes_differ}")
        stored = cache_dtype(loaded.model, kv_cache_dtype)
        length, places = plan_cache(loaded.model, context, cache_tokens, block_size, stored)
        form = _format(chat_format, tokenizer, loaded)
        engine = Engine(
            loaded.model,
            cache_tokens=places,
            block_size=block_size,
            context=length,
            limits=limits,
            dtype=stored,
            torch_threads=torch_threads(loaded.model),
        )
        return cls(loaded, tokenizer, engine, form, name)

    def close(self) -> None:
        """Stop the engine; running answers raise EngineStopped."""
        self.engine.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def encode_chat(self, messages: Messages, *, continue_final: bool = False, tools: Tools | None = None) -> list[int]:
        """Return the prompt ids of a conversation, up to where the answer begins, which may call ``tools``.

        Raises:
            InvalidMessages: the chat format cannot hold it.
        """
        parts = (
            message.get(key)
            for message in messages
            if isinstance(message, Mapping)
            for key in ("content", "tool_calls")
        )
        self._bound(sum(len(str(part)) for part in parts if part is not None))
        if self.format is not None:
            return self.format.encode(messages, self.tokenizer, continue_final=continue_final, tools=tools)
        assert self._template is not None
        if tools is not None:
            raise InvalidRequest("a checkpoint's own template is not given tools: choose a chat format")
        if continue_final:
            raise InvalidRequest("a checkpoint's own template cannot continue an answer: choose a chat format")
        return template.encode(self._template, messages, self.tokenizer)

    def encode(self, text: str, *, bos: bool = True, marked: bool = False) -> list[int]:
        """Return the prompt ids of a plain text, by default with the beginning-of-text token in front.

        Where the text itself begins with that token's name, it is read as the token, once: programs that
        write a chat format by hand put it there. With ``marked``, the same holds for all special tokens, wherever
        they stand: for texts that are a chat format written by hand, and never for what a user of theirs wrote.

        Raises:
            InvalidRequest: it is so long that it cannot fit, which is known without tokenizing it.
        """
        self._bound(len(text))
        first = self.tokenizer.bos_id
        if marked:
            ids = self.tokenizer.encode_marked(text)
            return [first, *ids] if bos and first is not None and ids[:1] != [first] else ids
        name = self.tokenizer.piece(first) if first is not None else ""
        written = bool(name) and text.startswith(name)
        ids = self.tokenizer.encode(text[len(name) :] if written else text, bos=bos or written)
        return ids

    @torch.inference_mode()
    def embed(self, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        """Return a vector of length 1 for each text, the mean of its last hidden states, and the tokens read.

        Models made to chat were not trained for this; the vectors tell roughly what a text is about.

        Raises:
            InvalidRequest: a text is empty. PromptTooLong: it has more tokens than the model was made for.
        """
        prompts = [self.encode(text) if isinstance(text, str) else list(text) for text in texts]
        model = self.loaded.model
        for ids in prompts:
            if not ids:
                raise InvalidRequest("there is nothing to embed: the text is empty")
            if max(ids) >= model.vocab_size:
                raise InvalidParameter("input", f"token id {max(ids)} is not in the vocabulary of {model.vocab_size}")
            if len(ids) > model.max_length:
                raise PromptTooLong(len(ids), model.max_length)
        device = next(model.parameters()).device
        vectors = [model(Batch.whole([ids], device)).float().mean(0) for ids in prompts]
        return [(vector / vector.norm()).tolist() for vector in vectors], sum(map(len, prompts))

    def _bound(self, characters: int) -> None:
        most = CHARACTERS_PER_TOKEN * self.context
        if characters > most:
            raise InvalidRequest(
                f"the prompt has {characters} characters; {self.context} tokens never hold over {most}"
            )

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        chat: bool = False,
        priority: int = 0,
        salt: str = "",
        skip_special: bool = True,
        begins: bool | None = None,
        grammar: Grammar | None = None,
        tools: Tools | None = None,
        resume: tuple[tuple[int, ...], ...] = (),
    ) -> list[Reply]:
        """Start a request and return its ``n`` replies. With ``chat``, the chat format's ends count too.

        Args:
            ids: the prompt.
            sampling: how tokens are chosen.
            chat: whether the prompt is a conversation in the chat format.
            priority, salt: see ``Request``.
            skip_special: leave the names of special tokens out of the text.
            begins: whether the answer begins a text, where a leading space is dropped; None: if ``chat``.
            grammar: what the answer has to be; cut by ``max_tokens`` or a stop string, it is the beginning of that.
            tools: what the answer may call, or has to: those that ``encode_chat`` was given.
            resume: the tokens that each answer has already: its first pieces, from which it goes on.

        Raises:
            PromptTooLong, InvalidParameter, GrammarError, Overloaded, EngineStopped: see ``Engine.submit``.
            InvalidParameter, Overloaded, NotInstalled: the grammar cannot be had, see ``Compiler.compile``.
        """
        eos = self.loaded.eos_ids | self.tokenizer.eos_ids
        begins = chat if begins is None else begins
        strip = False
        grammar = self._forced(tools, grammar)
        if chat and self.format is not None:
            eos |= self.format.stop_ids(self.tokenizer)
            if grammar is None:  # which says itself where its text begins and ends
                sampling = replace(sampling, stop=(*sampling.stop, *self.format.stop_strings))
                strip = bool(self.format.stop_strings)
        constraint = None if grammar is None else partial(self._grammars.compile(grammar), begins=begins)
        request = Request(tuple(ids), sampling, tuple(sorted(eos)), priority, salt, constraint, resume)
        how: dict[str, Any] = {"strip": strip and begins, "skip_special": skip_special, "begins": begins}

        def read() -> Reading:
            calls = self.format.calls(self.tokenizer, tools) if self.format and tools else None
            return Reading(self.tokenizer, request, calls=calls, **how)

        if ended := finished(request, read):
            request = replace(request, finished=ended)
        return [Reply(stream, request, read()) for stream in self.engine.submit(request)]

    def _forced(self, tools: Tools | None, grammar: Grammar | None) -> Grammar | None:
        """Return what the answer has to be, a call of a tool if one is required."""
        if tools is None or not tools.enforced or self.format is None:
            return grammar
        if grammar is not None:
            raise InvalidParameter("tool_choice", "cannot require a call of an answer that has a grammar")
        return self.format.forced(self.tokenizer, tools)

    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> Reply: ...
    @overload
    def chat(self, messages: Sequence[Messages], *, stream: Literal[False] = False, **options: Any) -> list[Answer]: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Any) -> Answer: ...

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        *,
        stream: bool = False,
        grammar: Grammar | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        **sampling: Any,
    ) -> Reply | Answer | list[Answer]:
        """Answer a conversation, or each of a list of conversations at once.

        Args:
            messages: [{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...].
            stream: return a ``Reply`` to iterate over.
            grammar: what every answer has to be.
            tools, tool_choice, parallel_tool_calls: what the answer may call, or has to, see ``Tools.of``.
            **sampling: the fields of ``Sampling``; what is not given is as the checkpoint recommends.

        Raises:
            InvalidMessages, InvalidParameter, PromptTooLong: before anything runs.
        """
        options = self.sampling(**sampling)
        offered = Tools.of(tools, tool_choice, parallel_tool_calls)
        if messages and not isinstance(messages[0], Mapping):
            prompts = [self.encode_chat(each, tools=offered) for each in messages]  # type: ignore[arg-type]
            return self._all(prompts, options, chat=True, grammar=grammar, tools=offered)
        ids = self.encode_chat(messages, tools=offered)  # type: ignore[arg-type]
        return self._one(ids, options, chat=True, grammar=grammar, tools=offered, stream=stream)

    @overload
    def complete(self, prompt: str, *, stream: Literal[True], **options: Any) -> Reply: ...
    @overload
    def complete(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> Answer: ...
    @overload
    def complete(self, prompt: list[str], *, stream: Literal[False] = False, **options: Any) -> list[Answer]: ...

    def complete(
        self, prompt: str | list[str], *, stream: bool = False, grammar: Grammar | None = None, **sampling: Any
    ) -> Reply | Answer | list[Answer]:
        """Go on from a text, or from each of a list of texts at once; no chat format is applied.

        Arguments and errors as for ``chat``.
        """
        options = self.sampling(**sampling)
        if isinstance(prompt, str):
            return self._one(self.encode(prompt), options, grammar=grammar, stream=stream)
        return self._all([self.encode(each) for each in prompt], options, grammar=grammar)

    def sampling(self, **values: Any) -> Sampling:
        """Return a ``Sampling`` of these values over the checkpoint's recommendations.

        Raises:
            InvalidParameter: there is no such field, or a value is out of range.
        """
        unknown = sorted(values.keys() - Sampling.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(Sampling.__dataclass_fields__)
            raise InvalidParameter(unknown[0], f"is no sampling parameter; there are {known}")
        return Sampling(**(self.defaults | values))

    def _one(self, ids: list[int], sampling: Sampling, *, stream: bool, **how: Any) -> Reply | Answer:
        if stream and sampling.n > 1:
            raise InvalidParameter("n", "is more than 1: read several answers at once through LLM.submit")
        replies = self.submit(ids, sampling, **how)
        return replies[0] if stream else _joined(replies)

    def _all(self, prompts: list[list[int]], sampling: Sampling, **how: Any) -> list[Answer]:
        """Answer every prompt, keeping the engine as full as its queue allows."""
        for ids in prompts:  # before anything runs
            if len(ids) >= self.context:
                raise PromptTooLong(len(ids), self.context - 1)
        running: deque[list[Reply]] = deque()
        answers: list[Answer] = []
        for ids in prompts:
            while True:
                try:
                    running.append(self.submit(ids, sampling, **how))
                    break
                except Overloaded:
                    if not running:
                        raise
                    answers.append(_joined(running.popleft()))
        return answers + [_joined(replies) for replies in running]


def _joined(replies: list[Reply]) -> Answer:
    first, *others = [reply.answer for reply in replies]
    return replace(first, alternatives=tuple(others))


def _recommended(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling values of generation_config.json; greedy where it says that nothing is drawn."""
    fields = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
    named = {name: generation[name] for name in fields if generation.get(name) is not None}
    return named | ({"temperature": 0.0} if generation.get("do_sample") is False else {})


def _format(name: str | None, tokenizer: Tokenizer, loaded: Loaded) -> ChatFormat | None:
    if name == OWN_TEMPLATE:
        return None
    if name is not None:
        return chat.get(name)
    try:
        written = template.load(loaded.path)
    except template.TemplateError:
        written = None
    return chat.choose(tokenizer, architecture=loaded.config.get("model_type"), template=written)
