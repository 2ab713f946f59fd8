"""Fixtures: the published tokenizer files, which come with the reference packages."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.text._tiktoken import TEKKEN_NAMED
from moesaic.text.tokenizer import Tokenizer
from tests.support.require import package_folder


@pytest.fixture(scope="session")
def files() -> dict[str, Path]:
    mistral = package_folder("mistral_common") / "data"
    return {
        "v1": mistral / "tokenizer.model.v1",
        "v2": mistral / "mistral_instruct_tokenizer_240216.model.v2",
        "v3": mistral / "mistral_instruct_tokenizer_240323.model.v3",
        "v7": mistral / "mistral_instruct_tokenizer_241114.model.v7",
        "tekken": mistral / "tekken_240911.json",
        "llama3": package_folder("llama_models") / "llama3" / "tokenizer.model",
    }


@pytest.fixture(scope="session")
def opened(files: dict[str, Path]) -> Callable[[str], Tokenizer]:
    """Return a function that opens a tokenizer by name; each file is opened once, because large ones take a second."""
    return functools.cache(lambda name: Tokenizer.open(files[name]))


@pytest.fixture(scope="session")
def later_tekken(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a small tekken file of a version that no package contains."""

    def make(version: str) -> Path:
        tree = json.loads(files["tekken"].read_bytes())
        names = [*TEKKEN_NAMED, "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]
        names += [f"<SPECIAL_{token_id}>" for token_id in range(len(names), 1000)]
        tree["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
        tree["vocab"] = tree["vocab"][:2000]
        tree["config"] |= {"version": version, "default_vocab_size": 3000, "num_vocab_tokens": 2000}
        path = tmp_path_factory.mktemp(version) / "tekken.json"
        path.write_text(json.dumps(tree))
        return path

    return functools.cache(make)
