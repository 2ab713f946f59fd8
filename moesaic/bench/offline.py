"""How fast a model answers and what memory it takes, through the same ``LLM`` and engine that a chat uses.

Knows how to time answers as a client sees them, and what a step reads. The prompts are random token ids and
the answers are drawn at temperature 1, so that tokens, and with them routing, spread as they do in text.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import engine, memory, models
from moesaic.bench import geometry, limits, report
from moesaic.engine import Sampling
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed
from moesaic.llm import BUILT_IN, LLM, Reply
from moesaic.loading import Loaded, Progress, cache_bytes_per_token, load_model
from moesaic.models import Experts
from moesaic.ops import native
from moesaic.text.tokenizer import Tokenizer

CONTEXT = 8192
"""Tokens that the cache holds, if nobody asks for others."""
BLOCK = 16
"""Places in a block of the cache."""


@dataclass(frozen=True)
class Work:
    """What is asked: ``batch`` answers at once, each of ``tokens`` tokens to a prompt of ``prompt`` tokens.

    Raises:
        InvalidParameter: a number is out of range.
    """

    prompt: int = 512
    tokens: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("tokens", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least {least}")

    @property
    def limits(self) -> engine.Limits:
        """Limits under which all answers run at once."""
        usual = engine.Limits()
        most = max(usual.sequences, self.batch)
        return engine.Limits(batch_tokens=max(usual.batch_tokens, 2 * most), sequences=most, queue=max(256, most))

    @property
    def generated(self) -> int:
        """Tokens of each answer: so many more that none is at its end before the last prompt is read."""
        if self.batch == 1:
            return self.tokens
        return self.tokens + math.ceil(self.batch * self.prompt / (self.limits.batch_tokens - self.batch))

    @property
    def length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.prompt + self.generated

    def places(self, context: int) -> int:
        """Return the places in the cache: a whole context, or more where the answers take more together."""
        blocks = max(-(-context // BLOCK), self.batch * -(-self.length // BLOCK))
        return blocks * BLOCK


@dataclass(frozen=True)
class Speed:
    """What a client sees. Tokens a second are those of all answers together."""

    first_token_seconds: float
    """From the submission to the first token of the first answer."""
    prefill_tokens_s: float
    """Prompt tokens, until every answer has begun."""
    decode_tokens_s: float
    """From then until the first answer ends."""
    decode_tokens: int
    """Tokens in that time."""
    token_seconds: float
    """Median time from one token of an answer to its next, in that time."""
    disk_bytes: int
    """Read from disk meanwhile, the prompts' time included: of a mapped model what was not in memory."""


@dataclass(frozen=True)
class Reads:
    """Bytes that a step of decoding reads, and how the experts were chosen."""

    dense: int
    """What every token needs: all but the experts, and of the embedding only a few rows, which are not counted."""
    experts: int
    """The chosen experts, each once, as many as were chosen on average."""
    cache: int
    """Keys and values, halfway through the answers."""
    experts_per_layer: float
    """Different ones in a step, on average."""
    busiest_share: float
    """The largest part of a layer's choices that one expert had; 1 / experts if they were spread evenly."""

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.cache


@dataclass(frozen=True)
class Wish:
    """Which model is to be measured, and how it is to be held.

    With ``geometry`` it is one of random weights (``layers`` None: all of its layers), else a checkpoint;
    ``packed`` is a new folder to make those weights in, mapped, so that they may be more than memory.
    ``context`` None: 8192 tokens, or as many as the model was made for. The rest is as for ``LLM.load``.
    """

    geometry: str | None = None
    layers: int | None = None
    format: str | None = None
    dtype: str = "auto"
    context: int | None = None
    packed: Path | None = None
    kv_cache_dtype: str = "auto"


def run(
    path: Path | None,
    wish: Wish,
    work: Work,
    say: Callable[[str], object] = str,
    progress: Progress | None = None,
    *,
    buffer: float = 1.0,
) -> dict[str, Any]:
    """Measure the machine, then the model, and return everything for docs/results.

    Args:
        path: a checkpoint's folder; None: the built-in model, unless there is a geometry.
        wish: which model, and how it is held.
        work: what it is asked.
        say: called with a line for each figure of the machine.
        progress: called with the bytes of weights made or read so far and in all.
        buffer: gigabytes that are read to measure the machine; given back before the model is made.

    Raises:
        InvalidParameter: something is out of range, or does not fit in memory: before anything is made.
        MoesaicError: see ``LLM.load``.
    """
    if wish.geometry is not None:
        load = _random(wish, work, progress)
    elif wish.layers is not None or wish.packed is not None:
        what = "layers" if wish.layers is not None else "packed"
        raise InvalidParameter(what, "goes with a geometry: a checkpoint is as it is")
    else:
        load = _checkpoint(path or BUILT_IN, wish, progress)
    machine = None
    if native.why_not("linear", "cpu", "int8") is None:  # what follows is of use without the kernels too
        machine = limits.measure(buffer, report=say)
        report.forget_peak()
    loaded, tokenizer, name = load()
    length = _context(wish, loaded.model.max_length, work)
    with LLM.from_loaded(
        loaded,
        tokenizer,
        name,
        context=length,
        cache_tokens=work.places(length),
        kv_cache_dtype=wish.kv_cache_dtype,
        block_size=BLOCK,
        chat_format="plain",
        limits=work.limits,
    ) as llm:
        return figures(llm, work, machine, *measure(llm, work))


