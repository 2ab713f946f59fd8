"""Reader of SentencePiece BPE files (``tokenizer.model``) of Llama 2 and of Mistral's versions v1, v2, v3 and v7.

The reader uses only the fields of the ModelProto message that change the result. It finds them by their numbers in the
published sentencepiece_model.proto. It refuses every model that it could not encode exactly: unigram models, character
maps, and whitespace at the end of words. It does not depend on chat formats.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moesaic.errors import TokenizerError
from moesaic.text._vocabulary import BYTE_PIECES, MAX_IDS, SPACE, Vocabulary, merges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BPE = 2
UNKNOWN_SURFACE = " \u2047 "
"""The text that the unknown token is decoded to if the file states no other."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

Field = int | bytes


class Piece(NamedTuple):
    """One token of the vocabulary, as the file stores it. ``kind`` is its type, such as NORMAL or BYTE."""

    text: str
    score: float
    kind: int


def read(path: Path, data: bytes) -> Vocabulary:
    """Return the vocabulary of a SentencePiece BPE model.

    Raises:
        TokenizerError: the file is truncated, is not a ModelProto, or holds a model that cannot be encoded exactly.
    """
    try:
        found, trainer, normalizer = _model(data)
    except (ValueError, struct.error) as error:
        raise TokenizerError(
            path, f"not a SentencePiece model, or the file is damaged ({error}); download it again"
        ) from error
    fallback = bool(trainer.get(35, 0))
    _check(path, found, trainer, normalizer, fallback)
    return vocabulary(
        found,
        bos=_text(trainer, 46, "<s>"),
        eos=_text(trainer, 47, "</s>"),
        fallback=fallback,
        add_prefix=bool(normalizer.get(3, 1)),
        unknown_surface=_text(trainer, 44, UNKNOWN_SURFACE),
    )


def pieces(data: bytes) -> list[Piece]:
    """Return the tokens of a SentencePiece model that ``read`` accepts."""
    return _model(data)[0]


def problem_of(pieces: Sequence[Piece], fallback: bool) -> str | None:
    """Return why text cannot be encoded exactly with these tokens, or None if it can.

    ``fallback`` says whether a character without a token is encoded as its bytes.
    """
    texts = {piece.text for piece in pieces}
    problems = {
        "has no pieces": not pieces,
        f"has more than {MAX_IDS} pieces": len(pieces) > MAX_IDS,
        "has duplicate pieces": len(texts) != len(pieces),
        "has an empty piece": "" in texts,
        "has no unknown piece": not any(piece.kind == UNKNOWN for piece in pieces),
        "has pieces of an unknown kind": any(
            piece.kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE) for piece in pieces
        ),
        "lacks some of the 256 byte pieces": fallback and not texts.issuperset(BYTE_PIECES),
        "has a byte piece that names no byte": any(p.kind == BYTE and p.text not in BYTE_PIECES for p in pieces),
    }
    return next((problem for problem, present in problems.items() if present), None)


def _check(
    path: Path, pieces: list[Piece], trainer: dict[int, Field], normalizer: dict[int, Field], fallback: bool
) -> None:
    problems = {
        problem_of(pieces, fallback): True,
        "is not a BPE model": trainer.get(3, 1) != BPE,
        "puts whitespace at the end of words": bool(trainer.get(24, 0)),
        "rewrites characters (a precompiled character map)": bool(normalizer.get(2, b"")),
        "removes extra whitespace": bool(normalizer.get(4, 1)),
        "does not escape whitespace": not normalizer.get(5, 1),
    }
    for problem, present in problems.items():
        if problem and present:
            raise TokenizerError(path, f"this SentencePiece model {problem}, which is not supported")


def vocabulary(
    pieces: Sequence[Piece],
    *,
    bos: str | None,
    eos: str | None,
    fallback: bool,
    add_prefix: bool,
    unknown_surface: str = UNKNOWN_SURFACE,
) -> Vocabulary:
    """Return a vocabulary of tokens that ``problem_of`` accepts.

    Args:
        pieces: the tokens in the order of ids; those whose type has no name in this module are never used.
        bos: the name of the control token that begins a text; None if there is none.
        eos: the name of the control token that ends a text; None if there is none.
        fallback: whether a character without a token is encoded as its bytes.
        add_prefix: whether a space is added in front of a text.
        unknown_surface: the text that the unknown token is decoded to.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE as BPEModel

    ids = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    by_kind = {kind: {p.text: ids[p.text] for p in pieces if p.kind == kind} for kind in range(7)}
    normal = sorted((p for p in pieces if p.kind == NORMAL), key=lambda piece: -piece.score)
    unknown = next(iter(by_kind[UNKNOWN]))
    model = BPEModel(
        vocab=by_kind[NORMAL] | by_kind[BYTE] | by_kind[UNKNOWN],
        merges=merges((piece.text for piece in normal), by_kind[NORMAL]),
        unk_token=unknown,
        byte_fallback=fallback,
        fuse_unk=True,
    )
    bos_id, eos_id = (None if name is None else by_kind[CONTROL].get(name) for name in (bos, eos))
    surface = unknown_surface.encode()
    return Vocabulary(
        core=Tokenizer(model),
        pieces=[_bytes(piece, surface) for piece in pieces],
        control=by_kind[CONTROL],
        bos_id=bos_id,
        eos_ids=frozenset() if eos_id is None else frozenset({eos_id}),
        escape_spaces=True,
        add_prefix=add_prefix,
        strip_prefix=add_prefix,
        keeps_space=frozenset([*by_kind[BYTE].values(), *by_kind[UNKNOWN].values()]),
        user_defined=by_kind[USER_DEFINED],
        byte_errors="moesaic.replace_each_byte",
    )


def _bytes(piece: Piece, unknown: bytes) -> bytes:
    match piece.kind:
        case 2:
            return unknown
        case 3:
            return piece.text.encode()
        case 6:
            return bytes([BYTE_PIECES[piece.text]])
        case _:
            return piece.text.replace(SPACE, " ").encode()


def _model(data: bytes) -> tuple[list[Piece], dict[int, Field], dict[int, Field]]:
    found: list[Piece] = []
    parts: dict[int, dict[int, Field]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1:
            found.append(_piece(dict(_fields(_as_bytes(value)))))
        elif number in parts:
            parts[number] |= dict(_fields(_as_bytes(value)))
    return found, parts[2], parts[3]


def _piece(fields: dict[int, Field]) -> Piece:
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, b"\0\0\0\0")))
    kind = fields.get(3, NORMAL)
    if not isinstance(kind, int):
        raise ValueError("a piece has no kind")
    return Piece(_text(fields, 1, ""), score, kind)


def _text(fields: dict[int, Field], number: int, default: str) -> str:
    return _as_bytes(fields[number]).decode() if number in fields else default


def _as_bytes(value: Field) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError("a field of the vocabulary file holds a number instead of text")


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Yield (field number, value) for each field of a protobuf message; every length is checked before use."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, offset = _varint(data, offset)
            yield number, value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(wire, -1)
        if wire == BYTES:
            length, offset = _varint(data, offset)
        if length < 0 or number == 0:
            raise ValueError(f"unexpected byte at offset {offset}")
        if offset + length > len(data):
            raise ValueError(f"{offset + length - len(data)} bytes are missing at the end")
        yield number, data[offset : offset + length]
        offset += length


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for index in range(10):
        if offset >= len(data):
            raise ValueError("the data ends within a number")
        value |= (data[offset] & 127) << (7 * index)
        offset += 1
        if data[offset - 1] < 128:
            return value, offset
    raise ValueError(f"unexpected byte at offset {offset}")
