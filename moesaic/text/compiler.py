"""Compiler of grammars for a vocabulary, and matchers that follow an answer through its grammar.

The compiler uses llguidance, an optional dependency that is imported on first use. This module does not depend on the
engine; ``Matcher`` implements its protocol ``engine.request.Constraint``.

Grammars come from requests, so their cost is limited in four ways. Their size is limited (``grammar``). Each is first
compiled in a child process with resource limits (``_trial``). A few tokens are generated as a test. Each answer has a
budget of processor time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import GrammarError, InvalidParameter, InvalidRequest, NotInstalled, Overloaded
from moesaic.text import _trial
from moesaic.text.grammar import STYLE, Grammar
from moesaic.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 128  # compiled grammars in the cache
MAX_CACHED_BYTES = 4 << 20  # total size of their sources
MAX_CONCURRENT = 2  # compilations at the same time
MAX_PARTS = 16  # parts that are compiled to find the one that causes an error
WAIT_SECONDS = 10.0

LIMITS: dict[str, Any] = {"max_lexer_states": 20_000, "verbose_errors": False}
"""Options of llguidance. A lexer state takes one or two kilobytes; limits that are not listed keep their defaults."""

BUDGET_SECONDS, BUDGET_SECONDS_PER_TOKEN = 0.5, 0.005
"""Processor seconds that an answer may use to compute masks: a fixed part, and a part for each token. All running
answers wait for this work. A usual answer needs one percent of the budget."""

PROBE_TOKENS = 8
"""Number of tokens that are generated to test a grammar; a grammar that is too costly shows it within a few tokens."""


class Compiler:
    """Thread-safe compiler of grammars for one vocabulary, with a cache of recent grammars.

    The first call of ``compile`` builds the tables of the vocabulary, which takes some tenths of a second.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Create a compiler.

        Args:
            tokenizer: the tokenizer of the model.
            vocab_size: number of token ids that the model has logits for; ids that the tokenizer lacks are never
                allowed.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tables: _Tables | None = None
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONCURRENT)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Return the compiled grammar; call it once for each answer to get a ``Matcher``.

        Raises:
            InvalidParameter: the grammar is malformed, not supported, or too costly; the message says where.
            Overloaded: too many grammars are being compiled.
            NotInstalled: llguidance is not installed.
        """
        with self._lock:
            if grammar.source in self._cache:
                self._cache.move_to_end(grammar.source)
                return self._cache[grammar.source]
        if not self._slots.acquire(timeout=WAIT_SECONDS):
            raise Overloaded("too many grammars are being compiled: try again later")
        try:
            compiled = self._compile(grammar)
        except InvalidParameter:
            for part in grammar.parts[:MAX_PARTS]:
                compile_in_child(part)
            raise
        finally:
            self._slots.release()
        with self._lock:
            self._cache[grammar.source] = compiled
            while len(self._cache) > MAX_CACHED or sum(map(len, self._cache)) > MAX_CACHED_BYTES:
                self._cache.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        library = _llguidance()
        compile_in_child(grammar)
        tables = self._vocabulary()
        limits = library.LLParserLimits(**LIMITS)
        matchers = [
            library.LLMatcher(table, _llguidance_text(grammar), log_level=0, limits=limits)
            for table in tables.variants()
        ]
        compiled = CompiledGrammar(tables, matchers)
        for matcher in matchers:
            if matcher.is_error():
                raise grammar.error(f"cannot be compiled: {_one_line(matcher.get_error())}")
        _probe(grammar, compiled)
        return compiled

    def _vocabulary(self) -> _Tables:
        with self._lock:
            self._tables = self._tables or _Tables(self._tokenizer, self._vocab_size)
            return self._tables


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise NotInstalled("grammars need llguidance: pip install 'moesaic[serve]'") from error
    return llguidance


def _llguidance_text(grammar: Grammar) -> str:
    """Return the grammar as text in llguidance's own format."""
    matcher = _llguidance().LLMatcher
    match grammar.kind:
        case "json_schema" | "json_object":
            return str(matcher.grammar_from_json_schema(_schema(grammar), overrides=STYLE))
        case "regex":
            return str(matcher.grammar_from_regex(grammar.value))
        case "choice":
            quoted = (json.dumps(text, ensure_ascii=False) for text in grammar.value)
            return str(matcher.grammar_from_lark("start: " + " | ".join(quoted)))
        case "lark":
            return str(matcher.grammar_from_lark(grammar.value))


def _schema(grammar: Grammar) -> Any:
    return {"type": "object"} if grammar.kind == "json_object" else json.loads(grammar.value)


