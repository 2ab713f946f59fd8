"""A planner's report as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moesaic.hardware import Machine
from moesaic.model_sizes import ModelSizes
from moesaic.plan import Plan
from moesaic.planner import Report, Row
from moesaic.planner.speed import CARD_READ, READING, estimate
from moesaic.text_tables import aligned


def lines(report: Report) -> Iterator[str]:
    """Yield a report as lines: the model, the machine, a table with a row for each format, and advice."""
    active = f", {report.active_parameters / 1e9:.2f} for each token"
    experts = active if report.active_parameters < 0.9 * report.parameters else ""
    count = f"{report.parameters / 1e9:.2f} billion parameters{experts}"
    yield f"{report.model}: {count}; at most {report.max_length:,} tokens"
    yield from machine_lines(report.machine)
    answers = "one answer" if report.batch == 1 else f"{report.batch} answers at the same time"
    cache = "" if report.cache_dtype == "auto" else f", cache in {report.cache_dtype}"
    yield f"planned for {answers} with a context of {report.context:,} tokens{cache}"
    yield ""
    yield from table(report)
    yield ""
    slow, fast = READING
    if report.machine.card is not None:
        yield f"Speeds on cards assume kernels that reach {CARD_READ:.0%} of the bandwidth; none was measured here."
    yield f"Speeds are tokens per second with a full context. People read {slow:.0f} to {fast:.0f} tokens a second."
    if report.machine.card is not None:
        counts = ", ".join(map(str, report.shards))
        yield f"The model can be divided over {counts} cards."
    if report.chosen is not None:
        yield f"Recommended: {report.chosen}."
    else:
        yield "Nothing fits."
    yield from report.advice


def machine_lines(machine: Machine) -> Iterator[str]:
    """Yield what is known about a machine."""
    card, host = machine.card, machine.host
    if card is not None:
        arithmetic = f"{card.bf16_top_s:,.0f} Top/s"
        each = f"{card.memory_bytes / 1e9:.1f} GB, {card.read_gb_s:,.0f} GB/s, {arithmetic} in bfloat16"
        yield f"{machine.name}: {machine.cards} x {card.name}, each with {each} (data sheet)"
    if host is not None:
        source = "measured now" if host.measured else "not measured"
        speed = f"{host.read_gb_s:.0f} GB/s, {host.int8_gop_s:,.0f} Gop/s on bytes ({source})"
        name = "main memory" if card else machine.name
        instructions = f", {host.instruction_set}" if host.instruction_set else ""
        yield f"{name}: {host.memory_bytes / 1e9:.1f} GB free, {speed}{instructions}"


def loading_lines(plan: Plan, machine: Machine) -> Iterator[str]:
    """Yield how a model is about to be loaded: its weights, its cache, and the speed to expect of one answer."""
    yield f"plan for {plan.spec.path.name} ({plan.spec.layout}) on {plan.device}:"
    yield from (f"  {group}" for group in plan.weights)
    mapped = ", mapped from disk" if plan.mapped else ""
    yield f"  weights {size_text(plan.weight_bytes)}{mapped}"
    if plan.labels:
        return
    per_token = f"{plan.cache_bytes_per_token / 1e3:.1f} kB a token"
    cache = f"{size_text(plan.cache_bytes)} for {plan.cache_tokens:,} tokens, {per_token}"
    dtype = str(plan.cache_dtype).removeprefix("torch.")
    yield f"  cache grows up to {cache} ({dtype}); context {plan.context:,} tokens"
    sizes = ModelSizes.count(plan.spec)
    yield f"  work space {size_text(sizes.workspace_bytes())} for a step"
    context = min(plan.context, 1024)
    speed = estimate(sizes, sizes.weights(), machine, 1, context)
    speeds = f"{speed_text(speed.per_answer)} tokens/s of an answer, {speed_text(speed.prompt_tokens_s)} of a prompt"
    yield f"  expected after {context:,} tokens: {speeds}"


def table(report: Report) -> Iterator[str]:
    """Yield the table of a report: a heading, and a line for each format."""
    contexts = list(report.rows[0].batches)
    heads = ["format", "bits", "weights", "cache", "total", "fits"]
    heads += [f"batch at {length // 1024}k" for length in contexts] + ["prompt", "one answer", "together", "reading"]
    yield from aligned([heads, *(_cells(row, contexts) for row in report.rows)])


def _cells(row: Row, contexts: Sequence[int]) -> list[str]:
    place = "yes, experts in main memory" if row.experts_on_host else "yes, mapped" if row.mapped else "yes"
    sizes = [size_text(number) for number in (row.weight_bytes, row.cache_bytes, row.bytes)]
    batches = [str(row.batches[length]) if row.batches[length] else "-" for length in contexts]
    if not row.fits:
        return [row.format, f"{row.bits:.2f}", *sizes, "no", *batches, "-", "-", "-", "-"]
    many = f"{speed_text(row.together.answer_tokens_s)} ({row.together.batch})" if row.together else "-"
    speeds = [speed_text(row.one.prompt_tokens_s), speed_text(row.one.per_answer), many, row.one.reading]
    return [row.format, f"{row.bits:.2f}", *sizes, place, *batches, *speeds]


def size_text(nbytes: int) -> str:
    """Return bytes as text."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def speed_text(value: float) -> str:
    """Return tokens per second as text."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
