"""The header of GGUF files: every limit, and values of each kind. test_gguf_fuzz.py damages files at random."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf as reference
import numpy as np
import pytest

from moesaic import gguf
from moesaic.errors import CheckpointError
from moesaic.gguf import GgufFile
from tests.support import gguf_files
from tests.support.gguf_files import TinyFile

MANY = (1 << 64) - 1
TEXT, ARRAY, UINT32 = 8, 9, 4


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def value(key: bytes, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def tensor(name: bytes = b"a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def header(
    values: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 256,
) -> bytes:
    """Return a file whose data begins at the next multiple of 32."""
    counts = counts or (len(tensors), len(values))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def write(content: bytes) -> GgufFile:
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        return GgufFile(path)

    return write


def test_a_file_of_the_reference_is_read(tmp_path, opened):
    tiny = TinyFile("Q4_K", experts=2)
    tiny.metadata |= {"x.text": "h\u00e9", "x.flag": True, "x.texts": ["a", "", "\u65e5"], "x.numbers": [1.5, 2.5]}
    path = tiny.write(tmp_path / "tiny.gguf")
    theirs = reference.GGUFReader(path)
    with GgufFile(path) as file:
        assert file.text("x.text") == "h\u00e9" and file.text("absent") is None
        assert file.metadata["x.flag"] is True and file.metadata["llama.block_count"] == 2
        assert file.texts("x.texts", 3) == [b"a", b"", "\u65e5".encode()]
        assert file.numbers("x.numbers", 2) == (1.5, 2.5)
        assert file.texts("absent", 1) == [] and file.numbers("absent", 1) == ()
        assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            ours = file.tensors[tensor.name]
            assert ours.shape == tuple(tensor.shape.tolist()[::-1]) and ours.type.name == tensor.tensor_type.name
            assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        alone = opened(file.header_without_tensors())
    assert alone.text("x.text") == "h\u00e9" and not alone.tensors


@pytest.mark.parametrize("version", [2, 3])
def test_the_smallest_file(version, opened):
    assert opened(header(version=version)).tensors == {}
    assert opened(header(tensors=(tensor(offset=32),), version=version)).tensors["a"].nbytes == 16


LIMITS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "other": (b"PK\3\4" + bytes(64), r"is not a GGUF file: it begins with b'PK"),
    "version 1": (header(version=1), "has version 1 of GGUF; versions 2 and 3 are supported"),
    "version 4": (header(version=4), "has version 4"),
    "big-endian": (header(version=3 << 24), "is big-endian"),
    "short": (b"GGUF" + struct.pack("<I", 3), "ends within its header"),
    "tensors": (header(counts=((1 << 16) + 1, 0), data=4 << 20), "announces 65537 tensors"),
    "tensors beyond the file": (header(counts=(100, 0)), "announces 100 tensors"),
    "values": (header(counts=(0, (1 << 16) + 1), data=4 << 20), "announces 65537 metadata values"),
    "values beyond the file": (header(counts=(0, MANY)), f"announces {MANY} metadata values"),
    "long key": (header((value(b"k" * 1025, 0, b"\1"),)), "a key has 1025 bytes"),
    "no key": (header((value(b"", 0, b"\1"),)), "a key has 0 bytes"),
    "key beyond the file": (header((struct.pack("<Q", MANY) + bytes(64),)), "a key has"),
    "key that is not UTF-8": (header((value(b"\xff", 0, b"\1"),)), "a key is not UTF-8"),
    "key twice": (header((value(b"k", 0, b"\1"),) * 2), "holds 'k' twice"),
    "type of value": (header((value(b"k", 13, bytes(16)),)), "'k' has the unknown type 13"),
    "text beyond the file": (header((value(b"k", TEXT, struct.pack("<Q", 1 << 20)),)), "ends within its header"),
    "long text": (header((value(b"k", TEXT, struct.pack("<Q", (16 << 20) + 1)),)), "announces a text of 16777217"),
    "nested array": (header((value(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "array of the unsupported type 9"),
    "array of unknown type": (header((value(b"k", ARRAY, struct.pack("<IQ", 99, 1)),)), "unsupported type 99"),
    "array beyond the file": (header((value(b"k", ARRAY, struct.pack("<IQ", UINT32, 1000)),)), "an array of 1000 el"),
    "texts beyond the file": (header((value(b"k", ARRAY, struct.pack("<IQ", TEXT, 1000)),)), "an array of 1000 el"),
    "longest array": (
        header((value(b"k", ARRAY, struct.pack("<IQ", 0, (1 << 22) + 1)),), data=5 << 20),
        "an array of 4194305 elements",
    ),
    "text in an array": (
        header((value(b"k", ARRAY, struct.pack("<IQQ", TEXT, 2, MANY)),)),
        "ends within the texts of 'k'|a text of 'k' announces",
    ),
    "no dimensions": (header(tensors=(tensor(shape=()),)), "'a' has 0 dimensions"),
    "dimensions": (header(tensors=(tensor(shape=(1,) * 5),)), "'a' has 5 dimensions"),
    "empty dimension": (header(tensors=(tensor(shape=(4, 0)),)), r"has shape \[0, 4\]"),
    "product": (header(tensors=(tensor(shape=(1 << 33, 1 << 33)),)), "truncated: 'a' ends at byte"),
    "type of tensor": (header(tensors=(tensor(kind=99),)), r"'a' has type 99 \(a type of ik_llama\.cpp\)"),
    "removed type": (header(tensors=(tensor(kind=31),)), r"has type 31 \(Q4_0 repacked for ARM, which llama\.cpp"),
    "partial block": (header(tensors=(tensor(shape=(33,), kind=2),)), r"has shape \[33\], which Q4_0 cannot store"),
    "offset": (header(tensors=(tensor(offset=8),)), "begins at byte 8 of the data, not at a multiple of 32"),
    "end": (header(tensors=(tensor(shape=(65,)),)), "truncated: 'a' ends at byte"),
    "far offset": (header(tensors=(tensor(offset=MANY - 31),)), "truncated: 'a' ends at byte"),
    "overlap": (header(tensors=(tensor(b"a", (16,)), tensor(b"b", (4,), 0, 32))), "'b' overlaps another tensor"),
    "name twice": (header(tensors=(tensor(), tensor(offset=32))), "two tensors have the same name"),
    "long name": (header(tensors=(tensor(b"n" * 1025),)), "a tensor name has 1025 bytes"),
    **{
        f"alignment {alignment}": (
            header((value(b"general.alignment", UINT32, struct.pack("<I", alignment)),)),
            f"general.alignment is {alignment}, not a power of two",
        )
        for alignment in (0, 4, 24, 8192, (1 << 32) - 1)
    },
    "alignment as text": (header((value(b"general.alignment", TEXT, text(b"32")),)), "general.alignment is Text"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name, opened):
    content, message = LIMITS[name]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            opened(content)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20  # the content that is written takes up to 5 MiB
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_the_longest_header(opened, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 1000)
    long = value(b"k", TEXT, text(b"x" * 900))
    assert opened(header((long,))).text("k") == "x" * 900
    with pytest.raises(CheckpointError, match="its header is longer than"):
        opened(header((value(b"k", TEXT, text(b"x" * 1000)),)))


def test_the_alignment_of_the_file_counts(opened):
    aligned = value(b"general.alignment", UINT32, struct.pack("<I", 8))
    assert opened(header((aligned,), (tensor(offset=24),))).tensors["a"].offset % 32 != 0


def test_a_value_of_another_type_is_refused(opened):
    file = opened(header((value(b"k", UINT32, bytes(4)), value(b"t", TEXT, text(b"\xff")))))
    for read in (file.text, lambda key: file.texts(key, 9), lambda key: file.numbers(key, 9)):
        with pytest.raises(CheckpointError, match="k is 0, expected"):
            read("k")
    with pytest.raises(CheckpointError, match="t is not UTF-8"):
        file.text("t")


def test_a_long_array_is_not_read(opened):
    file = opened(header((value(b"k", ARRAY, struct.pack("<IQ", 0, 100) + bytes(100)),)))
    with pytest.raises(CheckpointError, match="expected an array of the documented type with at most 99 elements"):
        file.numbers("k", 99)


def test_files_of_a_path(tmp_path):
    assert gguf.files(tmp_path) == [] and gguf.vocabulary(tmp_path) is None
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "tokenizer.gguf", "other.txt"):
        (tmp_path / name).write_bytes(header())
    assert [file.name for file in gguf.files(tmp_path)] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert gguf.vocabulary(tmp_path) == tmp_path / "tokenizer.gguf"
    (tmp_path / "n-00009-of-00002.gguf").write_bytes(header())  # no part of anything
    assert gguf.files(tmp_path / "n-00009-of-00002.gguf") == [tmp_path / "n-00009-of-00002.gguf"]


def test_arrays_of_metadata_may_be_long(tmp_path):
    pieces = [f"piece{number}" for number in range(130_000)]
    path = gguf_files.write(tmp_path / "long.gguf", {"k": pieces, "n": np.arange(130_000).tolist()}, {})
    with GgufFile(path) as file:
        assert file.texts("k", 1 << 20)[-1] == b"piece129999"
        assert file.numbers("n", 1 << 20)[-1] == 129_999
