"""The language model that lm-eval (EleutherAI's evaluation harness) asks: an adapter over a model in this process.

It encodes and cuts requests as lm-eval's own adapter for transformers does, so that scores can be compared. There are
three differences. Names of special tokens in a task's texts are text. A chat prompt has the token ids of the chat
format, as in ``moesaic chat``, not those of its text. The log-likelihood of a whole text does not include BOS. This
module imports lm-eval, so import it only where that is installed.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from moesaic.bench import scoring
from moesaic.bench.scoring import Continuation, Likelihood
from moesaic.engine import Sampling
from moesaic.engine.request import MAX_STOP_BYTES, MAX_STOPS
from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.llm import LLM
from moesaic.reply import Reply

MAX_GEN_TOKS = 256
"""Maximum tokens of an answer if a task does not say, as in lm-eval's other adapters."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Generation settings of a task with the same meaning in ``Sampling``."""
READ = ("do_sample", "until", "max_gen_toks")
"""Generation settings of a task that this module reads itself."""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "typical_p": 1.0, "use_cache": True}
"""Values of other settings that change no answer."""
ENGINE_STOPS = MAX_STOPS // 2
"""Stop strings that end an answer in the engine, which also has those of the chat format. Others only cut its text."""


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval says no types
    """A model of this process, as lm-eval asks it.

    Args:
        llm: the model. Its engine must have a context of one token more than the model should read.
        at_once: number of requests that run at the same time, about.
        seed: seed of the random draws of tasks that sample.
    """

    def __init__(self, llm: LLM, at_once: int, seed: int = 0) -> None:
        super().__init__()
        self._llm, self._at_once, self._seed = llm, at_once, seed
        self._prompts: dict[str, tuple[list[int], bool]] = {}  # the ids of each chat prompt by its text

    @property
    def max_length(self) -> int:
        """Maximum number of tokens that the model reads."""
        return self._llm.context - 1

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; the first of them if the model has several."""
        ends = self._llm.tokenizer.eos_ids or self._llm.loaded.eos_ids
        if not ends:
            raise InvalidRequest(f"{self._llm.loaded.path}: neither the tokenizer nor the model names an EOS token")
        return min(ends)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or EOS if the vocabulary puts no BOS before texts."""
        bos = self._llm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return f"moesaic-{self._llm.name}-{self._llm.format.name}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval adds to the configuration in its results."""
        return {"model": self._llm.name, "max_length": self.max_length, "chat_format": self._llm.format.name}

    # Texts and ids

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Return the ids of a text, or of a chat prompt. BOS is added unless the text has it or the flag says no."""
        if string in self._prompts:
            return list(self._prompts[string][0])
        # A text that a task has put after a chat prompt: the names of special tokens in the prompt are tokens.
        marked = bool(self._prompts)
        return self._llm.encode(string, bos=add_special_tokens is not False, marked=marked, limited=False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of its continuation.

        lm-eval encodes both together and cuts; spaces at the end of the context count as the continuation's. A
        continuation of a chat prompt is an answer of its own.
        """
        if context not in self._prompts:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        ids, begins = self._prompts[context]
        return list(ids), self._llm.tokenizer.encode(continuation, prefix=begins)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a chat prompt, with the names of its special tokens. Its ids are remembered."""
        ids = self._llm.encode_chat(chat_history, continue_final=not add_generation_prompt, limited=False)
        text = self._llm.tokenizer.decode(ids, skip_special=False)
        self._prompts[text] = ids, add_generation_prompt
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the name of the chat format, which lm-eval records."""
        return self._llm.format.name if chat_template else None

    # Requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log p of each request's continuation after its context, and whether it is the greedy answer."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        found = self._likelihoods([(context, ids) for _, context, ids in requests], "loglikelihood")
        answers = [(one.logprob, one.greedy) for one in found]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], **_options: Any) -> list[float]:
        """Return log p of each request's whole text, in windows of ``max_length`` tokens."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            [text] = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            before = len(pairs)
            pairs += map(make_disjoint_window, windows)
            counts.append(len(pairs) - before)
        found = iter(self._likelihoods(pairs, "loglikelihood_rolling"))
        sums = [sum(next(found).logprob for _ in range(count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]], label: str) -> list[Likelihood]:
        asked = [Continuation(tuple(context), tuple(ids)) for context, ids in pairs]
        with tqdm(total=len(asked), desc=label, disable=None) as bar:
            return scoring.likelihoods(self._llm.engine, asked, self._at_once, lambda *_: bar.update())

    def generate_until(self, requests: list[Instance], **_options: Any) -> list[str]:
        """Return the answer to each request, up to one of its stop strings."""
        running: deque[tuple[Instance, list[str], Reply]] = deque()
        answers: list[str] = []
        with tqdm(total=len(requests), desc="generate_until", disable=None) as bar:
            finish = partial(self._finish, answers, bar)
            for index, request in enumerate(requests):
                running.append((request, *self._start(request, index)))
                if len(running) >= 2 * self._at_once:
                    finish(*running.popleft())
            while running:
                finish(*running.popleft())
        return answers

    def _start(self, request: Instance, index: int) -> tuple[list[str], Reply]:
        """Start the answer to a request; return its stop strings and the answer."""
        context, settings = request.args
        kwargs = normalize_gen_kwargs(settings, MAX_GEN_TOKS)
        most, until = kwargs["max_gen_toks"], [text for text in kwargs["until"] if text]
        if most >= self.max_length:
            raise InvalidRequest(
                f"a task asks for answers of up to {most} tokens, but the model's context has {self.max_length}: "
                "set max_gen_toks with --gen-kwargs"
            )
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - most) :]
        sampling = self._sampling(kwargs, [text for text in until if len(text.encode()) <= MAX_STOP_BYTES], index)
        begins = context not in self._prompts or self._prompts[context][1]
        [reply] = self._llm.submit(ids, sampling, chat=context in self._prompts, begins=begins)
        return until, reply

    def _sampling(self, kwargs: Mapping[str, Any], until: list[str], index: int) -> Sampling:
        """Return the sampling parameters of a task; the checkpoint recommends those that the task leaves open.

        Each request draws other numbers, also if it is repeated.
        """
        known = (*READ, *SAMPLING)
        for name in kwargs.keys() - set(known):
            if name not in NEUTRAL or kwargs[name] != NEUTRAL[name]:
                raise InvalidParameter(name, f"is a generation setting without effect here; use {', '.join(known)}")
        values = {name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}
        if not kwargs["do_sample"]:
            values["temperature"] = 0.0
        return self._llm.sampling(
            **values, stop=tuple(until[:ENGINE_STOPS]), max_tokens=kwargs["max_gen_toks"], seed=self._seed + index
        )

    def _finish(self, answers: list[str], bar: Any, request: Instance, until: list[str], reply: Reply) -> None:
        text: str = postprocess_generated_text(reply.answer.text, until, None)
        answers.append(text)
        self.cache_hook.add_partial("generate_until", request.args, text)
        bar.update()
