"""Compiles grammars for a vocabulary, and keeps track of where in one an answer is.

Knows llguidance (an optional dependency, imported when first used), and how it sees a vocabulary. Does
not know the engine: a ``Matcher`` has what ``engine.request.Constraint`` asks for, and no more.

A grammar is written by whoever sends a request, so that it is bounded on every side: its length
(``grammar``), a trial in a child process with limits (``_trial``), a walk of a few tokens in the
caller's thread, and a budget of processor time for the answer, past which it ends with an error.
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

CACHED = 128  # compiled grammars kept
CACHED_BYTES = 4 << 20  # ... and their sources together
COMPILING = 2  # at the same time
MAX_PARTS = 16  # tried, to find the one at fault
WAIT_SECONDS = 10.0

LIMITS: dict[str, Any] = {"max_lexer_states": 20_000, "verbose_errors": False}
"""Of llguidance: the states of an answer's lexer take one or two kilobytes each; the other defaults are low enough."""

SECONDS_AT_ONCE, SECONDS_PER_TOKEN = 0.5, 0.005
"""What an answer may spend on masks: an ordinary one costs a hundredth of it, and everybody's step waits for it."""

WALK = 8
"""Tokens of an answer that are tried before a grammar is accepted: what is too costly shows in the first few."""


class Compiler:
    """Compiles grammars for one vocabulary, and keeps the last ones. Safe to share among threads.

    The tables of the vocabulary (some tenths of a second) are made when the first grammar comes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size`` is the model's, which may be more than the tokenizer's: what is more is never allowed."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tables: _Tables | None = None
        self._known: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(COMPILING)

    def compile(self, grammar: Grammar) -> Compiled:
        """Return what makes a constraint for each answer.

        Raises:
            InvalidParameter: no grammar, one that llguidance cannot do, or one that costs too much; says where.
            Overloaded: too many are being compiled.
            NotInstalled: llguidance is not here.
        """
        with self._lock:
            if grammar.source in self._known:
                self._known.move_to_end(grammar.source)
                return self._known[grammar.source]
        if not self._turns.acquire(timeout=WAIT_SECONDS):
            raise Overloaded("too many grammars are being compiled: try again later")
        try:
            compiled = self._compile(grammar)
        except InvalidParameter:
            for part in grammar.parts[:MAX_PARTS]:
                try_out(part)
            raise
        finally:
            self._turns.release()
        with self._lock:
            self._known[grammar.source] = compiled
            while len(self._known) > CACHED or sum(map(len, self._known)) > CACHED_BYTES:
                self._known.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> Compiled:
        library = _llguidance()
        try_out(grammar)
        tables = self._vocabulary()
        limits = library.LLParserLimits(**LIMITS)
        matchers = [library.LLMatcher(table, _text(grammar), log_level=0, limits=limits) for table in tables.all()]
        compiled = Compiled(tables, matchers)
        for matcher in matchers:
            if matcher.is_error():
                raise grammar.error(f"is not understood: {_readable(matcher.get_error())}")
        _walk(grammar, compiled)
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


def _text(grammar: Grammar) -> str:
    """Return the grammar as llguidance takes it."""
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


def try_out(grammar: Grammar) -> None:
    """Compile a grammar in a child process with limits, so that one without end is found there.

    Raises:
        InvalidParameter: it is not understood, or takes too much time or memory.
        InvalidRequest: no process can be started.
    """
    schema = _schema(grammar) if grammar.kind == "json_schema" else None
    job = {"schema": schema, "source": _text(grammar), "style": STYLE, "limits": LIMITS}
    # Isolated (-I), and by its path, as ``template`` runs its child.
    command = [sys.executable, "-I", str(Path(_trial.__file__))]
    try:
        child = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=WAIT_SECONDS, check=False, env={}
        )
        outcome = json.loads(child.stdout)
    except subprocess.TimeoutExpired as error:
        raise grammar.error("takes too long to compile") from error
    except OSError as error:
        raise InvalidRequest(f"no process can be started to compile a grammar ({error.strerror})") from error
    except ValueError as error:  # it was stopped, by the processor's clock or for want of memory
        raise grammar.error(f"takes more than {_trial.CPU_SECONDS} s, or too much memory, to compile") from error
    if outcome["error"]:
        where = f"at {outcome['where'][:200]}: " if outcome["where"] else ""
        raise grammar.error(f"is not understood: {where}{_readable(outcome['error'])}")


def _readable(error: str) -> str:
    """Return llguidance's message in one line, places as words."""
    error = error.replace("<non-verbose/>", "")
    if error.startswith("NoExtension"):
        return "nothing can satisfy it"
    regex = re.search(r"^ {4}( *)\^.*\nerror: (.*)", error, re.MULTILINE)  # a caret under the fault
    if regex:
        return f"at character {len(regex[1]) + 1} of the expression: {regex[2]}"[:300]
    line = next((line for line in error.splitlines() if line.strip()), "no reason is given")
    return re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"at line \1, character \2: ", line)[:300]


def _walk(grammar: Grammar, compiled: Compiled) -> None:
    """Begin an answer, so that a grammar nobody can begin or pay for is refused before anybody waits for it."""
    matcher = compiled()
    try:
        for step in range(WALK):
            ids = np.nonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))[0]
            if not len(ids):
                if step == 0:
                    why = "allows only the empty text" if matcher.may_end else "fits no token of this model"
                    raise grammar.error(why)
                break
            matcher.accept(int(ids[7919 * step % len(ids)]))
            if matcher.done:
                break
    except GrammarError as error:
        raise grammar.error(f"is too costly: {error}") from error


