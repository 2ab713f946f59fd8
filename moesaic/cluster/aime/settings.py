"""Endpoints as AIME's files define them: TOML, ``aime_api_endpoint.cfg``, with the defaults of ``aime_api_server.cfg``.

What their server reads is read, what it ignores is named in a warning. ``[MOESAIC] model`` is ours: the model that an
endpoint asks; without it, the first whose name fits the job type. No key is kept, only its SHA-256. Two keys stand in
every copy of their repository: these let nobody in.
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
PUBLISHED = frozenset(
    {
        "e75630b1c4761b25ba4d263dc9d4dcb8b7959ef5f20f7631128281dd309d4f52",
        "45ab63d0b5df7358ec2578dfb9045691f881c57998f0ee454afb5179b0eb6ad8",
    }
)
"""SHA-256 of the keys for workers and for clients that AIME's repository shows."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RESERVED = {"api", "worker", "web", "stream_progress"}
"""First parts of paths that are not the dialects', but are not free either."""

KINDS = {"str": "string", "int": "integer", "boolean": "bool"}
SERVED = ("string", "integer", "float", "bool", "selection", "json", "chat_context", "text_context")
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
"""What is heeded; an empty list: everything."""


@dataclass(frozen=True)
class Parameter:
    """What a request may carry under one name. None: nothing was said of it."""

    name: str
    kind: str
    default: Any = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    align: float | None = None
    """Numbers are multiples of this."""
    max_length: int | None = None
    supported: tuple[Any, ...] = ()
    auto_convert: bool = False
    """Whether a value that is out of range becomes the nearest that is not."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """As the file has it, to be shown."""


@dataclass(frozen=True)
class Definition:
    """One endpoint; times in seconds."""

    name: str
    job_type: str
    title: str = ""
    description: str = ""
    category: str = ""
    version: int = 0
    model: str = ""
    """Which model it asks; "": see ``model_of``."""
    inputs: tuple[Parameter, ...] = ()
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    progress: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_queue_length: int = 1000
    max_time_in_queue: float = 3600
    inactivity: float = 360
    """A job that its worker says nothing of for so long is given up."""
    request_timeout: float = 60
    """After which a worker's own request for jobs times out."""
    client_keys: tuple[Key, ...] = ()
    worker_key: str = ""
    """SHA-256 of what AIME's workers show; "": none."""

    @property
    def offered(self) -> str:
        """The name of the model that AIME's workers of this job type offer."""
        return self.model or self.job_type

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of that name, if there is one."""
        return next((each for each in self.inputs if each.name == name), None)


def shipped() -> list[Definition]:
    """Return the endpoints that are there without any file: mixtral_chat and llama3_chat."""
    return [read_file(path) for path in sorted(SHIPPED.glob("*.toml"), reverse=True)]


def read(path: Path) -> list[Definition]:
    """Return the endpoints of a file, or of all ``aime_api_endpoint.cfg`` in a folder and below.

    A folder's ``aime_api_server.cfg`` gives their defaults.

    Raises:
        InvalidRequest: something cannot be read, or two have the same name.
        NotFound: there is nothing.
    """
    if path.is_file():
        return [read_file(path)]
    defaults = _toml(path / SERVER_FILE) if (path / SERVER_FILE).is_file() else {}
    found = [read_file(each, defaults) for each in sorted(path.rglob(ENDPOINT_FILE))]
    if not found:
        raise NotFound(f"{path}: there is no {ENDPOINT_FILE} in it: name the folder of AIME's endpoints, or one file")
    return together(found)


def together(definitions: Sequence[Definition]) -> list[Definition]:
    """Return these endpoints, if they can be side by side.

    Raises:
        InvalidRequest: two have one name, or one has the name of another route.
    """
    routes = {each.path.split("/")[1] for each in app.dialect_endpoints()} | RESERVED
    names = [each.name for each in definitions]
    for name in names:
        if name in routes:
            raise InvalidRequest(f"an endpoint cannot be called {name!r}: that is another route of the server")
        if names.count(name) > 1:
            raise InvalidRequest(f"two endpoints are called {name!r}")
    return list(definitions)


def read_file(path: Path, defaults: Mapping[str, Any] | None = None) -> Definition:
    """Return one file's endpoint; ``defaults`` are what the server's file says.

    Raises:
        InvalidRequest: it cannot be read, or lacks what is needed.
    """
    content = _toml(path)
    defaults = defaults or {}
    try:
        return _definition(content, defaults, path)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{path}: is no endpoint of AIME's: {error}") from error


def model_of(definition: Definition, cards: Sequence[ModelInfo]) -> str:
    """Return the model that an endpoint asks: the one it names, or the first that fits, or the first.

    Where there is none (yet), its job type stands for the model that workers of that type will offer.
    """
    if definition.model:
        return definition.model
    chats = [card for card in cards if card.task == "chat"]
    wanted = _letters(definition.job_type)
    for card in chats:
        if any(wanted in _letters(name) for name in (card.name, *card.aliases)):
            return card.name
    return chats[0].name if chats else definition.offered


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest(f"{path}: is no TOML: {error}") from error


def _definition(content: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> Definition:
    for name in _unknown(content):
        log.warning("a key of an AIME endpoint is not heeded", extra={"file": str(path), "key": name})
    endpoint, worker = content.get("ENDPOINT", {}), content.get("WORKER", {})
    clients = content.get("CLIENTS", {})
    name, job_type = endpoint.get("name"), worker.get("job_type")
    if not (isinstance(name, str) and NAME.fullmatch(name) and isinstance(job_type, str) and job_type):
        raise ValueError("it needs [ENDPOINT] name, of letters, digits, _ - and ., and [WORKER] job_type")
    general, work = defaults.get("ENDPOINTS", {}), defaults.get("WORKERS", {})
    keys = clients.get("authorization_keys", defaults.get("CLIENTS", {}).get("default_authorization_keys", {}))

    def number(section: Mapping[str, Any], under: Mapping[str, Any], key: str, otherwise: float) -> Any:
        value = section.get(key, under.get(f"default_{key}", otherwise))
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
        max_queue_length=number(endpoint, general, "max_queue_length", 1000),
        max_time_in_queue=number(endpoint, general, "max_time_in_queue", 3600),
        inactivity=number(endpoint, general, "job_inactivity_timeout", 360),
        request_timeout=number(worker, work, "request_timeout", 60),
        client_keys=tuple(_client_keys(name, keys, path)),
        worker_key=_kept(worker.get("auth_key", work.get("default_auth_key", "")), path),
    )


def _unknown(content: Mapping[str, Any]) -> Iterator[str]:
    for section, values in content.items():
        if section not in SECTIONS:
            yield f"[{section}]"
            continue
        for key, value in values.items():
            if section == "INPUTS":
                yield from (f"[INPUTS] {key}.{inner}" for inner in value if inner not in PARAMETER_KEYS)
            elif SECTIONS[section] and key not in SECTIONS[section]:
                yield f"[{section}] {key}"


def _parameter(name: str, written: Mapping[str, Any]) -> Parameter:
    kind = str(written.get("type", "string")).lower()
    return Parameter(
        name,
        KINDS.get(kind, kind),
        default=written.get("default"),
        required=bool(written.get("required", False)),
        low=_either(written, "minimum", "min"),
        high=_either(written, "maximum", "max"),
        align=written.get("align"),
        max_length=written.get("max_length"),
        supported=tuple(written.get("supported", ())),
        auto_convert=bool(written.get("auto_convert", False)),
        written=dict(written),
    )


def _either(written: Mapping[str, Any], *names: str) -> float | None:
    return next((written[name] for name in names if name in written), None)


def _client_keys(endpoint: str, keys: Mapping[str, str], path: Path) -> Iterator[Key]:
    for owner, key in keys.items():
        if kept := _kept(key, path):
            yield Key(f"aime:{endpoint}:{owner}", kept)


def _kept(key: str, path: Path) -> str:
    """Return what is kept of a key; "" if there is none, or one that everybody knows."""
    kept = digest(key) if key else ""
    if kept in PUBLISHED:
        log.warning("a key that AIME has published lets nobody in", extra={"file": str(path)})
        return ""
    return kept
