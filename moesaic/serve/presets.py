"""Presets: names for a model with a system prompt, sampling values and template variables of their own.

A preset takes no memory beside its model's. The file of presets is TOML, with a table for each:

    [pirate]
    base = "small"
    description = "Speaks like a pirate."
    system = "You are a pirate."
    stop = ["Arrr"]
    sampling = {temperature = 0.9, max_tokens = 200}
    chat_template_kwargs = {enable_thinking = false}

Only ``base`` is required. This module does not depend on HTTP.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta, Struct

from moesaic.backend import Backend, GenerationRequest, ModelInfo, ModelStats, ResponseStream, TokenInfo
from moesaic.errors import InvalidRequest

B = TypeVar("B", bound=Backend)
Probability = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Text = Annotated[str, Meta(min_length=1)]


class PresetSampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The table ``sampling`` of a preset: fields of ``moesaic.Sampling``, with their bounds."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None


class PresetTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of a file of presets. The name of the table is the name of the preset."""

    base: Text
    description: str = ""
    system: str = ""
    stop: Annotated[tuple[Text, ...], Meta(max_length=16)] = ()
    sampling: PresetSampling = PresetSampling()
    chat_template_kwargs: dict[str, Any] = {}


@dataclass(frozen=True)
class Preset:
    """A name for a model with values for what a request leaves out."""

    name: str
    base: str
    """The name or an alias of the model."""
    description: str = ""
    system: str = ""
    """The system prompt of conversations that have no system message of their own; "": none."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Values for fields of ``moesaic.Sampling`` that a request does not set, by name."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, request: GenerationRequest, model: str) -> GenerationRequest:
        """Return the request to ``model`` that a request to this preset means. What the request sets stays as it is."""
        messages = request.messages
        if self.system and messages is not None and all(message.get("role") != "system" for message in messages):
            messages = ({"role": "system", "content": self.system}, *messages)
        variables = {**self.chat_template_kwargs, **request.chat_template_kwargs}
        sampling = {**self.sampling, **request.sampling}
        return replace(request, model=model, messages=messages, sampling=sampling, chat_template_kwargs=variables)


def read(path: Path) -> tuple[Preset, ...]:
    """Return the presets of a file.

    Raises:
        InvalidRequest: the file cannot be read, is not TOML, or a preset has an unknown key or a wrong value.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOML's errors and those of UTF-8
        raise InvalidRequest(f"{path}: not a file of presets (TOML): {error}") from error
    return tuple(_preset(name, table, path) for name, table in tables.items())


def _preset(name: str, table: Any, path: Path) -> Preset:
    if not (0 < len(name) <= 128 and name.isprintable()):
        raise InvalidRequest(f"{path}: {name!r:.140} is no name of a preset: 1 to 128 printable characters")
    try:
        read_table = msgspec.convert(table, PresetTable)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{path}: preset {name!r}: {error}") from error
    sampling = {key: value for key, value in msgspec.structs.asdict(read_table.sampling).items() if value is not None}
    if read_table.stop:
        sampling["stop"] = read_table.stop
    variables = msgspec.to_builtins(read_table.chat_template_kwargs)  # TOML's dates become text
    return Preset(name, read_table.base, read_table.description, read_table.system, sampling, variables)


class PresetBackend(Generic[B]):
    """A ``Backend`` that offers presets beside the models of another backend."""

    def __init__(self, backend: B, source: Callable[[], tuple[Preset, ...]] = tuple) -> None:
        """Offer the presets that ``source`` returns now; ``reload`` calls it again.

        Raises:
            InvalidRequest: a preset is wrong, its base is unknown, or its name is taken.
        """
        self.backend = backend
        """The backend with the models."""
        self._source = source
        self._presets: dict[str, Preset] = {}
        self.reload()

    @property
    def presets(self) -> tuple[Preset, ...]:
        """Return the presets."""
        return tuple(self._presets.values())

    def reload(self) -> None:
        """Read the presets again and offer only these. Running requests continue as they began.

        Raises:
            InvalidRequest: a preset is wrong, its base is unknown, or its name is taken. The old presets stay.
        """
        presets = self._source()
        models = self.backend.models()
        names = {name for model in models for name in (model.name, *model.aliases)}
        for preset in presets:
            if preset.base not in names:
                offered = ", ".join(model.name for model in models)
                raise InvalidRequest(f"preset {preset.name!r}: unknown base {preset.base!r}; models: {offered}")
            if preset.name in names:
                raise InvalidRequest(f"preset {preset.name!r}: a model has this name already")
        self._presets = {preset.name: preset for preset in presets}

    def _base(self, name: str) -> str:
        preset = self._presets.get(name)
        return name if preset is None else preset.base

    def _applied(self, request: GenerationRequest) -> GenerationRequest:
        preset = self._presets.get(request.model)
        return request if preset is None else preset.apply(request, preset.base)

    def models(self) -> Sequence[ModelInfo]:
        models = self.backend.models()
        by_name = {name: model for model in models for name in (model.name, *model.aliases)}
        shown = [self._info(preset, by_name[preset.base]) for preset in self._presets.values()]
        return [*models, *shown]

    def _info(self, preset: Preset, base: ModelInfo) -> ModelInfo:
        return replace(base, name=preset.name, aliases=(), parent=base.name, description=preset.description)

    def stats(self) -> Mapping[str, ModelStats]:
        return self.backend.stats()

    async def generate(self, request: GenerationRequest) -> ResponseStream:
        return await self.backend.generate(self._applied(request))

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        return await self.backend.tokenize(self._applied(request))

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return await self.backend.detokenize(self._base(model), ids)

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        return await self.backend.embed(self._base(model), texts, truncate)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return await self.backend.classify(self._base(model), texts)

    async def close(self) -> None:
        await self.backend.close()
