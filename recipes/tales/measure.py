"""Measures the built-in model and what it costs to start: figures for docs/results, with their origin.

    python recipes/tales/measure.py --out docs/results/tales.json

Perplexity is read from the held-out tales; times are of whole processes, the median of --runs. Run it
on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from moesaic import LLM
from moesaic.bench import report

HERE = Path(__file__).parent
MOESAIC = [sys.executable, "-m", "moesaic.cli"]
QUESTION = "Tell me a story about a rabbit."


def seconds_until(command: list[str], size: int = 1) -> float:
    """Return how long a process takes to print its first ``size`` bytes; -1 for all of them."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(size)
        taken = time.perf_counter() - began
        process.kill()
    return taken


def speed(llm: LLM, count: int, tokens: int = 128) -> float:
    """Return tokens per second of ``count`` answers at once, from the submission to the last token."""
    began = time.perf_counter()
    llm.chat(
        [[{"role": "user", "content": f"{QUESTION} {i}"}] for i in range(count)], max_tokens=tokens, ignore_eos=True
    )
    return count * tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=5, help="runs of each time")
    args = parser.parse_args()
    held_out = str(HERE / "tales.valid.jsonl.xz")
    quality = subprocess.run([*MOESAIC, "perplexity", held_out, "--json"], capture_output=True, text=True, check=True)
    with LLM.load() as llm:
        speed(llm, 1, 8)  # first use
        speeds = {n: statistics.median(speed(llm, n) for _ in range(args.runs)) for n in (1, 4, 16)}
    figures = {
        "held_out": json.loads(quality.stdout),
        "help_seconds": statistics.median(seconds_until([*MOESAIC, "--help"], -1) for _ in range(args.runs)),
        "first_token_seconds_from_cold_start": statistics.median(
            seconds_until([*MOESAIC, "chat", "-m", QUESTION]) for _ in range(args.runs)
        ),
        "answers_at_once_to_tokens_per_second": speeds,
    }
    command = f"python recipes/tales/measure.py --out {args.out}"
    report.write(args.out, report.record(command, figures))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
