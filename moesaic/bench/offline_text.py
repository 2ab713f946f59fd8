"""Text of the figures of ``bench offline``. This module formats figures and does not compute them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesaic.bench import speculation
from moesaic.text_tables import aligned, percent

Figures = Mapping[str, Any]


def settings(results: Figures) -> Sequence[Figures]:
    """Return the measurements of a result, of which a single one is at the top level."""
    found: Sequence[Figures] = results.get("settings", [results])
    return found


def lines(results: Figures) -> Iterator[str]:
    """Yield ``results``, a result of ``offline.run``, as lines of text."""
    model, memory_use = results["model"], results["memory"]
    kinds = ", ".join(f"{count} {name}" for name, count in model["weights"].items())
    yield f"{model['name']}: {model['layers']} layers, {model['parameters'] / 1e9:.2f} billion parameters ({kinds})"
    yield f"weights {model['weight_bytes'] / 1e9:.2f} GB, cache {model['cache_bytes'] / 1e9:.2f} GB"
    if memory_use:
        huge = (
            f", {memory_use['huge'] / memory_use['anonymous']:.0%} of it in huge pages"
            if memory_use.get("huge")
            else ""
        )
        own = f"own {memory_use['anonymous'] / 1e9:.2f} GB{huge}; files {memory_use['file'] / 1e9:.2f} GB"
        yield f"peak memory {memory_use['peak'] / 1e9:.2f} GB; now: {own}"
    measured = settings(results)
    yield from _single(measured[0]) if len(measured) == 1 else aligned(_grid(measured))
    yield from speculation.lines(results["speculation"])


def _grid(measured: Sequence[Figures]) -> Iterator[list[str]]:
    """Yield the cells of a table with a row for each measurement; the shares are those of the machine's limits."""
    yield ["tokens/s", "batch", "prompts", "of peak", "answers", "each", "of bandwidth", "first token"]
    for setting in measured:
        work, speed = setting["work"], setting["speed"]
        decode = speed["decode_tokens_s"]
        yield [
            f"prompts of {work['prompt']}",
            str(work["batch"]),
            f"{speed['prefill_tokens_s']:.1f}",
            percent(setting["prompt_share"]),
            f"{decode:.2f}",
            f"{decode / work['batch']:.2f}",
            percent(setting["read_share"]),
            f"{speed['first_token_seconds']:.2f} s",
        ]


def _single(results: Figures) -> Iterator[str]:
    """Yield the figures of one measurement as lines of text."""
    speed, reads = results["speed"], results["reads"]
    peak = f" ({results['prompt_share']:.0%} of the arithmetic peak)" if results["prompt_share"] else ""
    first = f"first token after {speed['first_token_seconds']:.2f} s"
    yield f"prompt  {speed['prefill_tokens_s']:>8.1f} tokens/s{peak}; {first}"
    interval = f"{speed['token_seconds'] * 1e3:.0f} ms per token"
    yield f"answer  {speed['decode_tokens_s']:>8.2f} tokens/s over {speed['decode_tokens']} tokens; {interval}"
    parts = ", ".join(f"{part} {reads[part] / 1e9:.2f}" for part in ("dense", "experts", "cache"))
    share = f" ({results['read_share']:.0%} of the measured bandwidth)" if results["read_share"] else ""
    yield f"a step reads {reads['total'] / 1e9:.2f} GB ({parts}): {reads['gb_s']:.1f} GB/s{share}"
    if speed["disk_bytes"]:
        yield f"read from disk: {speed['disk_bytes'] / 1e9:.2f} GB"
    if reads["experts"]:
        busiest = f"the busiest expert got {reads['busiest_share']:.0%} of a layer's choices"
        yield f"a step uses {reads['experts_per_layer']:.1f} experts per layer; {busiest}"
