"""Turns the tokenizer and the chat template of a folder into the metadata of a GGUF file.

A SentencePiece vocabulary becomes one of kind ``llama``, and byte-level BPE one of kind ``gpt2``. A tokenizer that
splits or merges text in a way that GGUF files cannot name is refused. The metadata is read back and compared with the
tokenizer before it is returned.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic import gguf
from moesaic.errors import TokenizerError
from moesaic.gguf import Value
from moesaic.text import _sentencepiece, _tiktoken, _tokenizer_json, template
from moesaic.text._gguf_vocabulary import GPT2, LLAMA, SPLITS, UNUSED
from moesaic.text._sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece
from moesaic.text._tiktoken import LLAMA3_PATTERN, TEKKEN_PATTERN
from moesaic.text._tokenizer_json import GPT2_PATTERN
from moesaic.text._vocabulary import BYTE_PIECES, SPACE, byte_alphabet, merges, read_bounded
from moesaic.text.tokenizer import FILES, Tokenizer, find

SAMPLES = (
    "Hello world, this is a test.",
    " two  spaces   and\ttabs\n\nand lines \r\n",
    "1234567890 3.14159 12,345 2024-01-31 ½",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # code",
    "don't we'll I'M they'Re o'clock",
    "Grüße aus Köln, naïve café, 東京タワー, Привет мир, שלום",
    "🙂🎉👩‍👩‍👧 \u0301\u200b\ufeff € ≠ ∑",
    "aaaaaaaaaaaaaaaa =================== ........ !!!???",
    "https://example.org/a_b?c=d&e=%20f CamelCaseWord snake_case_word",
    "a",
    " ",
)
"""Texts whose token ids are compared before a vocabulary is written."""
_NAMED_SPLITS = {LLAMA3_PATTERN: "llama-bpe", TEKKEN_PATTERN: "tekken", GPT2_PATTERN: "gpt-2"}
_ENDS = ("eos", "eot", "eom")
"""Names of the ids of tokens that end an answer."""


def read(path: Path, rows: int, ends: Any) -> Mapping[str, Value]:
    """Return the metadata of the tokenizer and the chat template in a folder; empty if it has no tokenizer.

    Args:
        path: the folder of a checkpoint.
        rows: the number of rows of the embedding; ids without a token become unused tokens.
        ends: the ids of the tokens that end an answer, or one id, as generation_config.json has them; None: only the
            one of the tokenizer.

    Raises:
        TokenizerError: the tokenizer is damaged or not supported, has more tokens than the embedding has rows, or
            cannot be expressed in a GGUF file.
    """
    if not path.is_dir() or not any(any(path.glob(pattern)) for pattern in FILES):
        return {}
    file, tokenizer = find(path), Tokenizer.open(path)
    values = _special(file, tokenizer, ends) | _vocabulary(file, tokenizer, rows)
    _check(file, tokenizer, values)
    chat_template = template.find(path)
    return values | ({} if chat_template is None else {"tokenizer.chat_template": chat_template})


def _vocabulary(file: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Value]:
    data = read_bounded(file)
    if data[:1] == b"{" and b'"default_num_special_tokens"' not in data:
        tree = json.loads(data)
        if any(node["type"] == "ByteLevel" for node in _tokenizer_json.nodes(tree.get("decoder"))):
            return _byte_level(file, tree, tokenizer, rows)
        return _sentencepiece_json(file, tree, tokenizer, rows)
    if data[:1] == b"{" or _tiktoken.is_ranks(data):
        return _ranked(file, tokenizer, "tekken" if data[:1] == b"{" else "llama-bpe", rows)
    return _sentencepiece_values(file, _sentencepiece.pieces(data), tokenizer, rows)


def _refused(file: Path, problem: str) -> TokenizerError:
    advice = "move the tokenizer's files away to write a GGUF file without a vocabulary"
    return TokenizerError(file, f"cannot be written into a GGUF file: {problem}; {advice}")


def _pieces(file: Path, pieces: Mapping[int, Piece], rows: int) -> dict[str, Value]:
    """Return tokens, types and scores of ``rows`` ids; ids without a token become unused tokens."""
    if max(pieces) >= rows:
        problem = f"it has {max(pieces) + 1} tokens, but the model has only {rows} rows"
        raise _refused(file, problem)
    lowest = min(piece.score for piece in pieces.values())
    whole = [pieces.get(number, Piece(f"[PAD{number}]", lowest, UNUSED)) for number in range(rows)]
    return {
        "tokenizer.ggml.tokens": [piece.text for piece in whole],
        "tokenizer.ggml.token_type": [piece.kind for piece in whole],
        "tokenizer.ggml.scores": [float(piece.score) for piece in whole],
    }


def _byte_values(
    file: Path, pieces: Mapping[int, Piece], pairs: Iterable[Sequence[str]], split: str, rows: int
) -> dict[str, Value]:
    values = _pieces(file, pieces, rows)
    del values["tokenizer.ggml.scores"]
    return values | {
        "tokenizer.ggml.model": GPT2,
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.merges": [f"{first} {second}" for first, second in pairs],
    }


def _ranked(file: Path, tokenizer: Tokenizer, split: str, rows: int) -> dict[str, Value]:
    """Return the metadata of a vocabulary of ranked bytes."""
    alphabet = byte_alphabet()
    names = {token_id: name for name, token_id in tokenizer.control.items()}
    texts = {
        number: "".join(alphabet[byte] for byte in tokenizer.bytes(number))
        for number in range(tokenizer.vocab_size)
        if number not in names
    }
    pairs = merges(texts.values(), set(texts.values()))
    pieces = {number: Piece(text, 0.0, NORMAL) for number, text in texts.items()}
    pieces |= {number: Piece(name, 0.0, CONTROL) for number, name in names.items()}
    return _byte_values(file, pieces, pairs, split, rows)


def _added(tree: Mapping[str, Any]) -> dict[int, Piece]:
    """Return the tokens of a tokenizer.json that were added to its model."""
    return {
        token["id"]: Piece(token["content"], 0.0, CONTROL if token["special"] else USER_DEFINED)
        for token in tree.get("added_tokens") or ()
    }


def _pairs(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer.json, which has each as a list or as a text with a space."""
    found = []
    for merge in tree["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        found.append((first, second))
    return found


def _byte_level(file: Path, tree: Mapping[str, Any], tokenizer: Tokenizer, rows: int) -> dict[str, Value]:
    """Return the metadata of byte-level BPE in a tokenizer.json, whose post-processor says what begins a text."""
    pieces = {number: Piece(text, 0.0, NORMAL) for text, number in tree["model"]["vocab"].items()} | _added(tree)
    begins = tokenizer.bos_id is not None and '"SpecialToken"' in json.dumps(tree.get("post_processor"))
    values = _byte_values(file, pieces, _pairs(tree), _split(file, tree), rows)
    return values | {"tokenizer.ggml.add_bos_token": begins}


def _split(file: Path, tree: Mapping[str, Any]) -> str:
    """Return the name in GGUF files of the way in which a tokenizer.json splits text into words."""
    steps = [node for node in _tokenizer_json.nodes(tree.get("pre_tokenizer")) if node["type"] != "Sequence"]
    *before, last = steps or [{"type": None}]
    if tree.get("normalizer") is not None or last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        raise _refused(file, "it changes the text before it is split into words")
    patterns = [GPT2_PATTERN] if last.get("use_regex", True) else []
    digits = [node for node in before if node["type"] == "Digits" and node.get("individual_digits")]
    patterns = [node["pattern"].get("Regex") for node in before if node["type"] == "Split"] + patterns
    name = _NAMED_SPLITS.get(patterns[0]) if len(patterns) == 1 and len(before) + len(digits) <= 1 else None
    if len(digits) == len(before) == 1 and patterns == [GPT2_PATTERN]:
        name = "smollm"
    if name is None or SPLITS[name].whole_words != bool(tree["model"].get("ignore_merges", False)):
        raise _refused(file, "GGUF files have no name for the rules by which it splits text into words")
    return name


def _sentencepiece_json(file: Path, tree: Mapping[str, Any], tokenizer: Tokenizer, rows: int) -> dict[str, Value]:
    """Return the metadata of a SentencePiece vocabulary in a tokenizer.json, whose merges give the scores."""
    vocab, unknown = tree["model"]["vocab"], tree["model"].get("unk_token")
    pieces = {number: piece._replace(text=piece.text.replace(" ", SPACE)) for number, piece in _added(tree).items()}
    for text, number in vocab.items():
        if text == unknown or number not in pieces:
            pieces[number] = Piece(text, 0.0, UNKNOWN if text == unknown else BYTE if text in BYTE_PIECES else NORMAL)
    normal = {piece.text for piece in pieces.values() if piece.kind == NORMAL}
    # Programs that derive the merges from SentencePiece also list those of special tokens, which it never merges.
    pairs = [pair for pair in _pairs(tree) if {*pair, "".join(pair)} <= normal]
    ranks: dict[str, int] = {}
    order = [ranks.setdefault("".join(pair), len(ranks)) for pair in pairs]
    if order != sorted(order) or set(merges(ranks, normal)) != set(pairs):
        raise _refused(file, "it does not merge every pair of tokens that form a token, as SentencePiece does")
    for number, piece in pieces.items():
        pieces[number] = piece._replace(score=-float(ranks.get(piece.text, len(ranks))))
    return _sentencepiece_values(file, [pieces.get(number) for number in range(max(pieces) + 1)], tokenizer, rows)


def _sentencepiece_values(
    file: Path, pieces: Sequence[Piece | None], tokenizer: Tokenizer, rows: int
) -> dict[str, Value]:
    found = {number: piece for number, piece in enumerate(pieces) if piece is not None}
    values = _pieces(file, found, rows) | {
        "tokenizer.ggml.model": LLAMA,
        "tokenizer.ggml.add_space_prefix": tokenizer.encode("a") != tokenizer.encode("a", prefix=False),
    }
    unknown = [number for number, piece in found.items() if piece.kind == UNKNOWN]
    return values | ({"tokenizer.ggml.unknown_token_id": unknown[0]} if unknown else {})


def _special(file: Path, tokenizer: Tokenizer, ends: Any) -> dict[str, Value]:
    """Return the ids of the tokens that begin and end a text."""
    listed = ends if isinstance(ends, list) else [ends]
    found = [*sorted(tokenizer.eos_ids), *(end for end in listed if type(end) is int)]
    found = list(dict.fromkeys(found))
    if len(found) > len(_ENDS):
        raise _refused(file, f"answers end at {len(found)} tokens, but a GGUF file names {len(_ENDS)}")
    values: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in zip(_ENDS, found, strict=False)
    }
    if tokenizer.bos_id is None:
        return values | {"tokenizer.ggml.add_bos_token": False}
    return {"tokenizer.ggml.add_bos_token": True, **values, "tokenizer.ggml.bos_token_id": tokenizer.bos_id}


def _check(file: Path, tokenizer: Tokenizer, values: Mapping[str, Value]) -> None:
    """Raise TokenizerError if the metadata gives other tokens than ``tokenizer``."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / gguf.VOCABULARY
        written.write_bytes(gguf.header(gguf.encode(values).values(), []))
        try:
            other = Tokenizer.open(written)
        except TokenizerError as error:
            raise _refused(file, str(error).removeprefix(f"{written}: ")) from error
    unknown = values.get("tokenizer.ggml.unknown_token_id")
    differing = [
        number
        for number in range(tokenizer.vocab_size)
        if number != unknown and tokenizer.bytes(number) != other.bytes(number)
    ]
    control = {name: number for name, number in tokenizer.control.items() if number != unknown}
    if differing or control != dict(other.control):
        raise _refused(file, f"token {differing[0] if differing else 'names'} would change")
    for text in SAMPLES:
        if tokenizer.encode(text) != other.encode(text):
            raise _refused(file, f"the token ids of {text[:20]!r} would change")
