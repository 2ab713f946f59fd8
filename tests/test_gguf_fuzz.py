"""Damaged GGUF files: each opens, or is refused with one error, within limits of time and memory."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesaic import checkpoints
from moesaic.errors import CheckpointError
from moesaic.gguf import GgufFile
from moesaic.text.tokenizer import Tokenizer
from tests.support.gguf_files import TinyFile
from tests.support.sizes import sizes

MAX_SECONDS = 0.05
"""Processor time that a file may take."""
MAX_BYTES = 64 << 20
"""Memory that all files of a test together may add to the process; one of them can thus not take more."""
NUMBERS = (0, 1, 2, 8, 9, 31, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 33, 1 << 62, 1 << 63, (1 << 64) - 1)


@pytest.fixture
def bounded_memory() -> Iterator[Callable[[], None]]:
    """Return a function that bounds the memory which the process maps from then on to ``MAX_BYTES`` more."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def bound() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, before[1]))

    yield bound
    resource.setrlimit(resource.RLIMIT_AS, before)


def mutated(content: bytes, places: range, chance: random.Random) -> bytes:
    """Return ``content`` with a few changes at ``places``, or cut off."""
    out = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = min(chance.choice(places), len(out) - 1)
        match chance.randrange(6):
            case 0:
                out[place] = chance.randrange(256)
            case 1:
                out[place] ^= 1 << chance.randrange(8)
            case 2:
                out[place : place + 8] = struct.pack("<Q", chance.choice(NUMBERS))
            case 3:
                out[place : place + 4] = struct.pack("<I", chance.choice(NUMBERS) & 0xFFFFFFFF)
            case 4:
                length = chance.randrange(1, 64)
                out[place:place] = out[chance.choice(places) :][:length]
            case 5:
                del out[place : place + chance.randrange(1, 64)]
    return bytes(out[: chance.randrange(len(out))] if chance.random() < 0.05 else out)


def open_and_read(path: Path) -> None:
    """Open the weights of a file, and read each of them."""
    with checkpoints.open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def open_only(path: Path) -> None:
    checkpoints.open_checkpoint(path).close()


def open_tokenizer(path: Path) -> None:
    Tokenizer.open(path)


def refused(attempt: Callable[[Path], None], path: Path) -> bool:
    """Return whether ``attempt`` refuses a file; fail if it takes too long or raises another error.

    An attempt that takes long is repeated, because other work of the process may have taken the time.
    """
    error = None
    for _ in range(4):
        start = time.thread_time()
        try:
            attempt(path)
        except CheckpointError as refusal:
            error = refusal
        if time.thread_time() - start <= MAX_SECONDS:
            assert error is None or "\n" not in str(error)
            return error is not None
    pytest.fail(f"a file of {path.stat().st_size} bytes takes more than {MAX_SECONDS} s")


def tiny_model() -> TinyFile:
    """Return a Mixtral of 32 columns with a vocabulary."""
    tiny = TinyFile("F16", experts=2)
    tiny.tensors = {
        name: (data[..., :32, :32] if data.ndim > 1 else data[:32], kind) for name, (data, kind) in tiny.tensors.items()
    }
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab"]
    tiny.metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(token_id) for token_id in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1],
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 1,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 32,
        "llama.vocab_size": 32,
    }
    return tiny


@pytest.mark.parametrize("count", sizes(300, 90_000))
@pytest.mark.parametrize("part", ["header", "tensors"])
def test_damaged_files_are_refused_with_one_error(part, count, tmp_path, bounded_memory):
    path = tiny_model().write(tmp_path / "tiny.gguf")
    content, chance = path.read_bytes(), random.Random(3)
    with GgufFile(path) as file:
        end = min(tensor.offset for tensor in file.tensors.values())
    places = range(content.index(b"token_embd.weight") - 8 if part == "tensors" else 0, end)
    for attempt in (open_only, open_and_read, open_tokenizer):
        assert not refused(attempt, path)
    bounded_memory()
    errors = 0
    for number in range(count):
        path.write_bytes(mutated(content, places, chance))
        errors += refused(open_and_read if number % 10 == 0 else open_only, path)
        if number % 10 == 1:
            refused(open_tokenizer, path)
    assert errors > count / 4


@pytest.mark.parametrize("count", sizes(40, 20_000))
def test_damaged_split_sets_are_refused_with_one_error(count, tmp_path, bounded_memory):
    parts = TinyFile("F16").write_split(tmp_path, 3)
    contents, chance = [part.read_bytes() for part in parts], random.Random(4)
    assert not refused(open_only, tmp_path)
    bounded_memory()
    errors = 0
    for _ in range(count):
        number = chance.randrange(3)
        parts[number].write_bytes(mutated(contents[number], range(1000), chance))
        errors += refused(open_only, chance.choice((tmp_path, *parts)))
        parts[number].write_bytes(contents[number])
    assert errors > count / 4
