"""Speed and memory of a model in the same ``LLM`` and engine that a chat uses.

This module measures answers as a client sees them, and the bytes that a step reads. Prompts are random token ids and
answers are drawn at temperature 1, so that tokens, and with them the choice of experts, spread as in real text.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic import engine, memory, published
from moesaic.bench import arithmetic, geometry, provenance, speculation
from moesaic.builtin import TALES_FOLDER
from moesaic.engine import Sampling
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed
from moesaic.hardware import limits
from moesaic.llm import LLM, Reply
from moesaic.load_options import LoadOptions
from moesaic.loading import Loaded, Progress, load_model
from moesaic.models import Decoder, Experts
from moesaic.ops import native
from moesaic.plan import Plan, make_plan, plan_spec
from moesaic.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 8192
"""Default capacity of the cache in tokens."""
BLOCK_SIZE = 16
"""Tokens in a block of the cache."""


@dataclass(frozen=True)
class Work:
    """Requests of a measurement: ``batch`` concurrent answers of ``tokens`` tokens to prompts of ``prompt`` tokens.

    Raises:
        InvalidParameter: a number is out of range.
    """

    prompt: int = 512
    tokens: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        for name, minimum in (("prompt", 1), ("tokens", 2), ("batch", 1)):
            if getattr(self, name) < minimum:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least {minimum}")

    @property
    def limits(self) -> engine.Limits:
        """Engine limits under which all answers run concurrently."""
        default = engine.Limits()
        sequences = max(default.sequences, self.batch)
        batch_tokens = max(default.batch_tokens, 2 * sequences)
        return engine.Limits(batch_tokens=batch_tokens, sequences=sequences, queue=max(256, sequences))

    @property
    def generated(self) -> int:
        """Tokens that each answer generates: enough that no answer ends before the last prompt is read."""
        if self.batch == 1:
            return self.tokens
        return self.tokens + math.ceil(self.batch * self.prompt / (self.limits.batch_tokens - self.batch))

    @property
    def length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.prompt + self.generated

    @property
    def cache_tokens(self) -> int:
        """Capacity of the cache in tokens that all answers together need."""
        return self.batch * -(-self.length // BLOCK_SIZE) * BLOCK_SIZE


@dataclass(frozen=True)
class Speed:
    """Speed as a client sees it; tokens per second are those of all answers together."""

    first_token_seconds: float
    """Seconds from the submission to the first token of the first answer."""
    prefill_tokens_s: float
    """Prompt tokens per second until every answer has started."""
    decode_tokens_s: float
    """Generated tokens per second while all answers run: from the start of the last one to the end of the first."""
    decode_tokens: int
    """Tokens generated while all answers run."""
    token_seconds: float
    """Median seconds from a token of an answer to its next token, while all answers run."""
    disk_bytes: int
    """Bytes read from disk during prompts and answers; for a mapped model, the parts that were not in memory."""


@dataclass(frozen=True)
class Reads:
    """Bytes that a decoding step reads, and statistics on the choice of experts."""

    dense: int
    """Bytes of the weights that every token needs: all but the experts and the embedding."""
    experts: int
    """Bytes of the distinct experts that a step chooses on average."""
    cache: int
    """Bytes of keys and values, halfway through the answers."""
    experts_per_layer: float
    """Average number of distinct experts per layer and step."""
    busiest_share: float
    """Largest fraction of a layer's choices that went to one expert; 1 / experts if choices were even."""

    @property
    def total(self) -> int:
        """Bytes that a step reads."""
        return self.dense + self.experts + self.cache


@dataclass(frozen=True)
class Options:
    """Model to measure, and how to load it."""

    geometry: str | None = None
    """Geometry of a model with random weights; None: a checkpoint."""
    layers: int | None = None
    """Number of layers of a geometry; None: all layers."""
    packed: Path | None = None
    """New folder for random weights, which are then mapped and may be larger than memory."""
    load: LoadOptions = field(default_factory=LoadOptions)
    """Formats and sizes; the context None means 8192 or as much as the requests need, up to the model's maximum."""


