"""Chat and completion with a model in this process: a model, its tokenizer and an engine behind one class.

llm = LLM.load()                                           # the default model, smollm2
print(llm.chat([{"role": "user", "content": "What is the capital of Germany?"}], max_tokens=200).text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, overload

from moesaic import builtin, embedding
from moesaic.engine import Engine, Limits, Request, Sampling
from moesaic.engine.speculation import Kind
from moesaic.errors import InvalidParameter, InvalidRequest, Overloaded, PromptTooLong
from moesaic.load_options import LoadOptions
from moesaic.loading import Loaded, Progress, limited_torch_threads, load_model, torch_threads
from moesaic.plan import Plan, make_plan
from moesaic.reply import Answer, AnswerDecoder, Reply, Text, finished_answers
from moesaic.sampling_defaults import sampling_defaults
from moesaic.text import chat_choice, length
from moesaic.text.bad_words import BadWords
from moesaic.text.chat import ChatFormat
from moesaic.text.compiler import Compiler
from moesaic.text.grammar import Grammar
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools
from moesaic.token_rows import check_ids, check_tokenizer

Messages = Sequence[Mapping[str, Any]]

__all__ = ["LLM", "Answer", "Reply", "Text"]


class LLM(AbstractContextManager["LLM"]):
    """A chat model with a running engine; threads may share it.

    Attributes:
        loaded: the model and the configuration of its checkpoint.
        tokenizer: the tokenizer of the checkpoint.
        format: the chat format.
        name: the name of the model.
        engine: the engine that runs the requests.
        context: the largest number of tokens of prompt and answer together.
        defaults: the values that the checkpoint recommends for sampling parameters, by name.
    """

    def __init__(
        self,
        loaded: Loaded,
        tokenizer: Tokenizer,
        engine: Engine,
        chat_format: ChatFormat,
        name: str,
        defaults: Mapping[str, Any],
    ) -> None:
        self.loaded, self.tokenizer, self.engine = loaded, tokenizer, engine
        self.format, self.name = chat_format, name
        self.context, self.defaults = engine.capacity, dict(defaults)
        self._grammars = Compiler(tokenizer, loaded.model.vocab_size)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        chat_format: str | None = None,
        limits: Limits | None = None,
        lazy_cache: bool = True,
        speculation: Kind = "ngram",
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Load a model and start its engine.

        Args:
            model: a folder, a GGUF file, smollm2 or tales; None: smollm2 if its package is installed, else tales.
            chat_format: a name of ``moesaic list chat-formats``, "template" for the checkpoint's own template, or
                the path of a template file (.jinja), both run in a sandbox; None: recognized from the checkpoint.
            limits: limits for running and waiting requests; None: the defaults.
            lazy_cache: take the memory of the key/value cache as tokens are stored; False: at once, so that it
                cannot run out later.
            speculation: how the engine proposes tokens, several of which it verifies in a step: "ngram" or "off".
                Answers do not depend on it.
            progress: called with the numbers of bytes read so far and in total.
            **options: fields of ``LoadOptions``, such as ``format``, ``device`` or ``context``.

        Raises:
            NotFound: the model or chat format does not exist.
            CheckpointError: the checkpoint or its tokenizer is missing, damaged or not understood.
            InvalidParameter: a value is unknown or out of range.
            InvalidRequest: the model is a classifier, or does not match its tokenizer.
            NotInstalled: the package of the built-in model is not installed.
        """
        path, name = builtin.resolve(model)
        plan = make_plan(path, LoadOptions(**options))
        engine: dict[str, Any] = {"limits": limits, "lazy_cache": lazy_cache, "speculation": speculation}
        return cls.from_plan(plan, name, progress=progress, chat_format=chat_format, **engine)

    @classmethod
    def from_plan(cls, plan: Plan, name: str, *, progress: Progress | None = None, **engine: Any) -> Self:
        """Load the model of a plan and start its engine.

        Args:
            plan: the plan; it has the sizes of the key/value cache too.
            name: the name of the model.
            progress: called with the numbers of bytes read so far and in total.
            **engine: ``chat_format``, ``limits``, ``lazy_cache`` and ``speculation``, as for ``LLM.load``.

        Raises:
            As for ``LLM.load``.
        """
        _check_chats(plan)
        tokenizer = Tokenizer.open(plan.spec.path)  # a missing tokenizer is noticed before the weights are read
        return cls.from_loaded(load_model(plan, progress=progress), tokenizer, name, **engine)

    @classmethod
    def from_loaded(
        cls,
        loaded: Loaded,
        tokenizer: Tokenizer,
        name: str,
        *,
        chat_format: str | None = None,
        limits: Limits | None = None,
        lazy_cache: bool = True,
        speculation: Kind = "ngram",
    ) -> Self:
        """Start an engine for a model that is loaded already. ``name`` names it; the rest is as for ``LLM.load``."""
        plan = loaded.plan
        _check_chats(plan)
        check_tokenizer(tokenizer, loaded.model.vocab_size, loaded.path)
        generation = {**builtin.recommended_sampling(loaded.path), **loaded.generation}
        defaults = sampling_defaults(generation, loaded.generation_file)  # refused before the engine starts
        selected_format = chat_choice.select(chat_format, tokenizer, loaded.path, loaded.config.get("model_type"))
        engine = Engine(
            loaded.model,
            cache_tokens=plan.cache_tokens,
            block_size=plan.block_size,
            context=plan.context,
            limits=limits,
            dtype=plan.cache_dtype,
            torch_threads=torch_threads(loaded.model),
            lazy_cache=lazy_cache,
            speculation=speculation,
        )
        return cls(loaded, tokenizer, engine, selected_format, name, defaults)

    def close(self) -> None:
        """Stop the engine. Reading a reply that is still running then raises EngineStopped."""
        self.engine.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def encode_chat(
        self,
        messages: Messages,
        *,
        continue_final: bool = False,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        limited: bool = True,
    ) -> list[int]:
        """Return the prompt's token ids for a conversation, up to the beginning of an answer that may call ``tools``.

        With ``continue_final``, the answer continues the last message, which is the assistant's. A prompt that states
        the date states that of ``now``, in local time; None: the current time. With
        ``limited``, a conversation that is certainly too long for the context is refused before it is tokenized.

        Raises:
            InvalidMessages: the chat format cannot express the conversation.
            InvalidParameter: ``chat_template_kwargs`` are invalid.
            PromptTooLong: the conversation is too long to fit.
            TemplateError: the chat template fails, or exceeds a limit.
        """
        turns = [message for message in messages if isinstance(message, Mapping)]
        parts = [turn.get(key) for turn in turns for key in ("content", "tool_calls")]
        if limited:
            length.check_characters(sum(len(str(part)) for part in parts if part is not None), self.context - 1)
        options: dict[str, Any] = {"kwargs": chat_template_kwargs, "now": now}
        return self.format.encode(messages, self.tokenizer, continue_final=continue_final, tools=tools, **options)

    def encode(self, text: str, *, bos: bool = True, marked: bool = False, limited: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: the text. A beginning-of-sequence token's name at its beginning is read as that token.
            bos: put the beginning-of-sequence token in front, unless the text begins with it.
            marked: read the names of all special tokens as these tokens. It is for prompts in a chat format that a
                program wrote, and must not be used with text of users.
            limited: refuse a text that is certainly too long for the context before it is tokenized.

        Raises:
            PromptTooLong: the text is too long to fit.
        """
        if limited:
            length.check_characters(len(text), self.context - 1)
        bos_id = self.tokenizer.bos_id
        if marked:
            ids = self.tokenizer.encode_with_special(text)
            return [bos_id, *ids] if bos and bos_id is not None and ids[:1] != [bos_id] else ids
        name = self.tokenizer.piece(bos_id) if bos_id is not None else ""
        has_bos = bool(name) and text.startswith(name)
        return self.tokenizer.encode(text[len(name) :] if has_bos else text, bos=bos or has_bos)

    def encode_inputs(self, texts: Sequence[str | Sequence[int]], truncate: int | None = None) -> list[list[int]]:
        """Return the token ids of each text, as ``embed`` reads it. Arguments and errors are those of ``embed``."""
        model, encode = self.loaded.model, partial(self.encode, limited=False)
        prompts = embedding.token_ids(model, encode, texts, truncate, self.tokenizer.bos_id)
        for ids in prompts:
            check_ids("input", ids, self.tokenizer, model.vocab_size)
        return prompts

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        """Return an embedding for each text, and the number of tokens in all texts.

        With ``truncate``, only that number of the last tokens of each text is read; -1: as many as the model supports;
        None: no truncation.

        Raises:
            InvalidRequest: a text is empty, or has a token id that is not in the vocabulary.
            PromptTooLong: a text has more tokens than the model supports.
        """
        prompts = self.encode_inputs(texts, truncate)
        with limited_torch_threads(self.loaded.model):
            return embedding.vectors(self.loaded.model, prompts), sum(map(len, prompts))

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        chat: bool = False,
        priority: int = 0,
        salt: str = "",
        skip_special: bool = True,
        include_stop: bool = False,
        begins: bool | None = None,
        grammar: Grammar | None = None,
        tools: Tools | None = None,
        resume: tuple[tuple[int, ...], ...] = (),
    ) -> list[Reply]:
        """Start a request; return a running ``Reply`` for each of its ``n`` answers.

        Args:
            ids: the token ids of the prompt.
            sampling: the sampling parameters.
            chat: the prompt is a conversation in the chat format; stop tokens and stop strings of the format apply.
            priority: requests with a lower number run first.
            salt: requests share cached prefixes only if their salts are equal.
            skip_special: omit the names of special tokens from the text.
            include_stop: the text includes the stop string, or the text of the stop token, that ended it.
            begins: the answer begins a text, so that a leading space is dropped; None: the value of ``chat``.
            grammar: the grammar of the answer; an answer that ends early is a prefix of a valid text.
            tools: the tools that the answer may or must call, the same as for ``encode_chat``.
            resume: token ids that each answer has already, one tuple per answer; it continues after them.

        Raises:
            PromptTooLong, InvalidParameter, GrammarError, Overloaded, EngineStopped: as for ``Engine.submit``.
            InvalidParameter, Overloaded, NotInstalled: the grammar cannot be compiled, as for ``Compiler.compile``.
        """
        check_ids("prompt", ids, self.tokenizer, rows := self.loaded.model.vocab_size)
        eos = self.loaded.eos_ids | self.tokenizer.eos_ids
        eos |= self.format.stop_ids(self.tokenizer)  # also without a conversation: they end a turn in any prompt
        begins, strip = chat if begins is None else begins, False
        grammar = self._effective_grammar(tools, grammar)
        included = frozenset((*sampling.stop, *sampling.stop_token_ids) if include_stop else ())
        if chat and grammar is None:  # a grammar defines where the text begins and ends
            sampling = replace(sampling, stop=(*sampling.stop, *self.format.stop_texts(self.tokenizer)))
            strip = self.format.strip_answer
        constraint = None if grammar is None else partial(self._grammars.compile(grammar), begins=begins)
        ends = tuple(sorted(token_id for token_id in eos if token_id < rows))
        forbidden = BadWords(self.tokenizer, sampling.bad_words, rows) if sampling.bad_words else None
        request = Request(tuple(ids), sampling, ends, priority, salt, constraint, resume, forbidden=forbidden)
        options: dict[str, Any] = {"skip_special": skip_special, "begins": begins, "included": included}
        options["strip"] = strip and begins

        def new_decoder() -> AnswerDecoder:
            calls = self.format.tool_call_parser(self.tokenizer, tools) if tools else None
            return AnswerDecoder(self.tokenizer, request, calls=calls, **options)

        if indexes := finished_answers(request, new_decoder):
            request = replace(request, finished=indexes)
        return [Reply(stream, request, new_decoder()) for stream in self.engine.submit(request)]

    def _effective_grammar(self, tools: Tools | None, grammar: Grammar | None) -> Grammar | None:
        """Return the grammar that the answer must follow: that of tool calls if it must call one, else ``grammar``.

        Raises:
            InvalidParameter: the answer must call a tool, and ``grammar`` is set too.
        """
        if tools is None or not tools.call_required:
            return grammar
        if grammar is not None:
            raise InvalidParameter("tool_choice", "cannot require a tool call together with a grammar")
        return self.format.forced_call_grammar(self.tokenizer, tools)

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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Reply | Answer | list[Answer]:
        """Answer a conversation, or each of a list of conversations at once.

        The result is an ``Answer``; for a list, a list of them in the same order; with ``stream``, a ``Reply``.

        Args:
            messages: [{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...].
            stream: return a ``Reply`` to iterate over, not a complete answer.
            grammar: the grammar of every answer.
            tools, tool_choice, parallel_tool_calls: the tools that the answer may or must call.
            chat_template_kwargs: variables for the chat format, such as ``date_string`` of Llama 3.1.
            **sampling: fields of ``Sampling``; the checkpoint recommends the values of the others.

        Raises:
            InvalidMessages, InvalidParameter, PromptTooLong: the request is invalid; nothing was computed.
        """
        options = self.sampling(**sampling)
        offered = Tools.from_request(tools, tool_choice, parallel_tool_calls)
        encode = partial(self.encode_chat, tools=offered, chat_template_kwargs=chat_template_kwargs)
        if messages and not isinstance(messages[0], Mapping):
            prompts = [encode(conversation) for conversation in messages]  # type: ignore[arg-type]
            return self._all(prompts, options, chat=True, grammar=grammar, tools=offered)
        ids = encode(messages)  # type: ignore[arg-type]
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
        """Continue a text, or each of a list of texts, without a chat format.

        Arguments and errors are as for ``LLM.chat``.
        """
        options = self.sampling(**sampling)
        if isinstance(prompt, str):
            return self._one(self.encode(prompt), options, grammar=grammar, stream=stream)
        return self._all([self.encode(text) for text in prompt], options, grammar=grammar)

    def sampling(self, **values: Any) -> Sampling:
        """Return sampling parameters with these values, and the checkpoint's recommendations for all others.

        Raises:
            InvalidParameter: a parameter is unknown, or a value is out of range.
        """
        unknown = sorted(values.keys() - Sampling.__dataclass_fields__.keys())
        if unknown:
            names = ", ".join(Sampling.__dataclass_fields__)
            raise InvalidParameter(unknown[0], f"is not a sampling parameter; available parameters: {names}")
        return Sampling(**(self.defaults | values))

    def _one(self, ids: list[int], sampling: Sampling, *, stream: bool, **options: Any) -> Reply | Answer:
        if stream and sampling.n > 1:
            raise InvalidParameter("n", "is more than 1: use LLM.submit to stream several answers")
        replies = self.submit(ids, sampling, **options)
        return replies[0] if stream else _joined(replies)

    def _all(self, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[Answer]:
        """Return the answers to all prompts, in order. Prompts wait here while the engine's queue is full."""
        for ids in prompts:  # all prompts are checked before any of them runs
            if len(ids) >= self.context:
                raise PromptTooLong(len(ids), self.context - 1)
        running: deque[list[Reply]] = deque()
        answers: list[Answer] = []
        for ids in prompts:
            while True:
                try:
                    running.append(self.submit(ids, sampling, **options))
                    break
                except Overloaded:
                    if not running:
                        raise
                    answers.append(_joined(running.popleft()))
        return answers + [_joined(replies) for replies in running]


def _check_chats(plan: Plan) -> None:
    """Raise InvalidRequest if the model of ``plan`` is a classifier."""
    if plan.labels:
        raise InvalidRequest(f"{plan.spec.path} holds a classifier, which cannot chat: use Classifier.load")


def _joined(replies: list[Reply]) -> Answer:
    first, *others = [reply.answer for reply in replies]
    return replace(first, alternatives=tuple(others))
