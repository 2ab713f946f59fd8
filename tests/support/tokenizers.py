"""Small tokenizers: a token for each byte, and special tokens behind them."""

from __future__ import annotations

import json
from pathlib import Path

from moesaic.text._vocabulary import byte_alphabet
from moesaic.text.tokenizer import Tokenizer

LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)


def byte_tokenizer(folder: Path, specials: tuple[str, ...], bos: str | None, eos: str) -> Tokenizer:
    """Write a tokenizer in the layout of transformers and open it. Special tokens have the ids from 256 on."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": 256 + index, "content": name, **flags} for index, name in enumerate(specials)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(byte_alphabet())}, "merges": []}
    tree = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    return Tokenizer.open(folder)
