"""What a user asks for when a model is loaded: data types, weight formats, the device, and the sizes of the cache.

This module lists the names and defaults of these options for Python, the command line and benchmarks. It does not
import torch, because the command line reads it before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.errors import InvalidParameter

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Values of ``LoadOptions.dtype``."""
CACHE_DTYPES = (*DTYPES, "int8")
"""Values of ``LoadOptions.kv_cache_dtype``."""
AUTO_FORMAT = "auto"
"""Value of ``LoadOptions.format`` that chooses by the free memory."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded. ``LLM.load`` takes these fields as keyword arguments.

    Raises:
        InvalidParameter: a value is unknown or out of range. Values that depend on the model are checked by
            ``plan.make_plan``.
    """

    dtype: str = "auto"
    """Data type of activations and plain weights: float32, bfloat16, float16, or auto, which is the dtype that the
    checkpoint is stored in."""
    format: str | None = None
    """Formats that weights are quantized to: q8, q4, q3, q2, a format, or role=format, ...; auto: the first of None,
    q8, q4, q3 and q2 that fits in memory; None: weights stay plain, and quantized weights keep their codes if a
    format can."""
    requantize: bool = False
    """Whether ``format`` may round weights that are quantized already."""
    device: str = "cpu"
    """Device that the model runs on: cpu, cuda, cuda:1, ..."""
    context: int | None = None
    """Maximum tokens of prompt and answer together; None: as many as the model supports and a quarter of the available
    memory holds."""
    cache_tokens: int | None = None
    """Tokens in the key/value cache, which all requests share; None: sixteen contexts, but at most a quarter of the
    available memory."""
    kv_cache_dtype: str = "auto"
    """Data type of the key/value cache: float32, bfloat16, float16, int8, or auto, which is that of activations."""
    block_size: int = 16
    """Tokens in a block of the key/value cache."""

    def __post_init__(self) -> None:
        for name, choices in (("dtype", DTYPES), ("kv_cache_dtype", CACHE_DTYPES)):
            if getattr(self, name) not in choices:
                raise InvalidParameter(name, f"is {getattr(self, name)!r}, expected {', '.join(choices)}")
        for name in ("cache_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(name, f"is {value}, expected at least 1")
