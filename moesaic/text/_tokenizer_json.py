"""Reader of ``tokenizer.json``, the file of the ``tokenizers`` library.

The files ``special_tokens_map.json`` and ``tokenizer_config.json`` next to it name the tokens that begin and end a
text. Only BPE models and the normalizers and pre-tokenizers listed here are accepted. A regular expression must equal
one of the published patterns, because the library's engine backtracks and a crafted pattern can hang it.
Post-processors, truncation and padding are ignored: encoding returns the ids of the text and nothing else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.errors import TokenizerError
from moesaic.text._tiktoken import LLAMA3_PATTERN, TEKKEN_PATTERN
from moesaic.text._vocabulary import (
    BYTE_PIECES,
    MAX_IDS,
    SPACE,
    Vocabulary,
    byte_alphabet,
    read_bounded,
    tokenizer_errors,
)

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = frozenset({LLAMA3_PATTERN, TEKKEN_PATTERN, GPT2_PATTERN})
NORMALIZERS = frozenset({"Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD"})
SPACED = frozenset({"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})
PRE_TOKENIZERS = frozenset({"Sequence", "ByteLevel", "Metaspace", "Split", "Digits"})
BOS, EOS = ("<s>", "<|begin_of_text|>"), ("</s>", "<|end_of_text|>")  # defaults, used if no file names these tokens
Node = dict[str, Any]


def read(path: Path, data: bytes) -> Vocabulary:
    """Return the vocabulary of a ``tokenizer.json``.

    Raises:
        TokenizerError: the file is not a tokenizer.json, or uses a component that is not supported.
    """
    try:
        tree = json.loads(data)
        _check(path, tree)
        vocabulary = _vocabulary(path, tree)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise TokenizerError(path, f"not a tokenizer.json, or the file is damaged ({type(error).__name__})") from error
    return vocabulary


def _check(path: Path, tree: Node) -> None:
    """Raise TokenizerError if the model, normalizer or pre-tokenizer has a component that is not accepted."""
    if tree["model"].get("type", "BPE") != "BPE":
        raise TokenizerError(path, f"a {tree['model']['type']!r} model is not supported; only BPE is")
    for kind, allowed in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS)):
        for node in nodes(tree.get(kind)):
            if node["type"] not in allowed:
                raise TokenizerError(path, f"{kind} {node['type']!r} is not supported")
            pattern = node.get("pattern", {}).get("Regex")
            if pattern is not None and pattern not in PATTERNS:
                raise TokenizerError(path, f"{kind} has an unknown pattern, which is not executed: {pattern[:120]!r}")


def nodes(node: Node | None) -> Iterator[Node]:
    """Yield a component of a tokenizer.json, such as its decoder, and the components that it consists of."""
    if node is None:
        return
    yield node
    for key in ("normalizers", "pretokenizers", "decoders"):
        for child in node.get(key, ()):
            yield from nodes(child)


def _vocabulary(path: Path, tree: Node) -> Vocabulary:
    added = {str(token["content"]): token for token in tree.get("added_tokens") or ()}
    ids = tree["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    if not ids or not all(isinstance(token_id, int) and 0 <= token_id < MAX_IDS for token_id in ids.values()):
        raise TokenizerError(path, f"has no vocabulary, or token ids outside 0 to {MAX_IDS - 1}")
    control = {text: token["id"] for text, token in added.items() if token["special"]}
    decoders = list(nodes(tree.get("decoder")))
    byte_level = _check_decoders(path, decoders)
    fallback = any(node["type"] == "ByteFallback" for node in decoders)
    prefixless = _without_prefix(tree)
    bos, eos = _bos_and_eos(path, control)
    return Vocabulary(
        core=_core(path, tree),
        pieces=_pieces(ids, added, byte_level, fallback),
        control=control,
        bos_id=bos,
        eos_ids=frozenset() if eos is None else frozenset({eos}),
        core_without_prefix=None if prefixless == tree else _core(path, prefixless),
        prefix_only_first=any(node.get("prepend_scheme") == "first" for node in nodes(tree.get("pre_tokenizer"))),
        added_ids=frozenset(ids[text] for text in added),
        strip_prefix=any(_strips_space(node) for node in decoders),
        byte_errors="moesaic.replace_each_byte" if fallback else "replace",
    )


def _check_decoders(path: Path, decoders: list[Node]) -> bool:
    """Return whether the tokens are byte-level.

    If not, they are text with U+2581 for a space. Other decoders raise TokenizerError. The decoders are only checked,
    because Moesaic decodes by itself.
    """
    kinds = {node["type"] for node in decoders}
    if kinds == {"ByteLevel"}:
        return True
    plain = all(
        node.get("pattern", {"String": SPACE}) == {"String": SPACE}
        and node.get("replacement", SPACE) == SPACE
        and node.get("content", " ") == " "
        and (node.get("start", 0), node.get("stop", 0)) in ((0, 0), (1, 0))
        for node in decoders
    )
    if not plain or not kinds <= SPACED or not kinds & {"Replace", "Metaspace"}:
        raise TokenizerError(
            path, f"decoder {' + '.join(sorted(kinds)) or 'none'} is not supported with these settings"
        )
    return False


def _strips_space(decoder: Node) -> bool:
    if decoder["type"] == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never" and decoder.get("add_prefix_space", True))
    return bool(decoder["type"] == "Strip" and decoder["content"] == " " and decoder["start"] > 0)


def _pieces(ids: dict[str, int], added: Node, byte_level: bool, fallback: bool) -> list[bytes | None]:
    unprintable = {char: byte for byte, char in enumerate(byte_alphabet())}
    pieces: list[bytes | None] = [None] * (max(ids.values()) + 1)
    for text, token_id in ids.items():
        if text in added:
            pieces[token_id] = text.encode()
        elif byte_level:
            is_bytes = all(char in unprintable for char in text)
            pieces[token_id] = bytes(unprintable[char] for char in text) if is_bytes else text.encode()
        elif fallback and text in BYTE_PIECES:
            pieces[token_id] = bytes([BYTE_PIECES[text]])
        else:
            pieces[token_id] = text.replace(SPACE, " ").encode()
    return pieces


def _core(path: Path, tree: Node) -> Any:
    from tokenizers import Tokenizer

    model = tree["model"] | {"dropout": None}  # with dropout, encoding would be random
    with tokenizer_errors(path):
        core = Tokenizer.from_str(json.dumps(tree | {"model": model, "truncation": None, "padding": None}))
    core.encode_special_tokens = True
    return core


def _without_prefix(tree: Node) -> Node:
    """Return a copy of tokenizer.json's content that does not add a space in front of a text."""
    prefixless = copy.copy(tree)
    normalizer, pre_tokenizer = copy.deepcopy((tree.get("normalizer"), tree.get("pre_tokenizer")))
    if normalizer and normalizer["type"] == "Prepend":
        normalizer = None
    for node in nodes(normalizer):
        if node["type"] == "Sequence":
            node["normalizers"] = [child for child in node["normalizers"] if child["type"] != "Prepend"]
    for node in nodes(pre_tokenizer):
        if node.get("prepend_scheme", "never") != "never":
            node["prepend_scheme"] = "never"
        if node.get("add_prefix_space"):
            node["add_prefix_space"] = False
    return prefixless | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


def _bos_and_eos(path: Path, control: dict[str, int]) -> tuple[int | None, int | None]:
    """Return the ids of the tokens that begin and end a text; None for a token that the vocabulary lacks.

    The files next to ``path`` name these tokens; otherwise the usual names are tried.
    """
    settings: Node = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = path.parent / name
        if file.is_file():
            settings |= {key: value for key, value in _object(file).items() if key in ("bos_token", "eos_token")}
    bos, eos = (
        (_content(settings[key]),) if key in settings else defaults
        for key, defaults in (("bos_token", BOS), ("eos_token", EOS))
    )
    ids = [next((control[text] for text in texts if text in control), None) for texts in (bos, eos)]
    return ids[0], ids[1]


def _object(path: Path) -> Node:
    try:
        tree = json.loads(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(path, "is not JSON: the file is damaged; download it again") from error
    if not isinstance(tree, dict):
        raise TokenizerError(path, "is not a JSON object")
    return tree


def _content(token: Any) -> str:
    """Return the text of a special token, which the JSON file stores as a string or as an object with ``content``."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
