"""The inference engine: token ids in, token ids out.

    engine = Engine(model)
    [stream] = engine.submit(Request(ids, Sampling(temperature=0, max_tokens=64), eos_ids=(2,)))
    for event in stream:  # Token, Token, ..., Done
        ...

A request passes through ``engine`` (submission, the loop), ``scheduler`` (which tokens run) with ``blocks`` (cache
memory), ``batch`` and ``runner`` (the model), ``sampler`` (the next token), and ``engine`` again (events). ``finish``
decides what ends an answer. ``request``, ``finish``, ``blocks`` and ``scheduler`` do not import torch, so that
randomized tests of them run in seconds.

The engine runs any model with the attributes of ``runner.Model``. It does not depend on text, files or HTTP.
The names below are imported on first use: importing ``moesaic.engine`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesaic.engine.request import Done, Event, PromptLogprobs, Request, Sampling, Token
from moesaic.engine.scheduler import Limits

if TYPE_CHECKING:
    from moesaic.engine.engine import Engine, Stats, Stream

__all__ = [
    "Done",
    "Engine",
    "Event",
    "Limits",
    "PromptLogprobs",
    "Request",
    "Sampling",
    "Stats",
    "Stream",
    "Token",
]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "Stats", "Stream"):
        from moesaic.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
