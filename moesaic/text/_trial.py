"""Child process that compiles one grammar under resource limits; the module ``compiler`` starts it.

A few lines of JSON schema can keep the compiler busy for hours or exhaust the memory. A thread cannot be stopped, but a
process can. The program imports nothing from Moesaic. It reads one JSON object from standard input and writes one to
standard output.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 1


def main() -> None:
    """Read the request from standard input, set the resource limits, compile the grammar, and write its error."""
    job = json.load(sys.stdin)
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    # Made before the limits are set, which are for the grammar alone. A vocabulary of single bytes is cheap to make.
    table = LLTokenizer("byte")

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = LLParserLimits(**job["limits"])

    def grammar_error(source: str) -> str:
        matcher = LLMatcher(table, source, log_level=0, limits=limits)
        matcher.compute_bitmask()  # llguidance expands expressions only when they are first used
        return matcher.get_error() if matcher.is_error() else ""

    def schema_error(schema: Any) -> str:
        return grammar_error(LLMatcher.grammar_from_json_schema(schema, overrides=job["style"]))

    if job["schema"] is None:
        outcome = {"error": grammar_error(job["source"]), "where": ""}
    else:
        error = schema_error(job["schema"])
        outcome = {"error": error, "where": _where(job["schema"], error, schema_error) if error else ""}
    sys.stdout.write(json.dumps(outcome))


def _where(schema: Any, error: str, schema_error: Callable[[Any], str]) -> str:
    """Return the JSON pointer of the smallest subschema of ``schema`` that causes ``error`` on its own.

    ``schema_error`` compiles a schema and returns its error, or an empty text.
    """
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    path, part = "#", schema
    while True:
        for step, child in _children(part):
            if schema_error(shared | child) == error:
                path, part = path + step, child
                break
        else:
            return path


def _children(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield (last part of the JSON pointer, subschema) for each direct subschema."""
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(schema.get(key), dict):
            yield from ((f"/{key}/{name}", child) for name, child in schema[key].items() if isinstance(child, dict))
    for key in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            yield from (
                (f"/{key}/{index}", child) for index, child in enumerate(schema[key]) if isinstance(child, dict)
            )
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield f"/{key}", schema[key]


if __name__ == "__main__":
    main()
