"""Compare what the planner expects of this machine with what ``moesaic bench offline`` then measures on it.

Each load of each model in each format runs in a process of its own. The planner gets the limits of the machine as they
were before and after it: on shared machines, the bandwidth changes from minute to minute. Memory is the largest that
the process held.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic import builtin, models, plan, text_tables
from moesaic.bench import provenance
from moesaic.hardware import Host, Machine, limits
from moesaic.load_options import LoadOptions
from moesaic.model_sizes import ModelSizes
from moesaic.model_spec import ModelSpec
from moesaic.ops import native
from moesaic.planner import PROCESS_BYTES
from moesaic.planner.speed import estimate
from moesaic.published import configuration

EXAMPLE = """example:
  python -m benchmarks.planner --out docs/results/planner.json
"""
PROMPTS, BATCHES, TOKENS = (128, 512, 1024), (1, 4, 16), 32
GEOMETRY, LAYERS = "mixtral-8x7b", 2
"""The model that does not fit in memory in each format is measured with a few of its layers."""
CASES = (
    *((builtin.SMOLLM2, text) for text in ("as stored", "q8", "q3")),
    *((GEOMETRY, text) for text in ("bfloat16", "q4", "q2")),
)
MARKS = {"memory": 0.05, "answer": 0.20, "prompt": 0.20}
"""Largest deviation that is aimed at, as a fraction of what was measured."""


@dataclass(frozen=True)
class Row:
    """One load: what was planned and measured, in bytes or tokens per second."""

    model: str
    format: str
    prompt: int
    batch: int
    quantity: str
    planned: float
    measured: float

    @property
    def deviation(self) -> float:
        """The planned value as a fraction above or below the measured one."""
        return self.planned / self.measured - 1


def spec_of(model: str, text: str) -> ModelSpec:
    """Return the description of a model of ``CASES`` in a format."""
    if model == GEOMETRY:
        formats = models.choose(text, "bfloat16")
        config = configuration(model, LAYERS)
        return ModelSpec(Path(model), "random", config, {}, torch.bfloat16, formats)
    path = builtin.find(model)
    assert path is not None
    options = LoadOptions() if text == "as stored" else LoadOptions(format=text, requantize=True)
    return plan.describe(path, options)


def measure(model: str, text: str, prompt: int, batch: int, out: Path) -> None:
    """Write the figures of ``bench offline`` for one load to ``out``, with the limits before and after it."""
    named = ["--geometry", model, "--layers", str(LAYERS)] if model == GEOMETRY else [model, "--requantize"]
    chosen = [] if text == "as stored" else ["--format", text]
    load = ["--prompt", str(prompt), "--batch", str(batch), "--tokens", str(TOKENS), "--out", str(out)]
    before = limits.measure()
    command = [sys.executable, "-m", "moesaic.cli", "bench", "offline", *named, *chosen, *load]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    figures = json.loads(out.read_text())["figures"]
    around = [before.read_gb_s, figures["limits"]["read_gb_s"], limits.measure().read_gb_s]
    out.write_text(json.dumps(figures | {"around": around}))


def compare(model: str, text: str, figures: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of one load: its memory, the speed of answers, and for one answer that of its prompt."""
    sizes = ModelSizes.count(spec_of(model, text))
    weights, found, speed = sizes.weights(), figures["limits"], figures["speed"]
    bandwidth = statistics.fmean(figures["around"])
    host = Host(1 << 40, bandwidth, found["int8_gop_s"], found["bf16_gop_s"], native.instruction_set())
    machine = Machine("this machine", host=host)
    prompt, batch = figures["work"]["prompt"], figures["work"]["batch"]
    load = (model, text, prompt, batch)
    planned = weights.nbytes + figures["model"]["cache_bytes"] + sizes.workspace_bytes() + PROCESS_BYTES
    yield Row(*load, "memory", planned, figures["memory"]["peak"])
    generated = speed["decode_tokens"] // batch
    expected = estimate(sizes, weights, machine, batch, prompt + generated // 2)
    yield Row(*load, "answer", expected.answer_tokens_s, speed["decode_tokens_s"])
    if batch == 1:
        expected = estimate(sizes, weights, machine, 1, prompt)
        yield Row(*load, "prompt", expected.prompt_tokens_s, speed["prefill_tokens_s"])


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the rows as a table, and how many of them are within the marks."""
    grid = [["model", "format", "prompt", "batch", "quantity", "planned", "measured", "deviation"]]
    for row in rows:
        scale, unit = (1e9, " GB") if row.quantity == "memory" else (1.0, "")
        values = [f"{value / scale:,.2f}{unit}" for value in (row.planned, row.measured)]
        name = [row.model, row.format, str(row.prompt), str(row.batch), row.quantity]
        grid.append([*name, *values, f"{row.deviation:+.0%}"])
    yield from text_tables.aligned(grid)
    for quantity, mark in MARKS.items():
        found = [abs(row.deviation) for row in rows if row.quantity == quantity]
        within = sum(deviation <= mark for deviation in found)
        yield f"{quantity}: {within} of {len(found)} within {mark:.0%}, the largest deviation is {max(found):.0%}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows to a JSON file")
    parser.add_argument("--keep", type=Path, help="folder of the measurements; those that are there are not repeated")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        for (model, text), prompt, batch in itertools.product(CASES, PROMPTS, BATCHES):
            file = folder / f"{model}-{text.replace(' ', '-')}-{prompt}-{batch}.json"
            if not file.exists():
                measure(model, text, prompt, batch, file)
            found = list(compare(model, text, json.loads(file.read_text())))
            print("  ".join(f"{row.quantity} {row.deviation:+.0%}" for row in found), *vars(found[0]).values())
            rows += found
    print("\n".join(lines(rows)))
    if args.out:
        figures = {"rows": [vars(row) | {"deviation": row.deviation} for row in rows], "marks": MARKS}
        provenance.write(args.out, provenance.record("python -m benchmarks.planner", figures))


if __name__ == "__main__":
    main()
