"""The reverse of a plan: the smallest machines on which a number of people can use a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesaic.errors import InvalidParameter
from moesaic.hardware import CARDS, Machine, parse
from moesaic.model_sizes import ModelSizes
from moesaic.models import PRESETS
from moesaic.planner import DEFAULT_CONTEXT, STORED, Report, Row, Wish, plan_model
from moesaic.planner.speed import READING
from moesaic.planner.text import speed_text
from moesaic.text_tables import aligned

CARD_COUNTS = (1, 2, 4, 8)
HOSTS = ("cpu:32GB@60GB/s", "cpu:64GB@60GB/s", "cpu:128GB@60GB/s", "cpu:256GB@300GB/s", "cpu:768GB@500GB/s")
"""Computers without cards: desktops with two channels of memory, and servers with eight and twelve."""
GOOD_FORMATS = (STORED, "q8", "q4")
"""Formats that are tried if none is asked for: fewer bits than four are left to those who ask for them."""

_USERS = re.compile(r"(\d+)\s*(?:users?|people|sessions?|answers?)", re.IGNORECASE)
_CONTEXT = re.compile(r"(\d+)\s*(k)?(?:\s*(?:tokens|context))?", re.IGNORECASE)
_SPEED = re.compile(r"(\d+(?:\.\d+)?)\s*(?:tok(?:ens?)?/s|tokens a second)", re.IGNORECASE)


@dataclass(frozen=True)
class Need:
    """What a machine is wanted for.

    Attributes:
        users: answers that run at the same time, each with a whole context.
        context: tokens of a prompt and its answer.
        speed: tokens per second that each answer needs.
        formats: formats to try, the best first.
        model: name of the model; empty if the text does not name one.
    """

    users: int = 1
    context: int = DEFAULT_CONTEXT
    speed: float = READING[0]
    formats: tuple[str, ...] = GOOD_FORMATS
    model: str = ""


@dataclass(frozen=True)
class Found:
    """A machine that is large and fast enough, and the row of its plan that says so."""

    machine: Machine
    report: Report
    row: Row


def parse_need(text: str) -> Need:
    """Return the need that ``text`` describes, such as "32 users, 8k, mixtral-8x22b, q4, 10 tok/s".

    Raises:
        InvalidParameter: a part is not understood, or a number is out of range.
    """
    values: dict[str, object] = {}
    for part in (part.strip() for part in text.split(",")):
        if match := _USERS.fullmatch(part):
            values["users"] = int(match[1])
        elif match := _CONTEXT.fullmatch(part):
            values["context"] = int(match[1]) * (1024 if match[2] else 1)
        elif match := _SPEED.fullmatch(part):
            values["speed"] = float(match[1])
        elif part in PRESETS:
            values["formats"] = (part,)
        elif part and "model" not in values and " " not in part:
            values["model"] = part
        else:
            raise InvalidParameter("for", f'has {part!r}; write, for example, "32 users, 8k, mixtral-8x22b, q4"')
    need = Need(**values)  # type: ignore[arg-type]
    if need.users < 1 or need.speed <= 0:
        raise InvalidParameter("for", "needs at least one user and a speed above 0")
    return need


def smallest(sizes: ModelSizes, need: Need) -> list[Found]:
    """Return the smallest machine of each kind that meets the need, those with the least memory first.

    Raises:
        InvalidParameter: the context is longer than the model supports.
    """
    kinds = [*([f"{count}x{card.name}" for count in CARD_COUNTS] for card in CARDS), list(HOSTS)]
    found = [best for kind in kinds for best in _first(sizes, need, kind)]
    return sorted(found, key=lambda best: best.machine.memory_bytes)


def _first(sizes: ModelSizes, need: Need, machines: Iterable[str]) -> Iterator[Found]:
    """Yield the first of the machines that meets the need, with the best format that it does so in."""
    names = (STORED,) if sizes.spec.quantized else need.formats
    wish = Wish(context=need.context, batch=need.users, formats=names)
    for machine in map(parse, machines):
        report = plan_model(sizes, machine, wish)
        for row in report.rows:
            if row.fits and (row.together or row.one).per_answer >= need.speed:
                yield Found(machine, report, row)
                return


def lines(need: Need, found: Sequence[Found]) -> Iterator[str]:
    """Yield what was found as lines of text."""
    users = "one user" if need.users == 1 else f"{need.users} users at the same time"
    yield f"{users}, each with {need.context:,} tokens and at least {need.speed:g} tokens a second"
    if not found:
        yield "No machine of the table is large and fast enough: ask for fewer bits, users or tokens."
        return
    grid = [["machine", "memory", "format", "used", "each", "together"]]
    for best in found:
        speed = best.row.together or best.row.one
        grid.append(
            [
                best.machine.name,
                f"{best.machine.memory_bytes / 1e9:.0f} GB",
                best.row.format,
                f"{best.row.bytes / 1e9:.1f} GB",
                speed_text(speed.per_answer),
                speed_text(speed.answer_tokens_s),
            ]
        )
    yield from aligned(grid)


def to_json(best: Found) -> dict[str, Any]:
    """Return a machine that was found as values that JSON has."""
    return {"machine": asdict(best.machine), "memory_bytes": best.machine.memory_bytes, "row": asdict(best.row)}
