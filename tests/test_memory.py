"""Mapped files as the system holds them: really on disk, really read, counted by the system."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic import memory
from tests.support.memory import resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")

PAGE_OUT = 21  # MADV_PAGEOUT
SIZE = 48 << 20


def forget(path: Path, mapped: Tensor) -> None:
    """Have the system drop a file from memory; skip the test where it does not, as on a file system in memory."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes), PAGE_OUT)
    memory.forget(path)
    if resident(mapped):
        pytest.skip("the file cannot be dropped from memory here")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    path, size = tmp_path / "sparse", 2 * memory.total()
    with path.open("wb") as file:
        file.truncate(size)
    mapped = memory.map_file(path)
    assert mapped.nbytes == size and mapped[-1] == 0
    mapped[-1] = 1  # into this process's own copy of the page
    with path.open("rb") as file:
        file.seek(size - 1)
        assert file.read() == b"\0"


def test_what_is_fetched_is_in_memory(file: Path) -> None:
    mapped = memory.map_file(file)
    forget(file, mapped)
    memory.fetch(mapped).join()
    assert resident(mapped) == SIZE


def large(mapped: Tensor) -> int:
    """Return how many bytes of a mapping lie in pages of 2 MiB."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    mine = next(block for block in blocks if block.startswith(f"{mapped.data_ptr():x}-"))
    return 1024 * int(re.search(r"^FilePmdMapped: +(\d+) kB", mine, re.M)[1])


def test_what_is_fetched_lies_in_large_pages(file: Path) -> None:
    libc, asked = ctypes.CDLL(None), memory.map_file(file)
    forget(file, asked)
    libc.madvise(ctypes.c_void_p(asked.data_ptr()), ctypes.c_size_t(SIZE), 14)  # MADV_HUGEPAGE
    asked[::4096].sum()
    if not large(asked):
        pytest.skip("this system has no large pages for files")
    del asked
    mapped = memory.map_file(file)
    forget(file, mapped)
    memory.fetch(mapped).join()
    assert large(mapped) == SIZE


def test_what_is_asked_for_early_is_read_whole(file: Path) -> None:
    mapped = memory.map_file(file)
    forget(file, mapped)
    begin, end = 4 << 20, 44 << 20  # more than any read-ahead
    memory.Early().ask(lambda: [mapped[begin + 100 : end - 100]])
    until = time.monotonic() + 30
    while resident(mapped[begin:end]) < end - begin and time.monotonic() < until:
        time.sleep(0.01)
    assert resident(mapped[begin:end]) == end - begin
    assert resident(mapped) < SIZE


def test_nothing_is_asked_for_while_nothing_is_read_from_disk(file: Path) -> None:
    mapped, early, asked = memory.map_file(file), memory.Early(), list[int]()

    def parts() -> list[Tensor]:
        asked.append(1)
        return []

    for _ in range(100 * memory.PATIENCE):  # other parts of this process may read now and then
        before = len(asked)
        early.ask(parts)
        if len(asked) == before:
            break
    assert len(asked) == before >= memory.PATIENCE
    forget(file, mapped)
    assert int(mapped[SIZE // 2]) >= 0  # which reads from disk
    early.ask(parts)
    assert len(asked) > before


def test_no_more_is_locked_than_allowed() -> None:
    parts = [torch.zeros(mmap.PAGESIZE, dtype=torch.uint8) for _ in range(4)]
    assert memory.lock(parts, 0) == 0
    assert memory.lock(parts, 3 * mmap.PAGESIZE - 1) in (0, 2 * mmap.PAGESIZE)  # 0 where locking is not permitted


def test_a_container_has_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.total()
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "none", tmp_path / "max"))
    (tmp_path / "max").write_text("max\n")
    assert memory.total() >= whole
    (tmp_path / "max").write_text("12345678\n")
    assert memory.total() == 12345678 >= memory.available()
