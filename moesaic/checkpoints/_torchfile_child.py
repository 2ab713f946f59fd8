"""The process that unpickles: reads .pth, .pt and .bin files for its parent, and can do little else.

Run by path, isolated, with nothing of this package imported. Reads requests from standard input, one
JSON line each, and answers on standard output with one JSON line, followed by raw bytes where it says so:

    {}                                        -> {"tensors": [[file, name, dtype, shape], ...]}, once, unasked
    {"file": 0, "name": s, "index": [[a, b]]} -> {"bytes": n} and n bytes, or {"error": s}

Arguments: the folder to import torch from, then the files. Does not know what the tensors are for.
"""

import contextlib
import json
import os
import resource
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

FLOATS = ("float32", "float16", "bfloat16", "float64")
ROOM = 32 << 30  # address space besides the mapped files: what importing torch reserves, CUDA builds too


def limit(files: list[str]) -> None:
    """Give up what reading does not need: writing files, starting programs, leaving a core."""
    room = ROOM + 2 * sum(Path(file).stat().st_size for file in files)
    wanted = {"RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0, "RLIMIT_AS": room}
    for name, most in wanted.items():
        with contextlib.suppress(ValueError, OSError):  # a lower limit already holds, or the system has none
            resource.setrlimit(getattr(resource, name), (most, most))


def load(torch: Any, file: str) -> dict[str, Any]:
    """Return {name: tensor} of one file; raises whatever torch raises, or ValueError."""
    zipped = zipfile.is_zipfile(file)
    if zipped:
        for name in zipfile.ZipFile(file).namelist():
            if name.endswith("constants.pkl") or "/code/" in name:
                raise ValueError("this is a TorchScript program, not a file of weights")
    state = torch.load(file, weights_only=True, mmap=zipped, map_location="cpu")
    if not isinstance(state, dict):
        raise ValueError(f"expected a dictionary of tensors, found {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"expected only named tensors, found {name!r}: {type(tensor).__name__}")
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or kind not in FLOATS:
            raise ValueError(f"{name} is {tensor.layout} {kind} on {tensor.device}, expected plain floats")
    return state


def serve(torch: Any, states: list[dict[str, Any]], requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        asked = json.loads(line)
        tensor = states[asked["file"]][asked["name"]]
        part = tensor[tuple(slice(a, b) for a, b in asked["index"])].detach().contiguous()
        data = part.reshape(-1).view(torch.uint8).numpy().data
        say(answers, {"bytes": len(data)})
        answers.write(data)
        answers.flush()


def say(answers: IO[bytes], value: dict[str, Any]) -> None:
    answers.write(json.dumps(value).encode() + b"\n")
    answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not reach the parent as an answer
    home, *files = sys.argv[1:]
    sys.path.append(home)
    at = {"file": files[0]}
    try:
        import torch  # here, so that a failure to import is an answer too

        torch.set_num_threads(1)
        limit(files)
        states = []
        for at["file"] in files:
            states.append(load(torch, at["file"]))
        say(answers, {"tensors": listing(states)})
        at = {}  # from here on the parent knows which file it asked for
        serve(torch, states, sys.stdin.buffer, answers)
    except Exception as error:  # a dozen types come out of a hostile file; each is one refusal
        lines = str(error).strip().splitlines() or [""]
        say(answers, {"error": f"{type(error).__name__}: {lines[0][:500]}"} | at)


def listing(states: list[dict[str, Any]]) -> list[tuple[int, str, str, list[int]]]:
    """Return (file, name, dtype, shape) of every tensor."""
    return [
        (place, name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for place, state in enumerate(states)
        for name, tensor in state.items()
    ]


if __name__ == "__main__":
    main()
