"""Child process that renders one chat template for one or several conversations.

The module ``template`` starts it. The program sets up Jinja's sandbox, the names that Hugging Face's templates expect,
and its own resource limits. It imports nothing from Moesaic. It reads one JSON object from standard input. It writes a
JSON list with one object for each conversation to standard output.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 2


class Refused(Exception):
    """The template called ``raise_exception`` to reject the conversation."""


class TooLong(Exception):
    """The rendered text is longer than the parent process allows."""


def main() -> None:
    """Read the request from standard input, set the resource limits, render the template, and write the results."""
    job = json.load(sys.stdin)
    import jinja2  # imported before the limits are set, because the import needs more than rendering does

    environment = _environment(datetime.datetime.fromisoformat(job["now"]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: list[Any] = []
    failure = _attempt(jinja2, lambda: compiled.append(environment.from_string(job["template"])))
    renders = [partial(_render, compiled, values, int(job["limit"])) for values in job["values"]]
    outcomes = [failure if "error" in failure else _attempt(jinja2, render) for render in renders]
    sys.stdout.write(json.dumps(outcomes))


def _attempt(jinja2: Any, call: Callable[[], str | None]) -> dict[str, Any]:
    """Return {"text": the result of ``call``}, or {"kind", "error"} with the kind and the message of its error."""
    try:
        return {"text": call()}
    except Refused as error:
        return {"kind": "refused", "error": _first_line(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "malformed", "error": f"line {error.lineno} is malformed: {_first_line(error)}"}
    except jinja2.exceptions.SecurityError as error:
        return {"kind": "template", "error": f"uses something that the sandbox forbids: {_first_line(error)}"}
    except MemoryError:
        return {"kind": "template", "error": f"needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"kind": "template", "error": "has too many nested levels"}
    except TooLong as error:
        return {"kind": "template", "error": _first_line(error)}
    except Exception as error:  # any exception that a template causes is reported as an error of the template
        return {"kind": "template", "error": f"{type(error).__name__}: {_first_line(error)}"}


def _render(compiled: list[Any], values: dict[str, Any], limit: int) -> str:
    parts: list[str] = []
    remaining = limit
    for part in compiled[0].generate(values):
        remaining -= len(part)
        if remaining < 0:
            raise TooLong(f"writes more than {limit} characters")
        parts.append(part)
    return "".join(parts)


def _environment(now: datetime.datetime) -> Any:
    """Return Jinja's immutable sandbox with the filters and functions that Hugging Face's templates use.

    ``now`` is the time that the template's function ``strftime_now`` formats.
    """
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
    environment.globals["strftime_now"] = now.strftime
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise Refused(message)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


if __name__ == "__main__":
    main()
