"""The child that renders one chat template: a program of its own, run by ``template``.

Knows Jinja's sandbox, the names that Hugging Face's templates expect, and its own limits. Imports
nothing of Moesaic: reads one JSON object from standard input, writes one to standard output.
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
    """Set the limits, then do the one job."""
    job = json.load(sys.stdin)
    import jinja2  # before the limits: importing needs more than rendering

    environment = _environment()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        outcome = {"text": _render(environment, job)}
    except Refused as error:
        outcome = {"kind": "refused", "error": _line(error)}
    except jinja2.TemplateSyntaxError as error:
        outcome = {"kind": "template", "error": f"line {error.lineno} is malformed: {_line(error)}"}
    except jinja2.exceptions.SecurityError as error:
        outcome = {"kind": "template", "error": f"tries what is forbidden: {_line(error)}"}
    except MemoryError:
        outcome = {"kind": "template", "error": f"needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        outcome = {"kind": "template", "error": "is nested too deeply"}
    except TooLong as error:
        outcome = {"kind": "template", "error": _line(error)}
    except Exception as error:  # whatever a template provokes is the template's fault, and ends here
        outcome = {"kind": "template", "error": f"{type(error).__name__}: {_line(error)}"}
    sys.stdout.write(json.dumps(outcome))


def _render(environment: Any, job: dict[str, Any]) -> str:
    parts: list[str] = []
    left = int(job["limit"])
    for part in environment.from_string(job["template"]).generate(**job["values"]):
        left -= len(part)
        if left < 0:
            raise TooLong(f"writes more than {job['limit']} characters")
        parts.append(part)
    return "".join(parts)


def _environment() -> Any:
    """Return Jinja's strictest environment with what Hugging Face's templates expect to find."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: marks what training learns from; here it only holds its contents."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

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


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


if __name__ == "__main__":
    main()
