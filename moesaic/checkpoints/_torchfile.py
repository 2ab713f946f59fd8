"""Files written by ``torch.save``: read by a child process, so that this one never unpickles.

Knows how to start the child, how long to wait for it, and how to ask it for parts of tensors. Does not
know torch's file format, and has no other way to read it: what the child refuses stays refused.
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

PATIENCE = 300.0
"""Seconds without a byte from the child after which it counts as hanging: a cold disk may take long."""

LINE_LIMIT = 64 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
"""What the child gets to see of the environment: not the tokens and keys that may be in it."""


class TorchFile:
    """One of the files, as a store of its own."""

    def __init__(self, path: Path, ask: Callable[[str, Index], Tensor]) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._ask = ask

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return the part ``index`` of tensor ``name``; no more than that leaves the child."""
        return self._ask(name, bounds(index, self.tensors[name].shape))


class TorchFiles:
    """Several files of ``torch.save``, read by one child process; ``files`` is a store for each.

    Raises:
        CheckpointError: a file is missing, is not a plain dictionary of dense float tensors, or the child
            ended or fell silent while reading it.
    """

    def __init__(self, paths: Sequence[Path], patience: float = PATIENCE) -> None:
        self._patience = patience
        for path in paths:
            if not path.is_file():
                raise CheckpointError(path, "cannot be read: no such file")
        self.files = [TorchFile(path, partial(self._read, place)) for place, path in enumerate(paths)]
        self._child = _start(paths)
        self._rest = b""
        try:
            for place, name, kind, shape in self._answer(paths[0])["tensors"]:
                self.files[place].tensors[name] = TensorInfo(tuple(shape), DTYPES[kind], paths[place])
        except BaseException:
            self.close()
            raise

    def _read(self, place: int, name: str, part: Index) -> Tensor:
        info = self.files[place].tensors[name]
        tensor = torch.empty(sizes(part), dtype=info.dtype)
        asked = {"file": place, "name": name, "index": [[each.start, each.stop] for each in part]}
        self._send(json.dumps(asked).encode() + b"\n", info.file)
        length = self._answer(info.file)["bytes"]
        if length != tensor.nbytes:
            raise CheckpointError(info.file, f"{name} came with {length} bytes, expected {tensor.nbytes}")
        self._receive(tensor.reshape(-1).view(torch.uint8).numpy().data, info.file)
        return tensor

    def close(self) -> None:
        """End the child."""
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
            raise self._ended(file) from error

    def _answer(self, file: Path) -> dict[str, Any]:
        """Return the child's next line, or raise what it complains of."""
        while b"\n" not in self._rest:
            if len(self._rest) > LINE_LIMIT:
                raise CheckpointError(file, "lists more tensors than any model has")
            self._rest += self._more(1 << 16, file)
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CheckpointError(answer.get("file", file), f"cannot be read safely: {answer['error']}")
        return answer

    def _receive(self, into: memoryview, file: Path) -> None:
        """Fill ``into`` with the child's raw bytes."""
        done = min(len(self._rest), len(into))
        into[:done] = self._rest[:done]
        self._rest = self._rest[done:]
        while done < len(into):
            data = self._more(min(1 << 20, len(into) - done), file)
            into[done : done + len(data)] = data
            done += len(data)

    def _more(self, most: int, file: Path) -> bytes:
        """Return some bytes of the child, at least one."""
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        if not select.select([pipe], [], [], self._patience)[0]:
            raise CheckpointError(file, f"its reader said nothing for {self._patience:.0f} s and was ended")
        data = os.read(pipe, most)
        if not data:
            raise self._ended(file)
        return data

    def _ended(self, file: Path) -> CheckpointError:
        """Return the error for a child that is gone."""
        deadline = time.monotonic() + 5
        while self._child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return CheckpointError(file, f"its reader ended while reading it (exit status {self._child.returncode})")


def _start(paths: Sequence[Path]) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("_torchfile_child.py")
    home = Path(torch.__file__).parents[1]
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(script), str(home), *(str(path.resolve()) for path in paths)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        bufsize=0,
    )
