"""Every error a user can see: one tree, each with the HTTP status it becomes.

    MoesaicError                 500  the root; catch this to catch them all
      InvalidRequest             400  what was asked cannot be done as asked
        InvalidParameter         400  one named value is out of range or of the wrong kind
        InvalidMessages          400  a conversation that the chat format cannot hold
        PromptTooLong            400  more tokens than the model, or its cache, can ever hold
        GrammarError             400  an answer cannot go on as its grammar demands
        TooLarge                 413  more bytes than a server takes in at once
        WrongMedia               415  a body that is not JSON, or is compressed
      Unauthorized               401  no key, or one that is not known
      Forbidden                  403  not with this key, or not from this page
      NotFound                   404  no such model, file, format, chat format, ...
      WrongMethod                405  the route has other methods
      Conflict                   409  the idempotency key was used for another request
      CheckpointError            422  weights on disk that do not say what they should
        ConfigError              422  a configuration key is missing, wrong, or not understood
        TokenizerError           422  no tokenizer, or one that cannot be read exactly
      DownloadError              502  a file could not be fetched, or arrived damaged
      Overloaded                 429  the queue is full: try again later
        KeyExhausted             429  this key's share is used up: try again later
      Unavailable                503  the server is loading, draining, or waited too long for its turn
        StorageFull              503  what keeps the jobs has no room left
      PoisonedJob                500  every worker that had this request died of it
      TimedOut                   504  the answer took longer than the server allows
      Cancelled                  499  the caller took the request back
      NumericalError             500  the model computed NaN or infinity for this request
      EngineStopped              503  the engine was closed, or died; the cause is chained
      NotInstalled               501  a package that this needs is not installed; the message says how to get it
      ConnectionFailed           502  a server could not be reached, or hung up before it answered
        StreamBroken             502  an answer broke off, and there is no going on with it
          AnswerChanged          502  asked for the rest of an answer, a server told another one
      BadReply                   502  what a server sent is no answer of its API

A message is one line that says what is wrong and, where it can, what to do.
"""

from __future__ import annotations

from pathlib import Path


class MoesaicError(Exception):
    """The root of the tree. ``status`` is the HTTP status that a server answers with, and that a client got."""

    status: int = 500
    retry_after: float | None = None
    """Seconds after which another try makes sense, where that is known."""
    request_id: str | None = None
    """What a server calls the request that failed, where a client was told."""


class InvalidRequest(MoesaicError):
    """What was asked cannot be done as asked."""

    status = 400


class InvalidParameter(InvalidRequest):
    """One named value is out of range or of the wrong kind.

    ``param`` is the name as the caller wrote it, so that an API can point at the field.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class InvalidMessages(InvalidRequest):
    """A conversation that the chat format cannot hold: unknown role, wrong order, no content."""


class PromptTooLong(InvalidRequest):
    """The prompt has ``tokens`` tokens where at most ``limit`` can ever be held."""

    def __init__(self, tokens: int, limit: int, why: str = "the context length") -> None:
        super().__init__(f"the prompt has {tokens} tokens, but {why} allows {limit}: shorten it")
        self.tokens = tokens
        self.limit = limit


class GrammarError(InvalidRequest):
    """An answer cannot go on as its grammar demands: no token of the vocabulary fits, or finding one costs too much."""


class TooLarge(InvalidRequest):
    """More bytes than a server takes in at once."""

    status = 413


class WrongMedia(InvalidRequest):
    """A body that is not JSON, or is compressed."""

    status = 415


class Unauthorized(MoesaicError):
    """No key, or one that is not known."""

    status = 401


class Forbidden(MoesaicError):
    """Not with this key, or not from this page."""

    status = 403


class NotFound(MoesaicError):
    """No such model, file, format or chat format; the message names what exists."""

    status = 404


class WrongMethod(MoesaicError):
    """The route has other methods, ``allowed``."""

    status = 405

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"{method:.20} is not possible here; {allowed} is")
        self.allowed = allowed


class Conflict(MoesaicError):
    """The idempotency key was used for another request already: take a new key for a new request."""

    status = 409


class CheckpointError(MoesaicError):
    """Weights on disk that do not say what they should.

    ``path`` is the file or directory at fault; it stands at the head of the message.
    """

    status = 422

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)


class ConfigError(CheckpointError):
    """A configuration key is missing, has a wrong value, or changes the computation in a way not known here."""


class TokenizerError(CheckpointError):
    """There is no tokenizer, or one that cannot be read exactly."""


class DownloadError(MoesaicError):
    """A file could not be fetched, or arrived damaged."""

    status = 502


class Overloaded(MoesaicError):
    """The queue is full: try again later, in ``retry_after`` seconds if that can be told."""

    status = 429
    retry_after: float | None = None


class KeyExhausted(Overloaded):
    """This key's share is used up: try again in ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(MoesaicError):
    """The server is loading, draining, or waited too long for its turn: try again later, as for ``Overloaded``."""

    status = 503
    retry_after: float | None = None


class StorageFull(Unavailable):
    """What keeps the jobs has no room left: nothing new is taken in until there is."""


class StoreError(MoesaicError):
    """Jobs cannot be kept safely where they should be, or what is there is damaged or of another version."""


class PoisonedJob(MoesaicError):
    """Every worker that had this request died while it had it; it is set aside and not tried again."""


class TimedOut(MoesaicError):
    """The answer took longer than the server allows."""

    status = 504


class Cancelled(MoesaicError):
    """The caller took the request back."""

    status = 499


class NumericalError(MoesaicError):
    """The model computed NaN or infinity for this request; others in the batch are not affected."""


class EngineStopped(MoesaicError):
    """The engine was closed, or died; the cause is chained."""

    status = 503


class NotInstalled(MoesaicError):
    """A package that this needs is not installed; the message says how to get it."""

    status = 501


class ConnectionFailed(MoesaicError):
    """A server could not be reached, or hung up before it answered."""

    status = 502


class StreamBroken(ConnectionFailed):
    """An answer broke off, and there is no going on with it: what came of it is not the whole."""


class AnswerChanged(StreamBroken):
    """Asked for the rest of an answer, a server told another one: what came of the first is not the whole."""


class BadReply(MoesaicError):
    """What a server sent is no answer of its API: it is something else, or something between has changed it."""

    status = 502
