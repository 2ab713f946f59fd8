"""How a server is asked over HTTP: one file = one dialect.

A file ``endpoints/<name>.py`` defines ``class Dialect(Endpoint)``. Here stands what all of them share with
whoever asks: the question (``Ask``), what is noted while its answer comes (``Answer``), and how an answer
fails (``Failed``). Knows neither load nor statistics. The files need aiohttp; this one does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moesaic import registry
from moesaic.errors import InvalidParameter, InvalidRequest, NotFound

if TYPE_CHECKING:
    from moesaic.bench.endpoints._http import Client

FOLDER = "bench/endpoints"
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Ask:
    """One question: ``prompt``, or a conversation in ``messages``, and how long the answer may be."""

    prompt: str
    max_tokens: int
    messages: tuple[dict[str, Any], ...] = ()
    prompt_tokens: int | None = None
    """How many tokens the prompt was meant to have; None: nobody said."""


@dataclass(slots=True)
class Answer:
    """What is noted while an answer comes."""

    arrivals: array[float] = field(default_factory=lambda: array("d"))
    """When each piece of text came, on the monotonic clock, in seconds."""
    tokens: int | None = None
    """Tokens of the answer, if the server says."""
    prompt_tokens: int | None = None
    """Tokens of the prompt, if the server says."""


@dataclass(frozen=True)
class Manner:
    """What every request says besides its question.

    ``extra`` goes into the body as it is (of TGI: into ``parameters``); ``poll`` is the time between two
    questions for progress, in seconds, where a dialect has to ask.
    """

    temperature: float | None = None
    ignore_eos: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    poll: float = 0.3


class Failed(Exception):
    """One request failed; ``kind`` is what failures are counted by, ``detail`` what the server or the system said."""

    def __init__(self, kind: str, detail: str, retry_after: str | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after


class Endpoint(ABC):
    """A server, asked in one dialect."""

    name: ClassVar[str]
    """Its file's."""
    path: ClassVar[str]
    """Where it is asked; a URL that ends so needs no ``--dialect``."""
    rank: ClassVar[int | None] = None
    """When ``auto`` looks for it: the smallest first; None: never."""
    ignores_eos: ClassVar[bool] = False
    """Whether it can be told to go on after the end-of-sequence token."""
    chats: ClassVar[bool] = True
    """Whether it takes conversations."""

    def __init__(self, client: Client, manner: Manner, model: str, context: int | None = None) -> None:
        self.client = client
        self.manner = manner
        self.model = model
        """What is asked, as the server calls it."""
        self.context = context
        """Most tokens of a prompt and its answer, if the server says."""

    @classmethod
    @abstractmethod
    async def recognise(cls, client: Client) -> bool:
        """Return whether the server speaks this dialect.

        Raises:
            Failed: it refused to say for another reason than not knowing the question.
        """

    @classmethod
    @abstractmethod
    async def open(cls, client: Client, manner: Manner, model: str | None) -> Self:
        """Return it, ready to be asked; with ``model`` None, what the server has.

        Raises:
            Failed: the server does not answer, or not as the dialect says.
            InvalidRequest: it does not say what it has, or does not let us in.
        """

    @abstractmethod
    async def answer(self, ask: Ask, answer: Answer) -> None:
        """Ask, and note in ``answer`` what comes, until it has come whole.

        Raises:
            Failed: it did not.
        """


def names() -> list[str]:
    """Return the dialects as they are written on the command line."""
    return [name.replace("_", "-") for name in registry.names(FOLDER)]


def load(name: str) -> type[Endpoint]:
    """Return a dialect.

    Raises:
        NotFound: there is none of that name; the message names what exists.
    """
    if name not in names():
        raise NotFound(f"there is no dialect {name!r}: choose one of {AUTO}, {', '.join(names())}")
    found: type[Endpoint] = registry.load(FOLDER, name.replace("-", "_")).Dialect
    return found


def from_url(url: str) -> tuple[str, str | None]:
    """Return a server's root and, if ``url`` ends in a dialect's path, the name of that dialect.

    Raises:
        InvalidParameter: it is no http or https URL.
    """
    root = url.rstrip("/")
    scheme, _, rest = root.partition("://")
    if scheme not in ("http", "https") or not rest or rest.startswith("/"):
        raise InvalidParameter("url", f"{url!r} begins with neither http:// nor https://")
    for name in names():
        path = load(name).path
        if path and root.endswith(path):
            return root.removesuffix(path), name
    return root.removesuffix("/v1"), None


async def open(client: Client, manner: Manner, dialect: str, model: str | None) -> Endpoint:
    """Return the server, ready to be asked; with ``dialect`` "auto", in the first one that it speaks.

    Raises:
        InvalidRequest: it speaks none, or lacks what ``manner`` says.
        NotFound: there is no such dialect.
    """
    try:
        found = load(dialect) if dialect != AUTO else await _recognise(client)
        if manner.ignore_eos and not found.ignores_eos:
            raise InvalidRequest(f"--ignore-eos: {found.name} has no word for it")
        return await found.open(client, manner, model)
    except Failed as failed:
        raise InvalidRequest(f"{client.root} cannot be asked: {failed}") from failed


async def _recognise(client: Client) -> type[Endpoint]:
    known = [dialect for dialect in map(load, names()) if dialect.rank is not None]
    for dialect in sorted(known, key=lambda each: each.rank or 0):
        if await dialect.recognise(client):
            return dialect
    raise InvalidRequest(f"{client.root} speaks no dialect that is known here: name one with --dialect")