def compile_in_child(grammar: Grammar) -> None:
    """Compile a grammar in a child process with resource limits, to reject one that would never finish.

    Raises:
        InvalidParameter: the grammar cannot be compiled, or needs too much time or memory.
        InvalidRequest: the child process cannot be started.
    """
    schema = _schema(grammar) if grammar.kind == "json_schema" else None
    job = {"schema": schema, "source": _llguidance_text(grammar), "style": STYLE, "limits": LIMITS}
    # Isolated mode (-I), started by its path: the child imports nothing from Moesaic.
    command = [sys.executable, "-I", str(Path(_trial.__file__))]
    try:
        child = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=WAIT_SECONDS, check=False, env={}
        )
        outcome = json.loads(child.stdout)
    except subprocess.TimeoutExpired as error:
        raise grammar.error("takes too long to compile") from error
    except OSError as error:
        raise InvalidRequest(f"cannot start a process to compile a grammar ({error.strerror})") from error
    except ValueError as error:  # the child was killed by the limit on processor time or memory
        raise grammar.error(f"takes more than {_trial.CPU_SECONDS} s, or too much memory, to compile") from error
    if outcome["error"]:
        where = f"at {outcome['where'][:200]}: " if outcome["where"] else ""
        raise grammar.error(f"cannot be compiled: {where}{_one_line(outcome['error'])}")


def _one_line(error: str) -> str:
    """Return llguidance's error message as one line, with positions in words ("at line 2, character 5")."""
    error = error.replace("<non-verbose/>", "")
    if error.startswith("NoExtension"):
        return "no text matches it"
    regex = re.search(r"^ {4}( *)\^.*\nerror: (.*)", error, re.MULTILINE)  # a caret below the error
    if regex:
        return f"at character {len(regex[1]) + 1} of the expression: {regex[2]}"[:300]
    line = next((line for line in error.splitlines() if line.strip()), "no reason given")
    return re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"at line \1, character \2: ", line)[:300]


def _probe(grammar: Grammar, compiled: CompiledGrammar) -> None:
    """Generate a few tokens; raise InvalidParameter if the grammar allows nothing or is too costly."""
    matcher = compiled()
    try:
        for step in range(PROBE_TOKENS):
            ids = np.nonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))[0]
            if not len(ids):
                if step == 0:
                    reason = "allows only the empty text" if matcher.may_end else "allows no token of this model"
                    raise grammar.error(reason)
                break
            matcher.accept(int(ids[7919 * step % len(ids)]))
            if matcher.done:
                break
    except GrammarError as error:
        raise grammar.error(f"is too costly: {error}") from error


class _Vocabulary:
    """Adapter from a tokenizer to llguidance's interface: the bytes of each id, and a function that encodes text.

    One id after the model's last id stands for the end of an answer, because a grammar does not depend on which tokens
    end an answer. With ``first``, each token has the bytes that it adds at the beginning of a text. SentencePiece drops
    a leading space there, so the token " yes" stands for "yes".
    """

    def __init__(self, tokenizer: Tokenizer, size: int, first: bool) -> None:
        special = [tokenizer.is_special(token_id) for token_id in range(size)]
        self.tokens = [tokenizer.bytes(token_id, first and not special[token_id]) for token_id in range(size)]
        self.special_token_ids = [index for index in range(size) if special[index] and self.tokens[index]] + [size]
        self.tokens.append(b"<end>")
        self.eos_token_id, self.bos_token_id = size, tokenizer.bos_id
        self._tokenizer, self._first, self._size = tokenizer, first, size
        self._bytes = {
            token: index for index, token in enumerate(self.tokens[:size]) if len(token) == 1 and not special[index]
        }

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, prefix=self._first)
        if max(ids, default=0) < self._size:
            return ids
        return [part for token_id in ids for part in self._spelled(token_id)]

    def _spelled(self, token_id: int) -> list[int]:
        """Return the token itself in a list, or, if the model lacks this added token, tokens for its single bytes."""
        if token_id < self._size:
            return [token_id]
        data = self._tokenizer.bytes(token_id)
        return [self._bytes[data[i : i + 1]] for i in range(len(data)) if data[i : i + 1] in self._bytes]


