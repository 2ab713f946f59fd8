"""Reader of ranked byte vocabularies (tiktoken): Llama 3's ``tokenizer.model`` and Mistral's ``tekken.json``.

Llama 3's file has lines of base64 and rank, Mistral's file is JSON. The result is a byte-level BPE tokenizer that
merges the pair with the lowest rank first. SentencePiece files have another reader (``_sentencepiece``).
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from moesaic.errors import TokenizerError
from moesaic.text._vocabulary import MAX_IDS, Vocabulary, byte_alphabet, merges

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA3_RANKS = 128_000
LLAMA3_SPECIALS = 256
# The names are those of Llama 3.1, which named some tokens that Llama 3 only reserved.
LLAMA3_NAMED = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"),
    *("python_tag", "image"),
)
# The first tekken files give ids to the special tokens, but no names. These are the names that they imply.
TEKKEN_NAMED = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def is_ranks(data: bytes) -> bool:
    """Return whether ``data`` begins with a line of base64 and rank; SentencePiece files begin otherwise."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", data) is not None


def read_ranks(path: Path, data: bytes) -> Vocabulary:
    """Return the vocabulary of Llama 3's ``tokenizer.model``; each line has a token's bytes in base64 and its rank.

    The number of ranks must be Llama 3's. The ids of the special tokens follow the ranks, so they would be wrong if
    lines at the end of the file were missing.

    Raises:
        TokenizerError: a line is malformed, the ranks have gaps, or the number of ranks is wrong.
    """
    pieces: list[bytes] = []
    for number, line in enumerate(data.splitlines(), 1):
        fields = line.split()
        try:
            piece, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (IndexError, ValueError) as error:  # binascii.Error is a ValueError
            raise TokenizerError(
                path, f"line {number} is not base64 and a rank: the file is damaged; download it again"
            ) from error
        if rank != len(pieces):
            raise TokenizerError(
                path, f"line {number} has rank {rank}, expected {len(pieces)}: the file is damaged; download it again"
            )
        pieces.append(piece)
    if len(pieces) != LLAMA3_RANKS:
        raise TokenizerError(path, f"has {len(pieces)} ranks, but Llama 3 has {LLAMA3_RANKS}: download it again")
    reserved = (f"reserved_special_token_{2 + n}" for n in range(LLAMA3_SPECIALS - len(LLAMA3_NAMED)))
    names = [f"<|{name}|>" for name in (*LLAMA3_NAMED, *reserved)]
    control = {name: len(pieces) + index for index, name in enumerate(names)}
    return _vocabulary(path, pieces, 0, control, LLAMA3_PATTERN, "<|begin_of_text|>", "<|end_of_text|>", None)


def read_tekken(path: Path, data: bytes) -> Vocabulary:
    """Return the vocabulary of a ``tekken.json``.

    Raises:
        TokenizerError: the file is not a tekken file, its split pattern is not known, or its ranks have gaps.
    """
    try:
        tree = json.loads(data)
        config = tree["config"]
        size, specials = _count(config["default_vocab_size"]), _count(config["default_num_special_tokens"])
        names = _special_names(tree.get("special_tokens"), specials)
        pieces = _tekken_pieces(tree["vocab"], size - specials)
        pattern, version = str(config["pattern"]), str(config.get("version"))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise TokenizerError(
            path, f"not a tekken file, or the file is damaged ({type(error).__name__}: {error})"
        ) from error
    if pattern != TEKKEN_PATTERN:
        raise TokenizerError(path, f"has an unknown split pattern, which is not executed: {pattern[:120]!r}")
    control = {name: token_id for token_id, name in enumerate(names)}
    return _vocabulary(path, pieces, specials, control, pattern, "<s>", "</s>", version)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value <= MAX_IDS:
        raise ValueError(f"{value!r} is not a number of tokens")
    return value


def _special_names(entries: Any, count: int) -> list[str]:
    names = list(TEKKEN_NAMED) if entries is None else [""] * len(entries)
    for entry in entries or ():
        names[_count(entry["rank"] + 1) - 1] = str(entry["token_str"])
    names += [f"<SPECIAL_{token_id}>" for token_id in range(len(names), count)]
    if len(set(names)) != count or "" in names:
        raise ValueError("special tokens are missing or have duplicate names")
    return names


def _tekken_pieces(entries: Any, count: int) -> list[bytes]:
    if count < 256 or len(entries) < count:
        raise ValueError(f"{len(entries)} pieces, but the header announces {count}")
    pieces = []
    for rank, entry in enumerate(entries[:count]):
        if entry["rank"] != rank:
            raise ValueError(f"rank {entry['rank']}, expected {rank}")
        pieces.append(base64.b64decode(entry["token_bytes"], validate=True))
    return pieces


def _vocabulary(
    path: Path,
    pieces: list[bytes],
    offset: int,
    control: dict[str, int],
    pattern: str,
    bos: str,
    eos: str,
    version: str | None,
) -> Vocabulary:
    """Return a vocabulary from the tokens' bytes by rank; the token of rank r gets the id r + ``offset``."""
    unique = set(pieces)
    if len(unique) != len(pieces) or b"" in unique:
        raise TokenizerError(path, "has an empty or a duplicate piece: the file is damaged; download it again")
    if not unique.issuperset(bytes([byte]) for byte in range(256)):
        raise TokenizerError(path, "lacks some of the 256 single bytes: the file is damaged; download it again")
    names: list[bytes] = [name.encode() for name in control]
    return Vocabulary(
        core=byte_level(pieces, offset, pattern),
        pieces=[*names, *pieces] if offset else [*pieces, *names],
        control=control,
        bos_id=control[bos],
        eos_ids=frozenset({control[eos]}),
        version=version,
    )


def byte_level(pieces: list[bytes], offset: int, pattern: str) -> Any:
    """Return a ``tokenizers.Tokenizer`` that merges bytes by rank within the matches of ``pattern``.

    ``pieces`` are the tokens' bytes by rank. The token of rank r gets the id r + ``offset``.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    # Map each byte to one character: latin-1 and translate() are much faster than joining single characters.
    alphabet = dict(enumerate(byte_alphabet()))
    texts = [piece.decode("latin-1").translate(alphabet) for piece in pieces]
    vocab = {text: offset + rank for rank, text in enumerate(texts)}
    # ignore_merges: like tiktoken, take a whole word that is in the vocabulary without merging its parts.
    core = Tokenizer(BPE(vocab=vocab, merges=merges(texts, vocab), ignore_merges=True))
    core.pre_tokenizer = Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return core
