"""Reader of the endpoint files of the AIME API server: TOML in ``aime_api_endpoint.cfg``.

``aime_api_server.cfg`` has their defaults. The keys that the AIME API server supports are read; all others are logged.
``[MOESAIC] model`` is an extension that names the endpoint's model; without it, the endpoint uses the first model whose
name matches the job type. Only the SHA-256 of API keys is stored. Two API keys are published in AIME's GitHub
repository; these are never accepted.
"""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.backend import ModelInfo
from moesaic.errors import InvalidRequest, NotFound
from moesaic.serve import app
from moesaic.serve.keys import Key, digest

log = logging.getLogger("moesaic.cluster.aime")

SHIPPED = Path(__file__).parent / "endpoints"
ENDPOINT_FILE = "aime_api_endpoint.cfg"
SERVER_FILE = "aime_api_server.cfg"
PUBLISHED_KEYS = frozenset(
    {
        "e75630b1c4761b25ba4d263dc9d4dcb8b7959ef5f20f7631128281dd309d4f52",
        "45ab63d0b5df7358ec2578dfb9045691f881c57998f0ee454afb5179b0eb6ad8",
    }
)
"""SHA-256 of the worker's key and the client's key that AIME has published in its GitHub repository."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RESERVED_NAMES = {"api", "worker", "web", "stream_progress"}
"""Names that no endpoint may have, in addition to the first path segments of the other APIs' routes."""

KIND_ALIASES = {"str": "string", "int": "integer", "boolean": "bool"}
SUPPORTED_KINDS = ("string", "integer", "float", "bool", "selection", "json", "chat_context", "text_context")
PARAMETER_KEYS = (
    *("type", "required", "default", "min", "minimum", "max", "maximum", "align", "max_length", "auto_convert"),
    *("supported", "support", "description"),
)
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "ENDPOINT": (
        *("title", "name", "description", "category", "methods", "version", "max_queue_length", "max_time_in_queue"),
        *("job_inactivity_timeout", "demo_url", "input_metering", "output_metering"),
    ),
    "WORKER": ("job_type", "auth_key", "request_timeout"),
    "CLIENTS": ("authorization_keys",),
    "MOESAIC": ("model",),
    "PROGRESS": ("OUTPUTS",),
    "INPUTS": (),
    "OUTPUTS": (),
}
"""The supported keys of each section of an endpoint file; an empty tuple allows all keys."""


@dataclass(frozen=True)
class Parameter:
    """An input parameter of an endpoint, from an endpoint file. A field is None if the file does not set it."""

    name: str
    kind: str
    default: Any = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    align: float | None = None
    """The number must be a multiple of this."""
    max_length: int | None = None
    supported: tuple[Any, ...] = ()
    auto_convert: bool = False
    """Whether an invalid value is replaced by the nearest valid one instead of being refused."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """The parameter's table as it is in the file, for the description of the endpoint."""


@dataclass(frozen=True)
class Definition:
    """Definition of an endpoint in the protocol of the AIME API server. Times are in seconds."""

    name: str
    job_type: str
    title: str = ""
    description: str = ""
    category: str = ""
    version: int = 0
    model: str = ""
    """The endpoint's model; if empty, ``model_of`` selects one."""
    inputs: tuple[Parameter, ...] = ()
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    progress: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_queue_length: int = 1000
    max_time_in_queue: float = 3600
    inactivity: float = 360
    """Seconds without an update after which a running job fails."""
    request_timeout: float = 60
    """Seconds after which a worker gives up its request for jobs (a long poll)."""
    client_keys: tuple[Key, ...] = ()
    worker_key: str = ""
    """SHA-256 of the key of AIME API workers; empty if there is none."""

    @property
    def offered(self) -> str:
        """The name of the model that AIME API workers of this job type offer."""
        return self.model or self.job_type

    def parameter(self, name: str) -> Parameter | None:
        """Return the input parameter of this name; None if the endpoint has none."""
        return next((parameter for parameter in self.inputs if parameter.name == name), None)


def shipped() -> list[Definition]:
    """Return the built-in endpoints: mixtral_chat and llama3_chat."""
    return [read_file(path) for path in sorted(SHIPPED.glob("*.toml"), reverse=True)]


def read(path: Path) -> list[Definition]:
    """Read the endpoint of a file, or those of all files ``aime_api_endpoint.cfg`` in a folder and its subfolders.

    ``aime_api_server.cfg`` in the folder contains their defaults.

    Raises:
        InvalidRequest: a file is unreadable or invalid, or two endpoints have the same name.
        NotFound: the folder contains no endpoint.
    """
    if path.is_file():
        return [read_file(path)]
    defaults = _toml(path / SERVER_FILE) if (path / SERVER_FILE).is_file() else {}
    definitions = [read_file(file, defaults) for file in sorted(path.rglob(ENDPOINT_FILE))]
    if not definitions:
        raise NotFound(f"{path} contains no {ENDPOINT_FILE}: name the folder of AIME API endpoints, or one file")
    return check_definitions(definitions)


def check_definitions(definitions: Sequence[Definition]) -> list[Definition]:
    """Check that the endpoints' names do not conflict; return the endpoints.

    Raises:
        InvalidRequest: two endpoints have the same name, or an endpoint has the name of another route.
    """
    routes = {endpoint.path.split("/")[1] for endpoint in app.dialect_endpoints()} | RESERVED_NAMES
    names = [definition.name for definition in definitions]
    for name in names:
        if name in routes:
            raise InvalidRequest(f"an endpoint cannot be named {name!r}: the server has a route of that name")
        if names.count(name) > 1:
            raise InvalidRequest(f"two endpoints are named {name!r}: rename one")
    return list(definitions)