Load = Callable[[], tuple[Loaded, Tokenizer, str]]


def _random(wish: Wish, work: Work, progress: Progress | None) -> Load:
    """Return what makes the model of random weights, after every refusal."""
    assert wish.geometry is not None
    name, dtype = wish.geometry, "bfloat16" if wish.dtype == "auto" else wish.dtype
    config, format = geometry.configuration(name, wish.layers), wish.format or dtype
    places = work.places(_context(wish, config["max_position_embeddings"], work))
    folder, free = wish.packed, memory.available()
    geometry.check(name, wish.layers, format, dtype, places, free, cache=wish.kv_cache_dtype, mapped=folder is not None)

    def load() -> Loaded:
        if folder is None:
            return geometry.build(config, name, format, dtype, progress)
        geometry.pack(config, folder, format, dtype, progress)
        return load_model(folder)

    # Any tokenizer does: it has a text for each id, if only an empty one.
    return lambda: (load(), Tokenizer.open(BUILT_IN), name)


def _checkpoint(path: Path, wish: Wish, progress: Progress | None) -> Load:
    tokenizer = Tokenizer.open(path)
    return lambda: (
        load_model(path, dtype=wish.dtype, weight_format=wish.format, progress=progress),
        tokenizer,
        path.name,
    )


def _context(wish: Wish, longest: int, work: Work) -> int:
    """Return how many tokens the cache is to hold at least, if a prompt and its answer fit in them."""
    length = min(CONTEXT, longest) if wish.context is None else wish.context
    if length > longest:
        raise InvalidParameter("context", f"is {length}, but the model was made for {longest} tokens")
    if work.length > length:
        raise InvalidParameter("context", f"is {length}, but a prompt and its answer have {work.length} tokens")
    return length


def measure(llm: LLM, work: Work, seed: int = 0) -> tuple[Speed, Reads]:
    """Answer ``work`` once, after a short answer to warm up.

    Raises:
        NumericalError: the model computed NaN or infinity.
    """
    draw = torch.Generator().manual_seed(seed)
    vocabulary = llm.loaded.model.vocab_size

    def submit(prompt: int, tokens: int) -> Reply:
        ids = torch.randint(vocabulary, (prompt,), generator=draw).tolist()
        return llm.submit(ids, Sampling(temperature=1.0, max_tokens=tokens, ignore_eos=True, seed=seed))[0]

    _arrivals(submit(min(8, work.prompt), 2))
    with _routes(llm.loaded.model) as chosen, ThreadPoolExecutor(work.batch) as threads:
        began, read = time.perf_counter(), _disk_bytes()
        replies = [submit(work.prompt, work.generated) for _ in range(work.batch)]
        times = list(threads.map(_arrivals, replies))
    speed = _speed(began, times, work, _disk_bytes() - read)
    return speed, _reads(llm, work, {layer: [ids for ids in all if len(ids) == work.batch] for layer, all in chosen})


def _arrivals(reply: Reply) -> list[float]:
    """Return when each token of an answer came."""
    return [time.perf_counter() for piece in reply for _ in piece.tokens]


def _disk_bytes() -> int:
    """Return how much this process had read from disks so far."""
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def _speed(began: float, times: list[list[float]], work: Work, disk_bytes: int) -> Speed:
    first, begun, ended = (
        min(each[0] for each in times),
        max(each[0] for each in times),
        min(each[-1] for each in times),
    )
    steady = [[time for time in each if begun <= time <= ended] for each in times]
    count = sum(time > begun for each in steady for time in each)
    gaps = [after - before for each in steady for before, after in pairwise(each)]
    return Speed(
        first_token_seconds=first - began,
        prefill_tokens_s=work.batch * work.prompt / (begun - began),
        decode_tokens_s=count / (ended - begun),
        decode_tokens=count,
        token_seconds=statistics.median(gaps),
        disk_bytes=disk_bytes,
    )


Routes = list[tuple[Experts, list[Tensor]]]


