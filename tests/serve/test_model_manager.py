"""Tests of the model manager: reserved memory, concurrent loads and the unloading of idle models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from moesaic.backend import GenerationRequest, ModelInfo, ModelStats
from moesaic.errors import InvalidRequest, NotFound, Unavailable
from moesaic.serve.model_manager import ModelEntry, ModelManager, PlannedModel
from tests.support.event_loop import async_test


class Model:
    """Backend that holds memory while it is loaded."""

    def __init__(self, memory: Memory, name: str) -> None:
        self.memory, self.name, self.running = memory, name, 0

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(self.name)]

    def stats(self) -> dict[str, ModelStats]:
        return {self.name: ModelStats(running=self.running)}

    async def generate(self, request: GenerationRequest) -> str:
        return self.name

    async def close(self) -> None:
        await asyncio.sleep(0.01)  # the memory is in use until the model is closed
        self.memory.used -= 1


class Memory:
    """Counter of the models that hold memory, with a model manager that loads them."""

    def __init__(self, *names: str, budget: int | None, broken: tuple[str, ...] = ()) -> None:
        self.used = self.peak = 0
        self.loads: list[str] = []
        self.plans: list[str] = []
        self.broken = broken
        self.loaded: dict[str, Model] = {}
        entries = [ModelEntry(ModelInfo(name, (name * 2,), state="unloaded"), self._plan(name)) for name in names]
        self.manager = ModelManager(entries, budget)

    def _plan(self, name: str) -> Callable[[], Awaitable[PlannedModel]]:
        async def plan() -> PlannedModel:
            self.plans.append(name)
            await asyncio.sleep(0)
            return PlannedModel(1, self._load(name))

        return plan

    def _load(self, name: str) -> Callable[[], Awaitable[Model]]:
        async def load() -> Model:
            self.used += 1
            self.peak = max(self.peak, self.used)
            self.loads.append(name)
            await asyncio.sleep(0.01)
            if name in self.broken:
                self.used -= 1
                raise InvalidRequest("broken")
            self.loaded[name] = Model(self, name)
            return self.loaded[name]

        return load

    async def request(self, name: str) -> str:
        return await self.manager.generate(GenerationRequest(name))  # type: ignore[return-value]


@async_test
async def test_concurrent_loads_stay_within_the_budget():
    memory = Memory("a", "b", "c", budget=1)
    results = await asyncio.gather(*map(memory.request, "abc"), return_exceptions=True)
    assert memory.peak == 1
    assert results[0] == "a" and all(isinstance(result, Unavailable) for result in results[1:])
    assert await memory.request("b") == "b" and memory.peak == 1  # the idle model makes room


@async_test
async def test_models_that_fit_are_loaded_concurrently():
    memory = Memory("a", "b", budget=2)
    assert await asyncio.gather(*map(memory.request, ("a", "b", "aa"))) == ["a", "b", "a"]
    assert memory.peak == 2 and memory.loads == ["a", "b"]


@async_test
async def test_the_least_recently_used_idle_model_is_unloaded():
    memory = Memory("a", "b", "c", budget=2)
    for name in "aba":
        await memory.request(name)
    await memory.request("c")
    assert [info.state for info in memory.manager.models()] == ["loaded", "unloaded", "loaded"]
    assert memory.peak == 2


@async_test
async def test_a_busy_model_is_not_unloaded():
    memory = Memory("a", "b", budget=1)
    await memory.request("a")
    memory.loaded["a"].running = 1
    with pytest.raises(Unavailable, match="busy"):
        await memory.request("b")
    assert memory.manager.models()[0].state == "loaded"


@async_test
async def test_a_failed_load_releases_its_memory():
    memory = Memory("a", "b", budget=1, broken=("a",))
    with pytest.raises(InvalidRequest, match="broken"):
        await memory.request("a")
    assert memory.manager.models()[0].state == "failed"
    assert await memory.request("b") == "b"


@async_test
async def test_a_model_is_planned_once_and_again_after_it_failed():
    memory = Memory("a", "b", budget=1)
    for name in "aba":
        await memory.request(name)
    assert memory.plans == ["a", "b"] and memory.loads == ["a", "b", "a"]
    memory = Memory("a", budget=1, broken=("a",))
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="broken"):
            await memory.request("a")
    assert memory.plans == ["a", "a"]


@async_test
async def test_a_refused_model_keeps_its_plan():
    memory = Memory("a", "b", budget=1)
    await memory.manager.plan_all()
    assert memory.plans == ["a", "b"] and not memory.loads
    await memory.request("a")
    memory.loaded["a"].running = 1
    with pytest.raises(Unavailable):
        await memory.request("b")
    memory.loaded["a"].running = 0
    assert await memory.request("b") == "b" and memory.plans == ["a", "b"]


@async_test
async def test_a_request_during_unloading_stays_within_the_budget():
    memory = Memory("a", "b", budget=1)
    await memory.request("a")
    other = asyncio.ensure_future(memory.request("b"))
    await asyncio.sleep(0.005)  # a is being closed
    again = asyncio.ensure_future(memory.request("a"))
    assert await other == "b"
    assert memory.peak == 1
    [result] = await asyncio.gather(again, return_exceptions=True)
    assert result == "a" or isinstance(result, Unavailable)
    assert memory.peak == 1


@async_test
async def test_an_unknown_model_lists_the_available_ones():
    with pytest.raises(NotFound, match="available models: a, b"):
        await Memory("a", "b", budget=None).request("c")