def run(
    path: Path | None,
    options: Options,
    works: Sequence[Work],
    show: Callable[[str], object] = str,
    progress: Progress | None = None,
    *,
    planned: Callable[[Plan], object] = repr,
    buffer: float = 1.0,
) -> dict[str, Any]:
    """Measure the machine, then the model, and return everything for docs/results.

    The figures of a single measurement are at the top level; those of several are in the list ``settings``.

    Args:
        path: a checkpoint's folder or file; None if ``options`` has a geometry.
        options: the model and how to load it.
        works: the requests of each measurement; the first is also that of speculation.
        show: called with a line for each figure of the machine.
        progress: called with the bytes of weights made or read so far and the total.
        planned: called with the plan of the model before it is loaded.
        buffer: gigabytes that are read to measure the machine; they are freed before the model is loaded.

    Raises:
        InvalidParameter: a value is out of range, or the model does not fit in memory; nothing was loaded yet.
        MoesaicError: the model cannot be loaded; see ``LLM.load``.
    """
    if options.geometry is not None:
        plan, load = _random(options, works, progress)
    elif options.layers is not None or options.packed is not None:
        name = "layers" if options.layers is not None else "packed"
        raise InvalidParameter(name, "requires a geometry; it does not apply to a checkpoint")
    else:
        assert path is not None, "without a geometry, there is a path"
        plan, load = _checkpoint(path, options, works, progress)
    planned(plan)
    machine = None
    if native.why_not("linear", "cpu", "int8") is None:  # the model can be measured without the kernels too
        machine = limits.measure(buffer, report=show)
        provenance.forget_peak()
    loaded, tokenizer, name = load()
    with LLM.from_loaded(
        loaded,
        tokenizer,
        name,
        chat_format="plain",
        limits=max((work.limits for work in works), key=lambda limits: limits.sequences),
        lazy_cache=False,  # page faults are no part of the speed
    ) as llm:
        settings = [
            figures(llm, work, machine, *measure(llm, work, seed))  # other prompts each time: prefixes are cached
            for seed, work in enumerate(works)
        ]
        first = works[0]
        return (
            about(llm, machine, options.load.format)
            | (settings[0] if len(settings) == 1 else {"settings": settings})
            | {"speculation": speculation.measure(llm, first.prompt, first.tokens)}
        )


Loader = Callable[[], tuple[Loaded, Tokenizer, str]]
"""Loads or makes the model; returns it with its tokenizer and its name."""


def _random(options: Options, works: Sequence[Work], progress: Progress | None) -> tuple[Plan, Loader]:
    """Check the options of a geometry, and return its plan and a function that makes its model with random weights."""
    assert options.geometry is not None
    name, folder = options.geometry, options.packed
    longest = published.configuration(name, options.layers)["max_position_embeddings"]
    sizes = _sizes(options.load, longest, works)
    plan = geometry.checked_plan(name, options.layers, sizes, memory.available(), mapped=folder is not None)

    def load() -> Loaded:
        if folder is None:
            return geometry.build(plan, progress)
        geometry.pack(plan, folder, progress)
        return load_model(make_plan(folder, replace(sizes, format=None, dtype="auto")))

    # Any tokenizer will do: it has a text, perhaps an empty one, for each id.
    return plan, lambda: (load(), Tokenizer.open(TALES_FOLDER), name)


def _checkpoint(path: Path, options: Options, works: Sequence[Work], progress: Progress | None) -> tuple[Plan, Loader]:
    tokenizer = Tokenizer.open(path)
    outline = make_plan(path, replace(options.load, context=None))
    plan = plan_spec(outline.spec, _sizes(options.load, outline.max_length, works))
    return plan, lambda: (load_model(plan, progress=progress), tokenizer, path.name)