@contextmanager
def _routes(model: nn.Module) -> Iterator[Routes]:
    """Give what will be chosen: for each layer of experts the ids [T, k] of every step."""
    chosen: Routes = [(module, []) for module in model.modules() if isinstance(module, Experts)]

    def watch(ids: list[Tensor]) -> Any:
        return lambda _, inputs: ids.append(inputs[1])

    hooks = [layer.register_forward_pre_hook(watch(ids)) for layer, ids in chosen]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def _reads(llm: LLM, work: Work, chosen: dict[Experts, list[Tensor]]) -> Reads:
    """Return what a step read whose experts were ``chosen``: for each layer, the ids of each step."""
    model = llm.loaded.model
    total = sum(part.nbytes for part in model.parameters())
    stacks = sum(part.nbytes for layer in chosen for part in layer.parameters())
    looked_up = 0 if model.shape.tied else sum(part.nbytes for part in model.embed.parameters())
    distinct = {layer: statistics.fmean(len(ids.unique()) for ids in steps) for layer, steps in chosen.items()}
    length = work.prompt + work.generated // 2
    return Reads(
        dense=total - stacks - looked_up,
        experts=round(sum(each * _expert_bytes(layer) for layer, each in distinct.items())),
        cache=work.batch * min(length, model.window or length) * cache_bytes_per_token(model, llm.engine.cache_dtype),
        experts_per_layer=statistics.fmean(distinct.values()) if distinct else 0.0,
        busiest_share=max((_busiest(steps) for steps in chosen.values()), default=0.0),
    )


def _expert_bytes(layer: Experts) -> float:
    return sum(part.nbytes for part in layer.parameters()) / layer.experts


def _busiest(steps: list[Tensor]) -> float:
    counts = Counter(id for ids in steps for id in ids.flatten().tolist())
    return max(counts.values()) / counts.total()


def figures(llm: LLM, work: Work, machine: limits.Limits | None, speed: Speed, reads: Reads) -> dict[str, Any]:
    """Return everything for docs/results; ``machine`` None: it could not be measured."""
    model = llm.loaded.model
    weights = Counter(module.name for module in model.modules() if isinstance(module, Packed))
    steps_s = speed.decode_tokens_s / work.batch
    return {
        "model": {
            "name": llm.name,
            "layout": llm.loaded.layout,
            "layers": model.shape.num_layers,
            "parameters": models.parameters(model),
            "weights": dict(weights),
            "weight_bytes": sum(part.nbytes for part in model.parameters()),
            "context": llm.context,
            "cache_bytes": work.places(llm.context) * cache_bytes_per_token(model, llm.engine.cache_dtype),
        },
        "work": asdict(work),
        "memory": report.resident(),
        "speed": asdict(speed),
        "reads": asdict(reads) | {"total": reads.total, "gb_s": reads.total * steps_s / 1e9},
        "limits": machine and asdict(machine),
        "read_share": machine and reads.total * steps_s / 1e9 / machine.read_gb_s,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield figures as people read them."""
    model, held, speed, reads = found["model"], found["memory"], found["speed"], found["reads"]
    kinds = ", ".join(f"{count} {name}" for name, count in model["weights"].items())
    yield f"{model['name']}: {model['layers']} layers, {model['parameters'] / 1e9:.2f} billion parameters ({kinds})"
    yield f"weights {model['weight_bytes'] / 1e9:.2f} GB, cache {model['cache_bytes'] / 1e9:.2f} GB, all of it written"
    if held:
        huge = f", {held['huge'] / held['anonymous']:.0%} of it in huge pages" if held.get("huge") else ""
        own = f"own {held['anonymous'] / 1e9:.2f} GB{huge}; files {held['file'] / 1e9:.2f} GB"
        yield f"peak memory {held['peak'] / 1e9:.2f} GB; at the end: {own}"
    yield f"prompt  {speed['prefill_tokens_s']:>8.1f} tokens/s; first token after {speed['first_token_seconds']:.2f} s"
    each = f"{speed['token_seconds'] * 1e3:.0f} ms from token to token"
    yield f"answer  {speed['decode_tokens_s']:>8.2f} tokens/s over {speed['decode_tokens']} tokens; {each}"
    parts = ", ".join(f"{part} {reads[part] / 1e9:.2f}" for part in ("dense", "experts", "cache"))
    share = f" ({found['read_share']:.0%} of what was measured)" if found["read_share"] else ""
    yield f"a step reads {reads['total'] / 1e9:.2f} GB ({parts}): {reads['gb_s']:.1f} GB/s{share}"
    if speed["disk_bytes"]:
        yield f"read from disk meanwhile: {speed['disk_bytes'] / 1e9:.2f} GB"
    if reads["experts"]:
        spread = f"{reads['experts_per_layer']:.1f} experts in a layer; the busiest had {reads['busiest_share']:.0%}"
        yield f"a step uses {spread} of a layer's choices"
