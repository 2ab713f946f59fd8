"""Measure the quality and speed of the model tales; the result is a file for docs/results.

    python recipes/tales/measure.py --out docs/results/tales.json

The perplexity is that of the held-out tales. Times are those of whole processes, as the median of --runs. Run the
program on an idle machine.
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
from moesaic.bench import provenance

HERE = Path(__file__).parent
MOESAIC = [sys.executable, "-m", "moesaic.cli"]
QUESTION = "Tell me a story about a rabbit."


def seconds_until(command: list[str], size: int = 1) -> float:
    """Return the seconds until a process has printed ``size`` bytes; -1 means all of its output."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(size)
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def speed(llm: LLM, count: int, tokens: int = 128) -> float:
    """Return tokens per second for ``count`` concurrent answers, from submission to the last token."""
    start = time.perf_counter()
    llm.chat(
        [[{"role": "user", "content": f"{QUESTION} {n}"}] for n in range(count)], max_tokens=tokens, ignore_eos=True
    )
    return count * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=5, help="number of runs for each time")
    args = parser.parse_args()
    held_out = str(HERE / "tales.valid.jsonl.xz")
    quality = subprocess.run(
        [*MOESAIC, "perplexity", held_out, "tales", "--json"], capture_output=True, text=True, check=True
    )
    with LLM.load("tales") as llm:
        speed(llm, 1, 8)  # warm-up
        speeds = {n: statistics.median(speed(llm, n) for _ in range(args.runs)) for n in (1, 4, 16)}
    figures = {
        "held_out": json.loads(quality.stdout),
        "help_seconds": statistics.median(seconds_until([*MOESAIC, "--help"], -1) for _ in range(args.runs)),
        "first_token_seconds_from_cold_start": statistics.median(
            seconds_until([*MOESAIC, "chat", "tales", "-m", QUESTION]) for _ in range(args.runs)
        ),
        "answers_at_once_to_tokens_per_second": speeds,
    }
    command = f"python recipes/tales/measure.py --out {args.out}"
    provenance.write(args.out, provenance.record(command, figures))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