class _Vocabulary:
    """A tokenizer as llguidance wants to see one: the bytes of each id, and how text is cut into ids.

    One more token than the model has is the end: which of the model's ids end an answer is not for a
    grammar to know. With ``first`` it is the vocabulary of an answer's beginning, where SentencePiece
    drops a leading space: " yes" there says "yes".
    """

    def __init__(self, tokenizer: Tokenizer, size: int, first: bool) -> None:
        special = [tokenizer.is_special(id) for id in range(size)]
        self.tokens = [tokenizer.bytes(id, first and not special[id]) for id in range(size)] + [b"<end>"]
        self.eos_token_id, self.bos_token_id = size, tokenizer.bos_id
        self.special_token_ids = [id for id in range(size) if special[id] and self.tokens[id]] + [size]
        self._tokenizer, self._first = tokenizer, first

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, prefix=self._first)


class _Tables:
    """A vocabulary as llguidance keeps it; ``first`` is None where a beginning is like any other place.

    ``blank`` has the bits of tokens that show nothing at a beginning (SentencePiece's lone space, with
    which it begins whatever no piece with a space begins), ``special`` those of control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        special = np.array([tokenizer.is_special(id) for id in range(size)])
        blank = np.array([tokenizer.bytes(id) == b" " and not tokenizer.bytes(id, True) for id in range(size)])
        self.special, self.blank = _bits(special), _bits(blank & ~special)
        self.body = _table(tokenizer, size, first=False)
        self.first = _table(tokenizer, size, first=True) if tokenizer.strips_space else None

    def all(self) -> list[LLTokenizer]:
        return [self.body] if self.first is None else [self.body, self.first]


def _bits(flags: NDArray[np.bool_]) -> NDArray[np.int32]:
    padded = np.pad(flags, (0, -len(flags) % 32))
    return np.packbits(padded, bitorder="little").view("<i4")


def _table(tokenizer: Tokenizer, size: int, *, first: bool) -> LLTokenizer:
    library = _llguidance()
    # Slices make masks cheaper; for the one mask of a beginning they cost more than they save.
    slices: list[str] | None = [] if first else None
    table: LLTokenizer = library.LLTokenizer(
        library.TokenizerWrapper(_Vocabulary(tokenizer, size, first)), slices=slices
    )
    return table


class Compiled:
    """A compiled grammar: call it for each answer's ``Matcher``.

    ``begins`` says whether the answer begins a text, where a leading space is not shown, or goes on with one.
    """

    def __init__(self, tables: _Tables, matchers: list[LLMatcher]) -> None:
        self._tables, self._matchers = tables, matchers

    def __call__(self, *, begins: bool = True) -> Matcher:
        used = self._matchers if begins else self._matchers[:1]
        return Matcher(self._tables, [matcher.deep_copy() for matcher in used])


class Matcher:
    """Where an answer is in its grammar; see ``engine.request.Constraint`` for what is promised."""

    def __init__(self, tables: _Tables, matchers: list[LLMatcher]) -> None:
        self._tables = tables
        self._body, self._first = matchers[0], matchers[1] if len(matchers) > 1 else None
        self._mask: NDArray[np.int32] | None = None
        self._tokens, self._spent = 0, 0.0

    def mask(self) -> NDArray[np.int32]:
        """Return the tokens that may come next, a bit for each.

        Raises:
            GrammarError: it would take more time, or more states, than an answer may have.
        """
        if self._mask is None:
            self._mask = self._compute()
        return self._mask

    def accept(self, id: int) -> None:
        """Enter the next token."""
        self._mask = None
        self._tokens += 1
        if self._first is None:
            self._body.consume_token(id)
        elif self._tables.tokenizer.is_special(id):  # what follows it is still a beginning
            self._first.consume_token(id)
            self._body.consume_token(id)
        else:
            said = self._tables.tokenizer.bytes(id, first=True)
            self._body.consume_tokens(self._tables.body.tokenize_bytes(said))
            self._first = None

    @property
    def may_end(self) -> bool:
        """Whether the answer is whole as it stands."""
        return self._now.is_accepting()

    @property
    def done(self) -> bool:
        """Whether it is whole and nothing can follow."""
        if not self.may_end:
            return False
        try:
            return self._now.is_stopped() or not self.mask().any()
        except GrammarError:  # which comes again when the next token is wanted
            return False

    @property
    def _now(self) -> LLMatcher:
        return self._body if self._first is None else self._first

    def _compute(self) -> NDArray[np.int32]:
        size = self._tables.size
        began = time.thread_time()
        words = np.frombuffer(self._now.compute_bitmask(), dtype="<i4")[: -(-size // 32)].copy()
        self._spent += time.thread_time() - began
        if self._now.is_error():
            raise GrammarError(f"the answer cannot go on under its grammar: {_readable(self._now.get_error())}")
        if self._spent > SECONDS_AT_ONCE + SECONDS_PER_TOKEN * self._tokens:
            raise GrammarError(f"the grammar took {self._spent:.1f} s of processor time after {self._tokens} tokens")
        if size % 32:  # the end of llguidance's own is the first bit behind
            words[-1] &= np.int32((1 << size % 32) - 1)
        if self._first is not None and (words & ~self._tables.special).any():
            words |= self._tables.blank
        return words
