"""The smallest machines for a number of people."""

from __future__ import annotations

import pytest

from moesaic.errors import InvalidParameter
from moesaic.hardware import parse
from moesaic.model_sizes import ModelSizes
from moesaic.planner import Wish, machines, plan_model, published_spec
from moesaic.planner.machines import Need, parse_need


def test_needs_are_read_from_text() -> None:
    assert parse_need("32 users, 8k, mixtral-8x22b") == Need(32, 8192, model="mixtral-8x22b")
    assert parse_need("1 user, 4096 tokens, q4, 10 tok/s") == Need(1, 4096, 10, ("q4",))
    assert parse_need("8 sessions") == Need(8)


@pytest.mark.parametrize("text", ["", "many users", "0 users", "8 users, a, b", "0 tok/s"])
def test_other_needs_are_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match="for: "):
        parse_need(text)


def test_machines_are_the_smallest_of_their_kind() -> None:
    sizes = ModelSizes.count(published_spec("mixtral-8x7b"))
    need = Need(users=16, context=8192, formats=("q4",))
    found = machines.smallest(sizes, need)
    assert [best.machine.memory_bytes for best in found] == sorted(best.machine.memory_bytes for best in found)
    cards = {best.machine.card.name: best.machine.cards for best in found if best.machine.card}
    assert cards["A100-80GB"] == 1 and cards["RTX-4090-24GB"] == 2 and cards["T4-16GB"] == 4
    for best in found:
        assert best.row.fits and best.row.together.per_answer >= need.speed
        if best.machine.cards > 1:
            smaller = parse(f"{best.machine.cards // 2}x{best.machine.card.name}")
            row = plan_model(sizes, smaller, Wish(8192, 16, ("q4",))).rows[0]
            assert not row.fits or row.together.per_answer < need.speed
    lines = list(machines.lines(need, found))
    assert lines[0].startswith("16 users at the same time") and len(lines) == len(found) + 2


def test_nothing_is_large_enough_for_everybody() -> None:
    sizes = ModelSizes.count(published_spec("mixtral-8x22b"))
    need = Need(users=10_000, context=65536)
    assert machines.smallest(sizes, need) == []
    assert "No machine" in list(machines.lines(need, []))[-1]
