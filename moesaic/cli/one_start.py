"""The process that ``moesaic bench startup`` measures: it loads a model as ``moesaic chat`` does, up to one token.

It takes a path, a name and ``LoadOptions`` as JSON from its command line. It prints the time at the end of each phase,
read from the clock that all processes share, and its memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from moesaic.cli.loading import collection_paused
from moesaic.errors import MoesaicError
from moesaic.load_options import LoadOptions

PROMPT = "Once upon a time"


def main(path: str, options: str) -> int:
    """Load the model, generate a token, and print the figures as JSON; return the exit code."""
    ends = {}
    try:
        with collection_paused():
            from moesaic import memory
            from moesaic.llm import LLM
            from moesaic.plan import make_plan

            ends["imports"] = time.monotonic()
            plan = make_plan(Path(path), LoadOptions(**json.loads(options)))
            ends["plan"] = time.monotonic()
            llm = LLM.from_plan(plan, Path(path).name)
        ends["weights"] = time.monotonic()
        with llm:
            for _ in llm.complete(PROMPT, stream=True, max_tokens=1, ignore_eos=True):
                ends.setdefault("first token", time.monotonic())
            status = memory.kilobytes(Path("/proc/self/status"))
        sizes = {"resident_bytes": status["VmRSS"], "peak_bytes": status["VmHWM"]}
        print(json.dumps({"ends": ends, "disk_bytes": memory.disk_bytes(Path("/proc/self")), **sizes}))
    except MoesaicError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
