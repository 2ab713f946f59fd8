"""Tests of the model manager: reserved memory, concurrent loads, pins, and when models are unloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from moesaic.backend import GenerationRequest, ModelInfo, ModelStats
from moesaic.errors import InvalidRequest, NotFound, Unavailable
from moesaic.serve.model_entry import ModelEntry, PlannedModel
from moesaic.serve.model_manager import ModelManager
from tests.support.event_loop import async_test


class Model:
    """Backend that holds memory while it is loaded."""

    def __init__(self, memory: Memory, name: str) -> None:
        self.memory, self.name, self.running = memory, name, 0
        self.closed = False

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(self.name)]

    def stats(self) -> dict[str, ModelStats]:
        return {self.name: ModelStats(running=self.running)}

    async def generate(self, request: GenerationRequest) -> str:
        if self.memory.held is not None:
            await self.memory.held.wait()
        assert not self.closed
        return self.name

    async def close(self) -> None:
        self.closed = True
        await asyncio.sleep(0.01)  # the memory is in use until the model is closed
        self.memory.used -= 1


class Memory:
    """Counter of the models that hold memory, with a model manager that loads them."""

    def __init__(
        self,
        *names: str,
        budget: int | None = None,
        broken: tuple[str, ...] = (),
        pinned: tuple[str, ...] = (),
        idle_seconds: float | None = None,
    ) -> None:
        self.used = self.peak = 0
        self.loads: list[str] = []
        self.plans: list[str] = []
        self.broken = broken
        self.now = 0.0
        self.held: asyncio.Event | None = None
        """Calls of ``generate`` wait for this event, as if the prompt were being tokenized."""
        self.loaded: dict[str, Model] = {}
        entries = [
            ModelEntry(ModelInfo(name, (name * 2,), state="unloaded"), self._plan(name), name in pinned)
            for name in names
        ]
        self.reclaimed: list[int] = []
        """Number of models that held memory, each time that memory was returned to the system."""
        self.manager = ModelManager(
            entries,
            budget,
            idle_seconds=idle_seconds,
            reclaim=lambda: self.reclaimed.append(self.used),
            clock=self._clock,
        )

    def _clock(self) -> float:
        self.now += 1e-6  # as with a real clock, no two times are equal
        return self.now

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

    def state(self, name: str) -> str:
        return self.manager.entry(name).state

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


@async_test
async def test_an_idle_model_is_unloaded_and_wakes_for_the_next_request():
    memory = Memory("a", "b", idle_seconds=10)
    await memory.request("a")
    memory.now = 9
    await memory.request("b")
    await memory.manager.sweep()
    assert memory.used == 2
    memory.now = 11
    await memory.manager.sweep()
    assert (memory.state("a"), memory.state("b"), memory.used) == ("unloaded", "loaded", 1)
    assert memory.manager.entry("a").unloads == {"idle": 1}
    assert await memory.request("a") == "a" and memory.loads == ["a", "b", "a"]


@async_test
async def test_the_idle_time_begins_when_the_last_answer_ends():
    memory = Memory("a", idle_seconds=10)
    await memory.request("a")
    memory.loaded["a"].running = 1
    memory.now = 30
    await memory.manager.sweep()
    memory.loaded["a"].running = 0
    memory.now = 39
    await memory.manager.sweep()
    assert memory.state("a") == "loaded"
    memory.now = 41
    await memory.manager.sweep()
    assert memory.state("a") == "unloaded"


@async_test
async def test_a_call_in_progress_protects_its_model():
    memory = Memory("a", "b", budget=1, idle_seconds=10)
    await memory.request("a")
    memory.held = asyncio.Event()
    call = asyncio.ensure_future(memory.request("a"))
    await asyncio.sleep(0)
    memory.now = 100
    await memory.manager.sweep()
    with pytest.raises(Unavailable, match="busy"):
        await memory.request("b")
    memory.held.set()
    assert await call == "a" and memory.loads == ["a"]


@async_test
async def test_a_request_that_meets_an_idle_unload_is_answered():
    memory = Memory("a", idle_seconds=10)
    await memory.request("a")
    memory.now = 20
    sweep = asyncio.ensure_future(memory.manager.sweep())
    await asyncio.sleep(0)  # the unload is decided, and the model is not closed yet
    assert memory.state("a") == "unloading" and memory.used == 1
    assert await memory.request("a") == "a"
    await sweep
    assert memory.loads == ["a", "a"] and memory.peak == 1


@async_test
async def test_pinned_models_are_loaded_at_the_start_and_stay():
    memory = Memory("a", "b", "c", budget=2, pinned=("b",), idle_seconds=10)
    await memory.manager.start()
    assert memory.loads == ["b", "a"]
    await memory.request("c")  # the default makes room, although the pinned model was used before it
    memory.now = 100
    await memory.manager.sweep()
    assert [memory.state(name) for name in "abc"] == ["unloaded", "loaded", "unloaded"]
    await memory.manager.close()


@async_test
async def test_pinned_models_that_do_not_fit_are_refused_with_the_figures():
    memory = Memory("a", "b", budget=1, pinned=("a", "b"))
    with pytest.raises(InvalidRequest, match=r"need 0.00 GB \(a 0.00 GB, b 0.00 GB\); --memory is 1e-09 GB"):
        await memory.manager.start()
    memory = Memory("a", "b", budget=1, pinned=("b",))
    with pytest.raises(InvalidRequest, match=r"a needs 0\.00 GB, but the pinned models leave 0\.00"):
        await memory.manager.start()
    assert not memory.loads


@async_test
async def test_an_unload_waits_for_answers_and_new_requests_wait_for_the_next_load():
    memory = Memory("a")
    await memory.request("a")
    memory.loaded["a"].running = 1
    first = memory.loaded["a"]
    unload = asyncio.ensure_future(memory.manager.unload("aa"))
    await asyncio.sleep(0)
    request = asyncio.ensure_future(memory.request("a"))
    await asyncio.sleep(0.01)
    assert not (first.closed or unload.done() or request.done())
    first.running = 0
    await unload
    assert first.closed and await request == "a" and memory.loads == ["a", "a"] and memory.peak == 1


@async_test
async def test_a_forced_unload_does_not_wait_for_answers():
    memory = Memory("a")
    await memory.request("a")
    memory.loaded["a"].running = 1
    waiting = asyncio.ensure_future(memory.manager.unload("a"))
    await asyncio.sleep(0)
    await memory.manager.unload("a", force=True)
    await waiting
    assert memory.state("a") == "unloaded" and memory.used == 0
    assert memory.manager.entry("a").unloads == {"admin": 1}


@async_test
async def test_an_unload_of_a_loading_model_waits_until_it_is_loaded():
    memory = Memory("a")
    load = asyncio.ensure_future(memory.manager.load("a"))
    await asyncio.sleep(0.005)
    assert memory.state("a") == "loading"
    await memory.manager.unload("a")
    await load
    assert memory.used == 0 and not memory.manager.entry("a").waiting


@async_test
async def test_a_cancelled_request_leaves_the_load_to_others():
    memory = Memory("a")
    gone, other = (asyncio.ensure_future(memory.request("a")) for _ in range(2))
    await asyncio.sleep(0.005)
    gone.cancel()
    assert await other == "a" and memory.loads == ["a"]
    assert memory.manager.entry("a").idle


@async_test
async def test_a_failure_is_shown_until_a_load_succeeds():
    memory = Memory("a", broken=("a",))
    with pytest.raises(InvalidRequest):
        await memory.request("a")
    entry = memory.manager.entry("a")
    assert (entry.state, entry.error, entry.failures, entry.loads) == ("failed", "broken", 1, 0)
    memory.broken = ()
    assert await memory.request("a") == "a"
    assert (entry.state, entry.error, entry.failures, entry.loads) == ("loaded", "", 1, 1)


@async_test
async def test_memory_is_reclaimed_after_the_model_is_closed():
    memory = Memory("a")
    await memory.request("a")
    await memory.manager.unload("a")
    assert memory.reclaimed == [0]


@async_test
async def test_a_model_is_not_idle_between_its_load_and_the_request_that_waits():
    memory = Memory("a")
    request = asyncio.ensure_future(memory.request("a"))
    await asyncio.sleep(0.005)
    entry, seen = memory.manager.entry("a"), []
    entry.loading.add_done_callback(lambda _: seen.append((entry.loaded is not None, entry.idle)))
    await request
    assert seen == [(True, False)] and entry.idle


@async_test
async def test_the_idle_time_begins_when_a_call_returns():
    memory = Memory("a", idle_seconds=10)
    memory.held = asyncio.Event()
    call = asyncio.ensure_future(memory.request("a"))
    await asyncio.sleep(0.05)
    memory.now = 9
    memory.held.set()
    await call
    memory.now = 12
    await memory.manager.sweep()
    assert memory.state("a") == "loaded"
