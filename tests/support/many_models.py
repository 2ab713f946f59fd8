"""Servers of several real models whose loads tests can hold, with presets and admin routes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from moesaic import memory
from moesaic.backend import Backend
from moesaic.cli import serving
from moesaic.serve import keys, model_admin, presets
from moesaic.serve.keys import Key, Keys
from moesaic.serve.model_entry import ModelEntry, PlannedModel
from moesaic.serve.model_manager import ModelManager
from moesaic.serve.model_metrics import ModelCollector
from moesaic.serve.presets import PresetBackend
from moesaic.serve.settings import Settings
from tests.support.server import Server, running

OPS, ANNA = {"authorization": "Bearer ops"}, {"authorization": "Bearer anna"}
MANY = Keys((Key("ops", keys.digest("ops"), admin=True), Key("anna", keys.digest("anna"))))


@dataclass
class ManyModels:
    """A running server of the models ``one`` and ``two``, which are both ``tales``."""

    server: Server
    gate: threading.Event
    """Loads after the start wait for this event."""
    client: httpx.Client = field(repr=False)

    @property
    def manager(self) -> ModelManager:
        manager: ModelManager = self.server.backend.backend
        return manager

    def call(self, work: Any) -> Any:
        """Run a coroutine on the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.server.loop).result(60)

    def states(self) -> dict[str, str]:
        return {model["id"]: model["state"] for model in self.client.get("/v1/models", headers=ANNA).json()["data"]}

    def admin(self, path: str, method: str = "POST") -> Any:
        response = self.client.request(method, f"/admin/{path}", headers=OPS)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, model: str, **more: Any) -> Any:
        response = self.client.post("/v1/chat/completions", json=body(model, **more), headers=ANNA)
        assert response.status_code == 200, response.text
        return response.json()


def body(model: str, text: str = "Tell of a fox.", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8, **more}


def gated(entry: ModelEntry, gate: threading.Event) -> ModelEntry:
    """Return an entry whose model, which is a real one, is loaded when ``gate`` is set."""

    async def plan() -> PlannedModel:
        planned = await entry.make_plan()

        async def load() -> Backend:
            await asyncio.to_thread(gate.wait, 60)
            return await planned.load()

        return replace(planned, load=load)

    return replace(entry, make_plan=plan)


@contextlib.contextmanager
def many_models(
    preset_file: Path | None = None, settings: Settings | None = None, patience: float = 60.0
) -> Iterator[ManyModels]:
    parser = argparse.ArgumentParser()
    serving.add_models(parser)
    args = parser.parse_args(["one=tales", "two=tales"])
    args.batch_tokens = None
    gate = threading.Event()
    gate.set()

    async def make() -> PresetBackend[ModelManager]:
        entries = [gated(entry, gate) for entry in serving.model_entries(args)]
        manager = ModelManager(entries, idle_seconds=3600, patience=patience, reclaim=memory.release_unused)
        backend = PresetBackend(manager, lambda: presets.read(preset_file) if preset_file else ())
        await manager.start()
        return backend

    with (
        running(
            make, settings, MANY, model_admin.endpoints, figures=lambda m: ModelCollector(m.backend.entries)
        ) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        try:
            yield ManyModels(server, gate, client)
        finally:
            gate.set()
