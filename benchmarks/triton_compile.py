"""Compile every Triton kernel for several GPUs without having one, and check what the compiled code needs.

A kernel fails if it spills registers, needs more shared memory than the architecture has, or lacks the matrix
instructions that its ``Specialization`` expects. Triton's own ptxas, cuobjdump and nvdisasm are used, and no driver.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesaic.bench import provenance
from moesaic.ops import triton as kernels

EXAMPLE = """examples:
  python -m benchmarks.triton_compile --out docs/results/triton-compile.json
  python -m benchmarks.triton_compile --targets 90 --only attention
"""
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that one block of threads may use, by compute capability (CUDA C++ Programming Guide)."""
MAX_REGISTERS = 255
MATRIX = re.compile(r"HMMA|IMMA|QMMA|BMMA|HGMMA|IGMMA|QGMMA|UTC[A-Z]*MMA")
"""Instructions that multiply matrices: on Ampere and Ada, on Hopper, and on Blackwell's tensor memory."""
COUNTED = re.compile(
    rf"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?((?:{MATRIX.pattern})|LDL|STL|LDGSTS|UTMALDG)\b", re.M
)
UNSUPPORTED = re.compile(r"not supported (?:in|on) this architecture|fp8e4nv.*not supported")
"""What the compiler says of a type that an architecture lacks."""


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one architecture."""

    kernel: str
    target: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    skipped: str | None = None

    def faults(self, mma: bool) -> list[str]:
        """Return what exceeds the budget; ``mma`` says whether matrix instructions are expected."""
        if self.skipped:
            return []
        spills = self.instructions.get("LDL", 0) + self.instructions.get("STL", 0)
        checks = {
            f"{self.registers} registers, more than {MAX_REGISTERS}": self.registers > MAX_REGISTERS,
            f"{spills} loads and stores of spilled registers, {self.stack_bytes} bytes of stack": spills
            or self.stack_bytes,
            f"{self.shared_bytes} bytes of shared memory, more than {SHARED_BYTES[self.target]}": self.shared_bytes
            > SHARED_BYTES[self.target],
            "no matrix instructions": mma and not any(MATRIX.fullmatch(name) for name in self.instructions),
        }
        return [f"{self.kernel} on sm_{self.target}: {text}" for text, wrong in checks.items() if wrong]


def specializations() -> Iterator[Any]:
    """Yield the specializations of all files of kernels."""
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        yield from getattr(importlib.import_module(module.name), "specializations", lambda: ())()


def compiled(specialization: Any, target: int) -> Row:
    """Compile a kernel for an architecture, and read what it needs from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(specialization.signature)
    pointers = [at for at, name in enumerate(names) if specialization.signature[name].startswith("*")]
    source = ASTSource(
        specialization.kernel,
        specialization.signature,
        {(names.index(name),): value for name, value in specialization.constants.items()},
        {(at,): [["tt.divisibility", 16]] for at in pointers},
    )
    options = {"num_warps": specialization.warps, "num_stages": specialization.stages}
    try:
        # The compiler prints its whole input when it fails.
        with contextlib.redirect_stderr(None):
            binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        text = " ".join(str(part) for part in (error, error.__cause__) if part)
        if UNSUPPORTED.search(text):
            return Row(specialization.name, target, 0, 0, 0, {}, skipped=text.splitlines()[-1])
        raise
    registers, stack = usage(binary.asm["cubin"])
    return Row(specialization.name, target, registers, stack, binary.metadata.shared, instructions(binary.asm["cubin"]))


def usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", cubin))
    assert found is not None
    return int(found[1]), int(found[2])


def instructions(cubin: bytes) -> dict[str, int]:
    """Return how often each of the instructions that count occurs in the machine code of a kernel."""
    return dict(sorted(Counter(COUNTED.findall(tool("nvdisasm", "-c", cubin))).items()))


def tool(name: str, option: str, cubin: bytes) -> str:
    """Return what one of the programs that come with Triton prints of a kernel."""
    import triton

    program = Path(triton.__path__[0], "backends/nvidia/bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    parser.add_argument("--targets", type=int, nargs="+", choices=SHARED_BYTES, default=list(SHARED_BYTES))
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name contains this")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted; unset it")
    import triton

    rows, faults = [], []
    for specialization in specializations():
        if options.only not in specialization.name:
            continue
        for target in options.targets:
            row = compiled(specialization, target)
            rows.append(row)
            faults += row.faults(specialization.mma)
            counts = " ".join(f"{name}:{count}" for name, count in row.instructions.items())
            figures = f"{row.registers:3} registers {row.shared_bytes:6} bytes {counts}"
            print(f"{row.kernel:32} sm_{target:<3} {row.skipped or figures}", flush=True)
    if options.out:
        record = provenance.record(
            "python -m benchmarks.triton_compile", {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        )
        provenance.write(options.out, record)
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
