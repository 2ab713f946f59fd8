"""Child process that unpickles: reads .pth, .pt and .bin files for its parent, with few other permissions.

The script is run by its path in an isolated interpreter and imports nothing of this package. It first writes a list of
all tensors. Each request for a part of a tensor is a line of JSON on standard input. Each response is a line of JSON on
standard output, which raw bytes may follow:

    (at the start)                            -> {"tensors": [[file, name, dtype, shape], ...]} or {"error": s}
    {"file": 0, "name": s, "index": [[a, b]]} -> {"bytes": n} and n bytes, or {"error": s}

Arguments: the folder to import torch from, then the files.
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
ADDRESS_SPACE = 32 << 30
"""Bytes of address space that the process may use in addition to the mapped files; importing torch with CUDA reserves
most of it."""


def drop_permissions(files: list[str]) -> None:
    """Forbid this process to write files, start programs or dump core, and limit its address space."""
    address_space = ADDRESS_SPACE + 2 * sum(Path(file).stat().st_size for file in files)
    limits = {"RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0, "RLIMIT_AS": address_space}
    for name, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a lower limit is set, or the system does not have this limit
            resource.setrlimit(getattr(resource, name), (limit, limit))


def load(torch: Any, file: str) -> dict[str, Any]:
    """Return {name: tensor} of one file; raise ValueError, or any error of torch, for a file that is refused."""
    is_zip = zipfile.is_zipfile(file)
    if is_zip:
        for name in zipfile.ZipFile(file).namelist():
            if name.endswith("constants.pkl") or "/code/" in name:
                raise ValueError("this is a TorchScript program, not a file of weights")
    state = torch.load(file, weights_only=True, mmap=is_zip, map_location="cpu")
    if not isinstance(state, dict):
        raise ValueError(f"expected a dictionary of tensors, found {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"expected only named tensors, found {name!r}: {type(tensor).__name__}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or dtype not in FLOATS:
            raise ValueError(f"{name} is {tensor.layout} {dtype} on {tensor.device}, expected plain floats")
    return state


def serve(torch: Any, states: list[dict[str, Any]], requests: IO[bytes], responses: IO[bytes]) -> None:
    """Answer requests for parts of tensors until the parent closes the pipe; ``states`` has each file's tensors."""
    for line in requests:
        request = json.loads(line)
        tensor = states[request["file"]][request["name"]]
        part = tensor[tuple(slice(a, b) for a, b in request["index"])].detach().contiguous()
        data = part.reshape(-1).view(torch.uint8).numpy().data
        send(responses, {"bytes": len(data)})
        responses.write(data)
        responses.flush()


def send(responses: IO[bytes], value: dict[str, Any]) -> None:
    responses.write(json.dumps(value).encode() + b"\n")
    responses.flush()


def main() -> None:
    responses = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not reach the parent as a response
    packages, *files = sys.argv[1:]
    sys.path.append(packages)
    current = {"file": files[0]}
    try:
        import torch  # imported here so that a failure is reported to the parent

        torch.set_num_threads(1)
        drop_permissions(files)
        states = []
        for current["file"] in files:
            states.append(load(torch, current["file"]))
        send(responses, {"tensors": listing(states)})
        current = {}  # from here on, the parent knows the file of its request
        serve(torch, states, sys.stdin.buffer, responses)
    except Exception as error:  # a malicious file can raise many types of errors; each refuses the file
        lines = str(error).strip().splitlines() or [""]
        send(responses, {"error": f"{type(error).__name__}: {lines[0][:500]}"} | current)


def listing(states: list[dict[str, Any]]) -> list[tuple[int, str, str, list[int]]]:
    """Return (number of the file, name, dtype, shape) of every tensor."""
    return [
        (position, name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for position, state in enumerate(states)
        for name, tensor in state.items()
    ]


if __name__ == "__main__":
    main()
