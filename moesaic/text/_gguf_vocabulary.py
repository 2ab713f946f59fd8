"""Reader of the vocabulary and the chat template in a GGUF file.

There are two kinds of vocabularies. ``llama`` is SentencePiece BPE with a score for each piece (the text of a token).
``gpt2`` is byte-level BPE with a list of merges. It first splits a text into words by rules that the file names. A file
with an unknown name is refused, because its token ids would be wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.errors import TokenizerError
from moesaic.gguf import GgufFile
from moesaic.text import _sentencepiece
from moesaic.text._sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece
from moesaic.text._tiktoken import LLAMA3_PATTERN, TEKKEN_PATTERN
from moesaic.text._tokenizer_json import GPT2_PATTERN
from moesaic.text._vocabulary import MAX_IDS, Vocabulary, byte_alphabet, tokenizer_errors

UNUSED = 5
_CONTROL_NAME = re.compile(r"<\|[^|<>]{1,80}\|>")
MAX_SQUARES = 1 << 28
"""Limit for the sum of the squared lengths of all pieces. The time to find the merges grows with this sum; Llama 3's is
2^23."""
KINDS = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
LLAMA, GPT2 = "llama", "gpt2"


@dataclass(frozen=True)
class Split:
    """Rules that split a text into words before byte-level BPE merges the bytes of each word.

    The first pattern splits the text, and each further pattern splits the results. A match becomes one word, and so
    does the text between two matches. With ``whole_words``, a word that is in the vocabulary becomes that token without
    merges. ``bos`` says whether a beginning-of-text token is added if the file has no ``add_bos_token``.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False


DIGIT = r"\p{N}"
SPLITS: Mapping[str, Split] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Split((LLAMA3_PATTERN,), whole_words=True, bos=True)),
    "tekken": Split((TEKKEN_PATTERN,), whole_words=True, bos=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), Split((DIGIT, GPT2_PATTERN))),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"), Split((GPT2_PATTERN,))),
    "default": Split(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
}
"""The rules by the value of ``tokenizer.ggml.pre`` in the file; llama.cpp has defined these names."""
LLAMA3_MARK = b"<|begin_of_text|>"
"""A token that identifies Llama 3. Its first GGUF files do not name their rules, and the default rules give other ids.
"""


def read(path: Path) -> Vocabulary:
    """Return the vocabulary in a GGUF file.

    Raises:
        CheckpointError: the file is damaged.
        TokenizerError: the vocabulary is missing, is of an unknown kind, or cannot be reproduced exactly.
    """
    with GgufFile(path) as file:
        pieces = _pieces(file)
        kind = file.text("tokenizer.ggml.model")
        if kind not in (LLAMA, GPT2):
            raise TokenizerError(
                path, f"has a vocabulary of kind {kind!r:.80}; only {LLAMA!r} and {GPT2!r} are supported"
            )
        if kind == LLAMA:
            return _sentencepiece_vocabulary(file, pieces)
        return _byte_level_vocabulary(file, pieces)