def _sizes(options: LoadOptions, longest: int, works: Sequence[Work]) -> LoadOptions:
    """Return ``options`` with the context and the cache of measurements of a model with ``longest`` tokens.

    Raises:
        InvalidParameter: a prompt and its answer do not fit in the context.
    """
    needed = max(work.length for work in works)
    length = min(longest, max(DEFAULT_CONTEXT, needed)) if options.context is None else options.context
    if length > longest:
        raise InvalidParameter("context", f"is {length}, but the model was made for {longest} tokens")
    if needed > length:
        raise InvalidParameter("context", f"is {length}, but a prompt and its answer have {needed} tokens")
    cache = max(-(-length // BLOCK_SIZE) * BLOCK_SIZE, *(work.cache_tokens for work in works))
    return replace(options, context=length, cache_tokens=cache, block_size=BLOCK_SIZE)


def measure(llm: LLM, work: Work, seed: int = 0) -> tuple[Speed, Reads]:
    """Run the requests of ``work`` once, after a short answer as a warm-up, and again to see which experts they choose.

    Raises:
        InvalidParameter: answers are too short to run at the same time.
        NumericalError: the model computed NaN or infinity.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = llm.loaded.model.vocab_size

    def submit(prompt: int, tokens: int) -> Reply:
        ids = torch.randint(vocabulary, (prompt,), generator=generator).tolist()
        return llm.submit(ids, Sampling(1.0, max_tokens=tokens, ignore_eos=True, seed=seed, speculation=False))[0]

    def together(tokens: int) -> list[list[float]]:
        replies = [submit(work.prompt, tokens) for _ in range(work.batch)]
        return list(threads.map(_arrivals, replies))

    with ThreadPoolExecutor(work.batch) as threads:
        _arrivals(submit(min(8, work.prompt), 2))
        start, read = time.perf_counter(), _disk_bytes()
        times = together(work.generated)
        speed = _speed(start, times, work, _disk_bytes() - read)
        with _record_choices(llm.loaded.model) as choices:
            if choices:
                together(work.generated - max(0, work.tokens - OBSERVED_TOKENS))
    decoding = {layer: [ids for ids in steps if len(ids) == work.batch] for layer, steps in choices}
    return speed, _reads(llm, work, decoding)


def _arrivals(reply: Reply) -> list[float]:
    """Read an answer to its end; return the arrival time of each token, in seconds."""
    return [time.perf_counter() for piece in reply for _ in piece.tokens]


def _disk_bytes() -> int:
    """Return the bytes that this process has read from disks so far."""
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def _speed(start: float, times: list[list[float]], work: Work, disk_bytes: int) -> Speed:
    """Return the speed that the arrival ``times`` of each answer's tokens show.

    Raises:
        InvalidParameter: at no time did all answers run.
    """
    first_token = min(arrivals[0] for arrivals in times)
    all_started = max(arrivals[0] for arrivals in times)
    first_end = min(arrivals[-1] for arrivals in times)
    steady = [[time for time in arrivals if all_started <= time <= first_end] for arrivals in times]
    count = sum(time > all_started for arrivals in steady for time in arrivals)
    gaps = [after - before for arrivals in steady for before, after in pairwise(arrivals)]
    if not gaps or first_end <= all_started:
        raise InvalidParameter("tokens", f"is {work.tokens}, but an answer ended before the last one began: take more")
    return Speed(
        first_token_seconds=first_token - start,
        prefill_tokens_s=work.batch * work.prompt / (all_started - start),
        decode_tokens_s=count / (first_end - all_started),
        decode_tokens=count,
        token_seconds=statistics.median(gaps),
        disk_bytes=disk_bytes,
    )


OBSERVED_TOKENS = 16
"""Tokens of each answer whose experts are counted."""

Choices = list[tuple[Experts, list[Tensor]]]
"""For each layer of experts, the chosen expert ids [tokens, experts per token] of every step."""


@contextmanager
def _record_choices(model: Decoder) -> Iterator[Choices]:
    """Return a context with a list to which every step of ``model`` adds the experts that it chooses.

    Steps are not replayed meanwhile, which would pass the hooks by.
    """
    choices: Choices = [(module, []) for module in model.modules() if isinstance(module, Experts)]

    def recorder(steps: list[Tensor]) -> Any:
        return lambda _, inputs: steps.append(inputs[1])

    hooks = [layer.register_forward_pre_hook(recorder(steps)) for layer, steps in choices]
    recordable, model.recordable = model.recordable, False
    try:
        yield choices
    finally:
        model.recordable = recordable
        for hook in hooks:
            hook.remove()


def _reads(llm: LLM, work: Work, choices: dict[Experts, list[Tensor]]) -> Reads:
    """Return the bytes that a step reads; ``choices`` has, for each layer, the chosen expert ids of each step."""
    model, plan = llm.loaded.model, llm.loaded.plan
    stacks = sum(part.nbytes for layer in choices for part in layer.parameters())
    looked_up = 0 if model.shape.tied else sum(part.nbytes for part in model.embed.parameters())
    distinct = {layer: statistics.fmean(len(ids.unique()) for ids in steps) for layer, steps in choices.items()}
    length = work.prompt + work.generated // 2
    return Reads(
        dense=plan.weight_bytes - stacks - looked_up,
        experts=round(sum(count * _expert_bytes(layer) for layer, count in distinct.items())),
        cache=work.batch * min(length, model.window or length) * plan.cache_bytes_per_token,
        experts_per_layer=statistics.fmean(distinct.values()) if distinct else 0.0,
        busiest_share=max((_busiest(steps) for steps in choices.values()), default=0.0),
    )


def _expert_bytes(layer: Experts) -> float:
    return sum(part.nbytes for part in layer.parameters()) / layer.experts


def _busiest(steps: list[Tensor]) -> float:
    counts = Counter(expert for ids in steps for expert in ids.flatten().tolist())
    return max(counts.values()) / counts.total()


def about(llm: LLM, machine: limits.Limits | None, weight_format: str | None) -> dict[str, Any]:
    """Return what all measurements of a model share.

    ``machine`` is None if it could not be measured. ``weight_format`` is the format that was asked for, if one was.
    """
    model, plan = llm.loaded.model, llm.loaded.plan
    return {
        "model": {
            "name": llm.name,
            "format": weight_format or "as stored",
            "layout": llm.loaded.layout,
            "layers": model.shape.num_layers,
            "parameters": plan.parameters,
            "weights": dict(Counter(module.name for module in model.modules() if isinstance(module, Packed))),
            "weight_bytes": plan.weight_bytes,
            "context": llm.context,
            "cache_bytes": plan.cache_bytes,
        },
        "memory": provenance.resident(),
        "limits": machine and asdict(machine),
    }


def figures(llm: LLM, work: Work, machine: limits.Limits | None, speed: Speed, reads: Reads) -> dict[str, Any]:
    """Return the figures of a measurement as a dictionary for a results file."""
    gb_s = reads.total * speed.decode_tokens_s / work.batch / 1e9
    prompt_limit = machine and arithmetic.prompt_limit(llm.loaded.model, work.prompt, machine)
    return {
        "work": asdict(work),
        "speed": asdict(speed),
        "reads": asdict(reads) | {"total": reads.total, "gb_s": gb_s},
        "read_share": machine and gb_s / machine.read_gb_s,
        "prompt_share": prompt_limit and speed.prefill_tokens_s / prompt_limit,
    }
