"""Machines described in words, and this machine."""

from __future__ import annotations

import pytest

from moesaic import memory
from moesaic.errors import InvalidParameter
from moesaic.hardware import CARDS, parse, this_machine
from moesaic.ops import native


def test_cards_are_found_by_their_usual_names() -> None:
    machine = parse("2xH100-80GB")
    assert (machine.card.name, machine.cards, machine.host) == ("H100-80GB", 2, None)
    assert machine.memory_bytes == 2 * 81559 << 20
    for text in ("4xA6000", "4 x RTX A6000", "4xrtx-a6000-48gb", "4xNVIDIA RTX A6000"):
        assert parse(text).card.name == "RTX-A6000-48GB" and parse(text).cards == 4
    assert parse("a100").card.name == "A100-80GB" and parse("A100-40GB").card.name == "A100-40GB"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_name_of_a_card_is_its_own(card) -> None:
    assert all(parse(name).card is card for name in (card.name, *card.aliases))
    assert 0.9 < card.memory_bytes / (int(card.name.split("-")[-1].removesuffix("GB")) * 1e9) < 1.1


def test_main_memory_stands_beside_cards_or_alone() -> None:
    beside = parse("1xRTX4090+64GB")
    assert beside.host.memory_bytes == 64 * 10**9 and beside.memory_bytes == beside.card.memory_bytes
    alone = parse("cpu:64GB@200GB/s")
    assert alone.card is None and alone.memory_bytes == 64 * 10**9 and alone.host.read_gb_s == 200
    assert parse("cpu:1.5GB@20GB/s@2TOPS").host.int8_gop_s == 2000


@pytest.mark.parametrize(
    "text", ["", "4x", "4xFoo", "0xH100", "9999xH100", "H100+", "cpu:", "cpu:0GB", "cpu:64GB@0GB/s", "cpu:64", "H100+x"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match="hardware: "):
        parse(text)


def test_this_machine_is_measured() -> None:
    machine = this_machine.describe()
    assert machine.card is None and machine.memory_bytes == pytest.approx(memory.available(), rel=0.2)
    assert machine.host.measured and machine.host.instruction_set == native.instruction_set()
    assert machine.host.read_gb_s > 0.1 and machine.host.int8_gop_s > 0.1
