"""Reads files of ``torch.save`` in a child process, so that this process never unpickles.

This module starts the child, waits for it with a time limit, and requests parts of tensors from it. It does not
depend on torch's file format and has no other way to read it: a file that the child refuses cannot be read.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints._views import Index, TensorInfo, bounds, sizes
from moesaic.errors import CheckpointError

TIMEOUT_SECONDS = 300.0
"""Seconds without output after which the child process counts as hanging; a disk that is not cached may be slow."""

MAX_LINE_BYTES = 64 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
"""Environment variables that the child receives. Others may contain tokens and keys."""


class TorchFile:
    """The tensors in one of the files of ``TorchFiles``, which can be read by name."""

    def __init__(self, path: Path, read_part: Callable[[str, Index], Tensor]) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._read_part = read_part

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return tensor ``name``, or the part that ``index`` selects; the child process sends only that part."""
        return self._read_part(name, bounds(index, self.tensors[name].shape))


class TorchFiles:
    """Several files written by ``torch.save``, read by one child process.

    ``files`` holds, for each, an object that returns its tensors by name.

    Raises:
        CheckpointError: a file is missing, is not a plain dictionary of dense float tensors, or the child ended or hung
            while reading it.
    """

    def __init__(self, paths: Sequence[Path], timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds
        for path in paths:
            if not path.is_file():
                raise CheckpointError(path, "cannot be read: no such file")
        self.files = [TorchFile(path, partial(self._read, position)) for position, path in enumerate(paths)]
        self._child = _start(paths)
        self._buffer = b""
        try:
            for position, name, dtype, shape in self._response(paths[0])["tensors"]:
                self.files[position].tensors[name] = TensorInfo(tuple(shape), DTYPES[dtype], paths[position])
        except BaseException:
            self.close()
            raise

    def _read(self, position: int, name: str, part: Index) -> Tensor:
        info = self.files[position].tensors[name]
        tensor = torch.empty(sizes(part), dtype=info.dtype)
        request = {"file": position, "name": name, "index": [[span.start, span.stop] for span in part]}
        self._send(json.dumps(request).encode() + b"\n", info.file)
        length = self._response(info.file)["bytes"]
        if length != tensor.nbytes:
            raise CheckpointError(info.file, f"the reader sent {length} bytes of {name}, expected {tensor.nbytes}")
        self._receive(tensor.reshape(-1).view(torch.uint8).numpy().data, info.file)
        return tensor

    def close(self) -> None:
        """Stop the child process."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.kill()
        self._child.wait()

    def _send(self, line: bytes, file: Path) -> None:
        assert self._child.stdin is not None
        try:
            os.write(self._child.stdin.fileno(), line)
        except OSError as error:
            raise self._child_error(file) from error

    def _response(self, file: Path) -> dict[str, Any]:
        """Return the next JSON line of the child process, or raise the error that it reports."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise CheckpointError(file, "lists too many tensors for a model")
            self._buffer += self._read_pipe(1 << 16, file)
        line, _, self._buffer = self._buffer.partition(b"\n")
        response: dict[str, Any] = json.loads(line)
        if "error" in response:
            raise CheckpointError(response.get("file", file), f"cannot be read safely: {response['error']}")
        return response

    def _receive(self, target: memoryview, file: Path) -> None:
        """Fill ``target`` with raw bytes that the child process sends."""
        done = min(len(self._buffer), len(target))
        target[:done] = self._buffer[:done]
        self._buffer = self._buffer[done:]
        while done < len(target):
            data = self._read_pipe(min(1 << 20, len(target) - done), file)
            target[done : done + len(data)] = data
            done += len(data)

    def _read_pipe(self, max_bytes: int, file: Path) -> bytes:
        """Return the bytes that the child process has sent: at least one, and at most ``max_bytes``."""
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        if not select.select([pipe], [], [], self._timeout_seconds)[0]:
            raise CheckpointError(file, f"the process that reads it sent nothing for {self._timeout_seconds:.0f} s")
        data = os.read(pipe, max_bytes)
        if not data:
            raise self._child_error(file)
        return data

    def _child_error(self, file: Path) -> CheckpointError:
        """Return an error with the exit status of the child process, which has closed its pipes."""
        deadline = time.monotonic() + 5
        while self._child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return CheckpointError(file, f"the process that reads it ended (exit status {self._child.returncode})")


def _start(paths: Sequence[Path]) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("_torchfile_child.py")
    packages = Path(torch.__file__).parents[1]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(script), str(packages), *(str(path.resolve()) for path in paths)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        bufsize=0,
    )