def read_file(path: Path, defaults: Mapping[str, Any] | None = None) -> Definition:
    """Read the endpoint of a file; ``defaults`` is the content of ``aime_api_server.cfg``.

    Raises:
        InvalidRequest: the file is unreadable or invalid.
    """
    content = _toml(path)
    defaults = defaults or {}
    try:
        return _definition(content, defaults, path)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{path} is not a valid AIME endpoint file: {error}") from error


def model_of(definition: Definition, models: Sequence[ModelInfo]) -> str:
    """Return the name of an endpoint's model.

    It is the model that the definition names, else the first chat model whose name matches the job type, else the first
    chat model. If there is no chat model yet, it is the name under which AIME API workers of this job type offer one.
    """
    if definition.model:
        return definition.model
    chat_models = [model for model in models if model.task == "chat"]
    job_type = _letters(definition.job_type)
    for model in chat_models:
        if any(job_type in _letters(name) for name in (model.name, *model.aliases)):
            return model.name
    return chat_models[0].name if chat_models else definition.offered


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest(f"{path} is not valid TOML: {error}") from error


def _definition(content: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> Definition:
    for name in _unsupported_keys(content):
        log.warning("unsupported key in AIME endpoint ignored", extra={"file": str(path), "key": name})
    endpoint, worker = content.get("ENDPOINT", {}), content.get("WORKER", {})
    clients = content.get("CLIENTS", {})
    name, job_type = endpoint.get("name"), worker.get("job_type")
    if not (isinstance(name, str) and NAME.fullmatch(name) and isinstance(job_type, str) and job_type):
        raise ValueError("it needs [ENDPOINT] name (of letters, digits, _, - and .) and [WORKER] job_type")
    endpoint_defaults, worker_defaults = defaults.get("ENDPOINTS", {}), defaults.get("WORKERS", {})
    keys = clients.get("authorization_keys", defaults.get("CLIENTS", {}).get("default_authorization_keys", {}))

    def number(section: Mapping[str, Any], section_defaults: Mapping[str, Any], key: str, default: float) -> Any:
        value = section.get(key, section_defaults.get(f"default_{key}", default))
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{key} is {value!r}, expected more than 0")
        return value

    return Definition(
        name,
        job_type,
        title=str(endpoint.get("title", name)),
        description=str(endpoint.get("description", "")),
        category=str(endpoint.get("category", "")),
        version=int(endpoint.get("version", 0)),
        model=str(content.get("MOESAIC", {}).get("model", "")),
        inputs=tuple(_parameter(key, value) for key, value in content.get("INPUTS", {}).items()),
        outputs=dict(content.get("OUTPUTS", {})),
        progress=dict(content.get("PROGRESS", {}).get("OUTPUTS", {})),
        max_queue_length=number(endpoint, endpoint_defaults, "max_queue_length", 1000),
        max_time_in_queue=number(endpoint, endpoint_defaults, "max_time_in_queue", 3600),
        inactivity=number(endpoint, endpoint_defaults, "job_inactivity_timeout", 360),
        request_timeout=number(worker, worker_defaults, "request_timeout", 60),
        client_keys=tuple(_client_keys(name, keys, path)),
        worker_key=_key_digest(worker.get("auth_key", worker_defaults.get("default_auth_key", "")), path),
    )


def _unsupported_keys(content: Mapping[str, Any]) -> Iterator[str]:
    for section, values in content.items():
        if section not in SECTIONS:
            yield f"[{section}]"
            continue
        for key, value in values.items():
            if section == "INPUTS":
                yield from (f"[INPUTS] {key}.{name}" for name in value if name not in PARAMETER_KEYS)
            elif SECTIONS[section] and key not in SECTIONS[section]:
                yield f"[{section}] {key}"


def _parameter(name: str, spec: Mapping[str, Any]) -> Parameter:
    kind = str(spec.get("type", "string")).lower()
    return Parameter(
        name,
        KIND_ALIASES.get(kind, kind),
        default=spec.get("default"),
        required=bool(spec.get("required", False)),
        low=_first_of(spec, "minimum", "min"),
        high=_first_of(spec, "maximum", "max"),
        align=spec.get("align"),
        max_length=spec.get("max_length"),
        supported=tuple(spec.get("supported", ())),
        auto_convert=bool(spec.get("auto_convert", False)),
        written=dict(spec),
    )


def _first_of(spec: Mapping[str, Any], *names: str) -> float | None:
    return next((spec[name] for name in names if name in spec), None)


def _client_keys(endpoint: str, keys: Mapping[str, str], path: Path) -> Iterator[Key]:
    for owner, key in keys.items():
        if sha256 := _key_digest(key, path):
            yield Key(f"aime:{endpoint}:{owner}", sha256)


def _key_digest(key: str, path: Path) -> str:
    """Return the SHA-256 of an API key; "" if the key is empty or one that AIME has published."""
    sha256 = digest(key) if key else ""
    if sha256 in PUBLISHED_KEYS:
        log.warning("key published by AIME rejected", extra={"file": str(path)})
        return ""
    return sha256