class _Tables:
    """Vocabulary tables of llguidance: ``first`` for the first token of a text, ``body`` for all others.

    ``first`` is None if a token has the same bytes at the beginning of a text as elsewhere. ``special`` is a bit mask
    of the control tokens. ``blank`` is a bit mask of the tokens that add nothing to the text if they come first: a
    single space, which SentencePiece writes there if no token with a leading space matches.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        ids = range(size)
        special = np.array([tokenizer.is_special(token_id) for token_id in ids])
        blank = np.array([tokenizer.bytes(index) == b" " and not tokenizer.bytes(index, True) for index in ids])
        self.special, self.blank = _bits(special), _bits(blank & ~special)
        self.body = _table(tokenizer, size, first=False)
        self.first = _table(tokenizer, size, first=True) if tokenizer.strips_space else None

    def variants(self) -> list[LLTokenizer]:
        return [self.body] if self.first is None else [self.body, self.first]


def _bits(flags: NDArray[np.bool_]) -> NDArray[np.int32]:
    padded = np.pad(flags, (0, -len(flags) % 32))
    return np.packbits(padded, bitorder="little").view("<i4")


def _table(tokenizer: Tokenizer, size: int, *, first: bool) -> LLTokenizer:
    library = _llguidance()
    # Slices make masks cheaper; for the single mask at the beginning of a text they cost more than they save.
    slices: list[str] | None = [] if first else None
    table: LLTokenizer = library.LLTokenizer(
        library.TokenizerWrapper(_Vocabulary(tokenizer, size, first)), slices=slices
    )
    return table


class CompiledGrammar:
    """Compiled grammar; call it once for each answer to get a ``Matcher``.

    ``begins`` says whether the answer begins a text; SentencePiece then drops a leading space. Otherwise the answer
    continues a text.
    """

    def __init__(self, tables: _Tables, matchers: list[LLMatcher]) -> None:
        self._tables, self._matchers = tables, matchers

    def __call__(self, *, begins: bool = True) -> Matcher:
        matchers = self._matchers if begins else self._matchers[:1]
        return Matcher(self._tables, [matcher.deep_copy() for matcher in matchers])


class Matcher:
    """State of one answer in its grammar: which tokens may come next. Implements ``engine.request.Constraint``."""

    def __init__(self, tables: _Tables, matchers: list[LLMatcher]) -> None:
        self._tables = tables
        self._body, self._first = matchers[0], matchers[1] if len(matchers) > 1 else None
        self._mask: NDArray[np.int32] | None = None
        self._tokens, self._seconds = 0, 0.0

    def mask(self) -> NDArray[np.int32]:
        """Return a bit mask of the tokens that may come next: int32 [V / 32, rounded up], lowest bit first.

        V is the number of token ids that the model has logits for.

        Raises:
            GrammarError: the answer has used more processor time or lexer states than it may.
        """
        if self._mask is None:
            self._mask = self._compute()
        return self._mask

    def accept(self, token_id: int) -> None:
        """Add ``token_id``, the next token of the answer, to the state."""
        self._mask = None
        self._tokens += 1
        if self._first is None:
            self._body.consume_token(token_id)
        elif self._tables.tokenizer.is_special(token_id):  # the text begins after it
            self._first.consume_token(token_id)
            self._body.consume_token(token_id)
        else:
            shown = self._tables.tokenizer.bytes(token_id, first=True)
            self._body.consume_tokens(self._tables.body.tokenize_bytes(shown))
            self._first = None

    @property
    def may_end(self) -> bool:
        """Whether the answer so far matches the whole grammar, so that it may end here."""
        return self._current.is_accepting()

    @property
    def done(self) -> bool:
        """Whether the answer so far matches the whole grammar, and no token can follow."""
        if not self.may_end:
            return False
        try:
            return self._current.is_stopped() or not self.mask().any()
        except GrammarError:  # raised again when the next mask is needed
            return False

    @property
    def _current(self) -> LLMatcher:
        return self._body if self._first is None else self._first

    def _compute(self) -> NDArray[np.int32]:
        size = self._tables.size
        start = time.thread_time()
        words = np.frombuffer(self._current.compute_bitmask(), dtype="<i4")[: -(-size // 32)].copy()
        self._seconds += time.thread_time() - start
        if self._current.is_error():
            raise GrammarError(f"the answer cannot continue under its grammar: {_one_line(self._current.get_error())}")
        if self._seconds > BUDGET_SECONDS + BUDGET_SECONDS_PER_TOKEN * self._tokens:
            raise GrammarError(
                f"the grammar used {self._seconds:.1f} s of processor time for {self._tokens} tokens: simplify it"
            )
        if size % 32:  # the next bit is llguidance's end token
            words[-1] &= np.int32((1 << size % 32) - 1)
        if self._first is not None and (words & ~self._tables.special).any():
            words |= self._tables.blank
        return words
