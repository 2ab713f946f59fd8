"""Admin routes of a server that loads models itself: models and presets.

docs/how-to/many-models.md describes the routes. This module does not depend on how models are loaded.
"""

from __future__ import annotations

from typing import Any

import msgspec

from moesaic.errors import InvalidParameter
from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, Response, openai_failure
from moesaic.serve.model_entry import ModelEntry, State
from moesaic.serve.model_manager import ModelManager
from moesaic.serve.presets import Preset, PresetBackend


class Model(msgspec.Struct, frozen=True):
    """A model of the server.

    ``bytes`` is the planned memory (null: not planned yet), and ``reserved`` the part of it that is in use or reserved
    now. ``running`` and ``waiting`` count answers. The model was last used ``idle`` seconds ago (null: never).
    ``load_seconds`` is the mean of its loads. ``error`` says why the last load failed; "" if it did not.
    """

    name: str
    aliases: tuple[str, ...]
    state: State
    pinned: bool
    bytes: int | None
    reserved: int
    running: int
    waiting: int
    idle: float | None
    loads: int
    load_seconds: float | None
    failures: int
    unloads: dict[str, int]
    error: str
    presets: tuple[str, ...]


class Models(msgspec.Struct, frozen=True):
    """All models, and the memory in bytes that they may take together (null: no limit)."""

    models: list[Model]
    memory: int | None


class PresetInfo(msgspec.Struct, frozen=True):
    """A preset with all that it sets, for administrators."""

    name: str
    base: str
    description: str
    system: str
    sampling: dict[str, Any]
    chat_template_kwargs: dict[str, Any]


class Presets(msgspec.Struct, frozen=True):
    """All presets."""

    presets: list[PresetInfo]


def endpoints(presets: PresetBackend[ModelManager]) -> tuple[Endpoint, ...]:
    """Return the admin routes of a server with these models and presets. They require an administrator's key."""
    routes = _Routes(presets)

    def route(method: str, path: str, handler: Any, summary: str, **options: Any) -> Endpoint:
        about = f"Admins: {summary}"
        return Endpoint(f"/admin/{path}", handler, openai_failure, method=method, admin=True, summary=about, **options)

    force = {"force": {"enum": ["true", "false"]}}
    return (
        route("GET", "models", routes.list_models, "list the models with their states and memory."),
        route("POST", "models/{name:path}/load", routes.load, "load a model."),
        route("POST", "models/{name:path}/unload", routes.unload, "unload a model after its answers.", query=force),
        route("GET", "presets", routes.list_presets, "list the presets."),
        route("POST", "presets/reload", routes.reload_presets, "read the file of presets again."),
    )


class _Routes:
    def __init__(self, presets: PresetBackend[ModelManager]) -> None:
        self._presets, self._manager = presets, presets.backend

    async def list_models(self, _: RequestContext) -> AnyResponse:
        return Response(Models([self._model(entry) for entry in self._manager.entries], self._manager.budget))

    async def load(self, context: RequestContext) -> AnyResponse:
        return Response(self._model(await self._manager.load(context.path_parameters["name"])))

    async def unload(self, context: RequestContext) -> AnyResponse:
        force = context.query.get("force", "false")
        if force not in ("true", "false"):
            raise InvalidParameter("force", f"is {force!r:.40}, expected true or false")
        entry = await self._manager.unload(context.path_parameters["name"], force=force == "true")
        return Response(self._model(entry))

    async def list_presets(self, _: RequestContext) -> AnyResponse:
        return Response(Presets([_shown(preset) for preset in self._presets.presets]))

    async def reload_presets(self, context: RequestContext) -> AnyResponse:
        self._presets.reload()
        return await self.list_presets(context)

    def _model(self, entry: ModelEntry) -> Model:
        info = entry.info
        names = (info.name, *info.aliases)
        stats = self._manager.stats().get(info.name)
        return Model(
            name=info.name,
            aliases=info.aliases,
            state=entry.state,
            pinned=entry.pinned,
            bytes=None if entry.plan is None else entry.plan.bytes,
            reserved=entry.reserved or 0,
            running=stats.running if stats else 0,
            waiting=entry.waiting + (stats.waiting if stats else 0),
            idle=None if entry.used_at is None else max(0.0, self._manager.clock() - entry.used_at),
            loads=entry.loads,
            load_seconds=entry.load_seconds / entry.loads if entry.loads else None,
            failures=entry.failures,
            unloads={str(reason): count for reason, count in entry.unloads.items()},
            error=entry.error,
            presets=tuple(preset.name for preset in self._presets.presets if preset.base in names),
        )


def _shown(preset: Preset) -> PresetInfo:
    return PresetInfo(
        preset.name,
        preset.base,
        preset.description,
        preset.system,
        dict(preset.sampling),
        dict(preset.chat_template_kwargs),
    )
