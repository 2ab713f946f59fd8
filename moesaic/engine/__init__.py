"""Token ids in, token ids out.

    engine = Engine(model)
    [stream] = engine.submit(Request(ids, Sampling(temperature=0, max_tokens=64), eos_ids=(2,)))
    for event in stream:  # Token, Token, ..., Done
        ...

A request passes ``engine`` (submit, the loop) -> ``scheduler`` (which tokens run) with ``blocks``
(where they are kept) -> ``batch`` and ``runner`` (the model) -> ``sampler`` (the next token) ->
``engine`` (events). ``growth`` knows what ends an answer. ``request``, ``growth``, ``blocks`` and
``scheduler`` import no torch, so they can be tested in any number of random ways in seconds.

Knows any model with the few attributes of ``runner.Model``. Does not know text, files or HTTP.
The names below are imported when first used: importing ``moesaic.engine`` does not import torch.
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