def chat_template(path: Path) -> str | None:
    """Return the chat template in a GGUF file, or None if it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    with GgufFile(path) as file:
        return file.text("tokenizer.chat_template")


def _pieces(file: GgufFile) -> list[Piece]:
    """Return the entries of the vocabulary in the order of their ids.

    If the file has no scores, all scores are 0. If it has no types, all entries are normal tokens.
    """
    texts = file.texts("tokenizer.ggml.tokens", MAX_IDS)
    if not texts:
        raise TokenizerError(file.path, "has no vocabulary: fetch another file of this model")
    scores = file.numbers("tokenizer.ggml.scores", MAX_IDS) or [0.0] * len(texts)
    kinds = file.numbers("tokenizer.ggml.token_type", MAX_IDS) or [NORMAL] * len(texts)
    if not len(scores) == len(kinds) == len(texts):
        raise TokenizerError(file.path, f"has {len(texts)} tokens, but {len(scores)} scores and {len(kinds)} types")
    if not set(kinds) <= set(KINDS):
        raise TokenizerError(file.path, f"has tokens of the unknown types {sorted(set(kinds) - set(KINDS))}")
    try:
        decoded = [text.decode() for text in texts]
    except UnicodeDecodeError as error:
        raise TokenizerError(file.path, "has a token that is not UTF-8: the file is damaged") from error
    pieces = [Piece(text, score, _kind(text, kind)) for text, score, kind in zip(decoded, scores, kinds, strict=True)]
    if sum(len(piece.text) ** 2 for piece in pieces) > MAX_SQUARES:
        raise TokenizerError(file.path, "has tokens that are too long for a vocabulary: the file is damaged")
    if any(math.isnan(piece.score) for piece in pieces):
        raise TokenizerError(file.path, "has a score that is not a number: the file is damaged")
    return pieces


def _kind(text: str, kind: int) -> int:
    """Return the type of the token ``text``, which is ``kind`` in the file.

    A user-defined token with a name such as <|im_end|> counts as a control token. Many files list control tokens as
    user-defined text. A user's message with that text would then end the turn.
    """
    return CONTROL if kind == USER_DEFINED and _CONTROL_NAME.fullmatch(text) else kind


def _special(file: GgufFile, pieces: Sequence[Piece], name: str) -> str | None:
    """Return the text of the token that the file names as ``name`` ("bos" or "eos"); None if it names none."""
    token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(pieces):
        raise TokenizerError(file.path, f"{name}_token_id is {token_id!r}, but there are {len(pieces)} tokens")
    return pieces[token_id].text


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(file.path, f"tokenizer.ggml.{name} is {value!r}, expected true or false")
    return value


def _sentencepiece_vocabulary(file: GgufFile, pieces: list[Piece]) -> Vocabulary:
    _refuse_duplicates(file, pieces)
    used = [piece for piece in pieces if piece.kind != UNUSED]
    names = {piece.text for piece in used if piece.kind == BYTE}
    problem = _sentencepiece.problem_of(used, fallback=bool(names))
    if problem:
        raise TokenizerError(file.path, f"its vocabulary {problem}, which is not supported")
    vocabulary = _sentencepiece.vocabulary(
        pieces,
        bos=_special(file, pieces, "bos") if _flag(file, "add_bos_token", True) else None,
        eos=_special(file, pieces, "eos"),
        fallback=bool(names),
        add_prefix=_flag(file, "add_space_prefix", True),
    )
    return replace(vocabulary, pieces=_without_unused(vocabulary.pieces, pieces))


def _refuse_duplicates(file: GgufFile, pieces: Sequence[Piece]) -> None:
    if len({piece.text for piece in pieces}) != len(pieces) or any(not piece.text for piece in pieces):
        raise TokenizerError(file.path, "has an empty or a duplicate token: the file is damaged; fetch it again")


def _without_unused(texts: Sequence[bytes | None], pieces: Sequence[Piece]) -> list[bytes | None]:
    return [None if piece.kind == UNUSED else text for text, piece in zip(texts, pieces, strict=True)]


def _byte_level_vocabulary(file: GgufFile, pieces: list[Piece]) -> Vocabulary:
    _refuse_duplicates(file, pieces)
    split = _split(file, pieces)
    control = {piece.text: token_id for token_id, piece in enumerate(pieces) if piece.kind in (CONTROL, UNKNOWN)}
    bos = _special(file, pieces, "bos") if _flag(file, "add_bos_token", split.bos) else None
    eos = _special(file, pieces, "eos")
    ids = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    with tokenizer_errors(file.path):
        core = _core(file, pieces, ids, split)
    return Vocabulary(
        core=core,
        pieces=_without_unused(_bytes(pieces), pieces),
        control=control,
        bos_id=None if bos is None else ids[bos],
        eos_ids=frozenset() if eos is None else frozenset({ids[eos]}),
    )


def _split(file: GgufFile, pieces: Sequence[Piece]) -> Split:
    name = file.text("tokenizer.ggml.pre")
    if name is None:
        name = "llama-bpe" if any(piece.text.encode() == LLAMA3_MARK for piece in pieces) else "default"
    if name not in SPLITS:
        raise TokenizerError(file.path, f"splits text as {name!r:.80}, which is not known; known: {', '.join(SPLITS)}")
    return SPLITS[name]


def _bytes(pieces: Sequence[Piece]) -> list[bytes]:
    """Return the bytes of each token in the order of ids; for a special or added token, its text in UTF-8."""
    alphabet = byte_alphabet()
    table, characters = {ord(char): byte for byte, char in enumerate(alphabet)}, set(alphabet)
    out = []
    for text, _, kind in pieces:
        # A normal piece may also have been added as text: then it has characters that stand for no byte.
        mapped = kind in (NORMAL, BYTE) and characters.issuperset(text)
        out.append(text.translate(table).encode("latin-1") if mapped else text.encode())
    return out


def _core(file: GgufFile, pieces: Sequence[Piece], ids: dict[str, int], split: Split) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {text: token_id for text, token_id in ids.items() if pieces[token_id].kind not in (CONTROL, UNUSED)}
    merges = _merges(file, vocab)
    core = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    # These are found in the text before it is split, the longest first.
    added = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    core.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    return core


def _merges(file: GgufFile, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the BPE merges as pairs of pieces.

    In the file, a merge is one text: two pieces with a space between them. The first piece may itself begin with a
    space.
    """
    merges = []
    for line in file.texts("tokenizer.ggml.merges", MAX_IDS):
        text = line.decode("utf-8", "replace")
        first, _, second = text[1:].partition(" ")
        pair = (text[:1] + first, second)
        if pair[0] not in vocab or pair[1] not in vocab or pair[0] + pair[1] not in vocab:
            raise TokenizerError(file.path, f"has the merge {text[:40]!r} of pieces that it does not have")
        merges.append(pair)
    return merges
