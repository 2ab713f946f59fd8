"""Child process that renders one chat template; ``template`` starts it.

The program sets Jinja's sandbox, the names that Hugging Face's templates expect, and its own resource limits. It
imports nothing from Moesaic. It reads one JSON object from standard input and writes one to standard output.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any, NoReturn

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 2


class Refused(Exception):
    """The template called ``raise_exception``."""


class TooLong(Exception):
    """The output is longer than the job allows."""


def main() -> None:
    """Read the job, set the resource limits, and render the template."""
    job = json.load(sys.stdin)
    import jinja2  # imported before the limits are set, because the import needs more than rendering does

    environment = _environment()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        outcome = {"text": _render(environment, job)}
    except Refused as error:
        outcome = {"kind": "refused", "error": _first_line(error)}
    except jinja2.TemplateSyntaxError as error:
        outcome = {"kind": "template", "error": f"line {error.lineno} is malformed: {_first_line(error)}"}
    except jinja2.exceptions.SecurityError as error:
        outcome = {"kind": "template", "error": f"uses something that the sandbox forbids: {_first_line(error)}"}
    except MemoryError:
        outcome = {"kind": "template", "error": f"needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        outcome = {"kind": "template", "error": "has too many nested levels"}
    except TooLong as error:
        outcome = {"kind": "template", "error": _first_line(error)}
    except Exception as error:  # any exception that a template causes is reported as an error of the template
        outcome = {"kind": "template", "error": f"{type(error).__name__}: {_first_line(error)}"}
    sys.stdout.write(json.dumps(outcome))


def _render(environment: Any, job: dict[str, Any]) -> str:
    parts: list[str] = []
    remaining = int(job["limit"])
    for part in environment.from_string(job["template"]).generate(**job["values"]):
        remaining -= len(part)
        if remaining < 0:
            raise TooLong(f"writes more than {job['limit']} characters")
        parts.append(part)
    return "".join(parts)


def _environment() -> Any:
    """Return Jinja's immutable sandbox with the filters and functions that Hugging Face's templates use."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Jinja tag ``{% generation %}``, which marks training targets; rendering keeps only its contents."""

        tags = {"generation"}  # noqa: RUF012 - Jinja requires a class attribute

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise Refused(message)


def _now(date_format: str) -> str:
    return datetime.datetime.now().strftime(date_format)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


if __name__ == "__main__":
    main()
