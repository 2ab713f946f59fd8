"""HTTP APIs that a server can be measured over: each file is one dialect.

A file ``endpoints/<name>.py`` defines ``class Dialect(Endpoint)``. This module has what the dialects share: a request,
the record of its answer, and the error of a failed request. It does not know how requests are scheduled or evaluated.
The dialects' files need aiohttp; this module does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moesaic import registry
from moesaic.bench.endpoints._failure import RequestFailed as RequestFailed
from moesaic.errors import InvalidParameter, InvalidRequest, NotFound

if TYPE_CHECKING:
    from moesaic.bench.endpoints._http import Client

FOLDER = "bench/endpoints"
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Request:
    """One request: a prompt, or a conversation in ``messages``, and the maximum length of the answer."""

    prompt: str
    max_tokens: int
    messages: tuple[dict[str, Any], ...] = ()
    prompt_tokens: int | None = None
    """Intended length of the prompt in tokens; None if unknown."""


@dataclass(slots=True)
class Answer:
    """Arrival times and token counts of one answer."""

    arrivals: array[float] = field(default_factory=lambda: array("d"))
    """Arrival time of each piece of text, on the monotonic clock, in seconds."""
    tokens: int | None = None
    """Tokens of the answer as the server counts them; None if the server does not say."""
    prompt_tokens: int | None = None
    """Tokens of the prompt as the server counts them; None if the server does not say."""


@dataclass(frozen=True)
class RequestOptions:
    """Options that every request of a benchmark has."""

    temperature: float | None = None
    """Sampling temperature; None: the server's default."""
    ignore_eos: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the body, or of ``parameters`` for TGI."""
    poll: float = 0.3
    """Seconds between two progress requests, for dialects that poll."""


class Endpoint(ABC):
    """A server, and the dialect (API) in which it is addressed."""

    name: ClassVar[str]
    """Name of the dialect; the file has the same name."""
    path: ClassVar[str]
    """Path of the route; a URL that ends with it implies the dialect."""
    probe_order: ClassVar[int | None] = None
    """Position among the dialects that ``auto`` tries, smallest first; None: ``auto`` does not try this dialect."""
    supports_ignore_eos: ClassVar[bool] = False
    """Whether requests can ask to continue after the end-of-sequence token."""
    supports_messages: ClassVar[bool] = True
    """Whether requests can have a conversation."""

    def __init__(self, client: Client, options: RequestOptions, model: str, context: int | None = None) -> None:
        self.client = client
        self.options = options
        self.model = model
        """The server's name of the model."""
        self.context = context
        """Maximum tokens of prompt and answer together; None if the server does not say."""

    @classmethod
    @abstractmethod
    async def recognise(cls, client: Client) -> bool:
        """Return whether the server speaks this dialect.

        Raises:
            RequestFailed: the server failed for another reason than an unknown route.
        """

    @classmethod
    @abstractmethod
    async def open(cls, client: Client, options: RequestOptions, model: str | None) -> Self:
        """Return the endpoint, ready for requests.

        Args:
            client: connections to the server.
            options: options of every request.
            model: name of the model; None: the model that the server lists first.

        Raises:
            RequestFailed: the server does not answer, or not in this dialect.
            InvalidRequest: the server names no model, or refuses the login.
        """

    @abstractmethod
    async def send(self, request: Request, answer: Answer) -> None:
        """Send a request and record its answer in ``answer`` until it is complete.

        Raises:
            RequestFailed: the answer is an error or incomplete.
        """


def names() -> list[str]:
    """Return the names of all dialects as the command line spells them."""
    return [name.replace("_", "-") for name in registry.names(FOLDER)]


def load(name: str) -> type[Endpoint]:
    """Return the class of a dialect.

    Raises:
        NotFound: there is no dialect with this name; the message lists the names.
    """
    if name not in names():
        raise NotFound(f"unknown dialect {name!r}; available dialects: {AUTO}, {', '.join(names())}")
    dialect: type[Endpoint] = registry.load(FOLDER, name.replace("-", "_")).Dialect
    return dialect


def from_url(url: str) -> tuple[str, str | None]:
    """Split a URL into the server's root and the dialect whose path it ends with; None if it ends with no such path.

    Raises:
        InvalidParameter: ``url`` is not an http or https URL.
    """
    root = url.rstrip("/")
    scheme, _, rest = root.partition("://")
    if scheme not in ("http", "https") or not rest or rest.startswith("/"):
        raise InvalidParameter("url", f"is {url!r}, expected an http:// or https:// URL")
    for name in names():
        path = load(name).path
        if path and root.endswith(path):
            return root.removesuffix(path), name
    return root.removesuffix("/v1"), None


async def open_endpoint(client: Client, options: RequestOptions, dialect: str, model: str | None) -> Endpoint:
    """Return the endpoint of the server that ``client`` is connected to, ready for requests.

    Args:
        client: connections to the server.
        options: options of every request.
        dialect: name of the dialect; "auto": the first dialect that the server speaks.
        model: name of the model; None: the model that the server lists first.

    Raises:
        InvalidRequest: the server speaks no known dialect, or the dialect does not support ``options``.
        NotFound: there is no such dialect.
    """
    try:
        endpoint = load(dialect) if dialect != AUTO else await _detect(client)
        if options.ignore_eos and not endpoint.supports_ignore_eos:
            raise InvalidRequest(f"--ignore-eos: dialect {endpoint.name} does not support it")
        return await endpoint.open(client, options, model)
    except RequestFailed as failed:
        raise InvalidRequest(f"{client.root}: the server cannot be used: {failed}") from failed


async def _detect(client: Client) -> type[Endpoint]:
    dialects = [dialect for dialect in map(load, names()) if dialect.probe_order is not None]
    for dialect in sorted(dialects, key=lambda dialect: dialect.probe_order or 0):
        if await dialect.recognise(client):
            return dialect
    raise InvalidRequest(f"{client.root}: the server speaks no known dialect: pass --dialect")
