"""The child that compiles one grammar on trial: a program of its own, run by ``compiler``.

A few lines of schema can keep the compiler busy for hours, or make it take all memory; a thread cannot
be stopped, a process can. Knows llguidance and its own limits. Imports nothing of Moesaic: reads one
JSON object from standard input, writes one to standard output.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 1


def main() -> None:
    """Set the limits, then do the one job."""
    job = json.load(sys.stdin)
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    # Before the limits, which are the grammar's. The vocabulary of single bytes takes no time to make.
    table = LLTokenizer("byte")

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    spent = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(spent.ru_utime + spent.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = LLParserLimits(**job["limits"])

    def problem(source: str) -> str:
        matcher = LLMatcher(table, source, log_level=0, limits=limits)
        matcher.compute_bitmask()  # expressions are only unfolded when they are first used
        return matcher.get_error() if matcher.is_error() else ""

    def of_schema(schema: Any) -> str:
        return problem(LLMatcher.grammar_from_json_schema(schema, overrides=job["style"]))

    if job["schema"] is None:
        outcome = {"error": problem(job["source"]), "where": ""}
    else:
        found = of_schema(job["schema"])
        outcome = {"error": found, "where": _where(job["schema"], found, of_schema) if found else ""}
    sys.stdout.write(json.dumps(outcome))


def _where(schema: Any, error: str, problem: Any) -> str:
    """Return the JSON pointer of the smallest part of ``schema`` that has the same problem when it stands alone."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    path, part = "#", schema
    while True:
        for step, child in _children(part):
            if problem(shared | child) == error:
                path, part = path + step, child
                break
        else:
            return path


def _children(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield (step of the pointer, part) for the schemas directly within a schema."""
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(schema.get(key), dict):
            yield from ((f"/{key}/{name}", child) for name, child in schema[key].items() if isinstance(child, dict))
    for key in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            yield from ((f"/{key}/{n}", child) for n, child in enumerate(schema[key]) if isinstance(child, dict))
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield f"/{key}", schema[key]


if __name__ == "__main__":
    main()
