"""Quantize a GGUF file with llama.cpp and an importance matrix, for comparisons with Moesaic.

    python benchmarks/llama_cpp_quantize.py SRC.gguf DST.gguf TYPE IMPORTANCE.npz

The program runs in the interpreter in which llama-cpp-python is installed, and imports nothing else but numpy. TYPE is
the name of a file type of llama.cpp, such as Q4_K_S. IMPORTANCE.npz has for each weight, by the name of its tensor, the
mean square of each input, as float32. The embedding keeps its type.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import llama_cpp
import numpy

F32 = 0
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


def importance(path: str) -> tuple[Any, list[Any]]:
    """Return llama.cpp's list of importances, which ends with an empty entry, and the memory that it points to."""
    arrays = {name.encode(): values for name, values in numpy.load(path).items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, [arrays]


def main() -> None:
    source, target, kind, matrix = sys.argv[1:]
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
    entries, memory = importance(matrix)
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = len(os.sched_getaffinity(0))
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.token_embedding_type = F32
    options.imatrix = entries
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(options))
    del memory
    if code:
        raise SystemExit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    main()
