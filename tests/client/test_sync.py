"""The blocking client is generated from the asynchronous one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/generate_sync_client.py"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_sync_client", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sync_client_is_current(generator):
    expected = generator.generate(generator.SOURCE.read_text())
    assert generator.TARGET.read_text() == expected, f"run {TOOL.name}"


def test_names_are_replaced_only_as_whole_tokens(generator):
    source = 'async def f(asyncio_x: AsyncClient) -> None:\n    await asyncio.sleep(1)  # "await"\n    x = "await"\n'
    expected = 'def f(asyncio_x: Client) -> None:\n    time.sleep(1)  # "await"\n    x = "await"\n'
    assert generator.replace_names(source) == expected


def test_a_changed_passage_is_refused(generator):
    with pytest.raises(ValueError, match="exactly once"):
        generator.generate(generator.SOURCE.read_text().replace("Client for asyncio", "Client"))


def test_leftover_async_names_are_refused(generator):
    with pytest.raises(ValueError, match="AsyncOther"):
        generator.generate(generator.SOURCE.read_text() + "AsyncOther = 1\n")
