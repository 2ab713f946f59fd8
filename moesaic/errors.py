"""Public exceptions: one hierarchy, each class with its HTTP status.

    MoesaicError                 500  root of the hierarchy
      InvalidRequest             400  the request cannot be served as it is
        InvalidParameter         400  a parameter has an invalid value or type
        InvalidMessages          400  the chat format cannot represent the conversation
        PromptTooLong            400  the prompt exceeds the context length or the cache
        GrammarError             400  the grammar allows no further token, or is too costly
        TooLarge                 413  the request body is too large
        WrongMedia               415  the request body is not JSON, or is compressed
      Unauthorized               401  the API key is missing or unknown
      Forbidden                  403  the API key or the origin lacks permission
      NotFound                   404  unknown model, file, format, chat format, ...
      WrongMethod                405  the route does not support the HTTP method
      Conflict                   409  the idempotency key belongs to another request
      CheckpointError            422  a checkpoint is damaged or inconsistent
        ConfigError              422  a configuration key is missing, invalid or not supported
          TemplateError          422  a chat template is missing or malformed, or exceeds a limit
            MalformedTemplate    422  a chat template is no valid Jinja
        TokenizerError           422  the tokenizer is missing or not supported
      DownloadError              502  a file could not be downloaded, or is damaged
      Overloaded                 429  the queue is full
        KeyExhausted             429  the rate limit of the API key is reached
      Unavailable                503  the server is loading, draining, or did not start the request in time
        StorageFull              503  the job store has no free space
      StoreError                 500  the job store could lose jobs, is damaged, or has another schema version
      PoisonedJob                500  every worker that ran the request died
      TimedOut                   504  the answer exceeded the server's time limit
      Cancelled                  499  the caller cancelled the request
      NumericalError             500  the model computed NaN or infinity
      EngineStopped              503  the engine was closed, or has failed
      NotInstalled               501  an optional package is not installed
      ConnectionFailed           502  the server cannot be reached, or closed the connection
        StreamBroken             502  an answer broke off and cannot be resumed
          AnswerChanged          502  the resumed answer differs from the text that was already received
      BadReply                   502  the response does not follow the API

Each message is one line that states what is wrong and, where possible, what to do about it.
"""

from __future__ import annotations

from pathlib import Path


class MoesaicError(Exception):
    """Root of all exceptions of Moesaic; catch it to catch every error of the library."""

    status: int = 500
    """HTTP status of the error: a server sends it; in a client it is the status of the response."""
    retry_after: float | None = None
    """Seconds after which a retry makes sense; None if unknown."""
    request_id: str | None = None
    """The server's id of the failed request; None if the server sent none."""


class InvalidRequest(MoesaicError):
    """The request cannot be served as it is; change the request."""

    status = 400


class InvalidParameter(InvalidRequest):
    """A parameter has an invalid value or type.

    ``param`` is the name of the parameter as the caller wrote it; APIs report it as the invalid field.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class InvalidMessages(InvalidRequest):
    """The chat format cannot represent the conversation: a role, the order of roles, or a content is invalid."""


class PromptTooLong(InvalidRequest):
    """The prompt has ``tokens`` tokens, but at most ``limit`` are allowed.

    Clients of other servers look for "maximum context length is" and "requested N tokens" in the message.
    """

    def __init__(self, tokens: int, limit: int, *, answer: int = 1, characters: int | None = None) -> None:
        """Describe the prompt.

        Args:
            tokens: the prompt's number of tokens.
            limit: the maximum number of tokens of a prompt.
            answer: number of tokens of the context length that are reserved for the answer.
            characters: the prompt's number of characters if ``tokens`` is only an estimate from it.
        """
        estimate = "" if characters is None else f", estimated from {characters} characters"
        parts = f"{tokens} in the prompt{estimate}" + (f", {answer} for an answer" if answer else "")
        super().__init__(
            f"This model's maximum context length is {limit + answer} tokens, but you requested {tokens + answer} "
            f"tokens ({parts}): shorten the prompt"
        )
        self.tokens = tokens
        self.limit = limit


class GrammarError(InvalidRequest):
    """The answer cannot continue: its grammar allows no further token, or takes too much time or memory."""


class TooLarge(InvalidRequest):
    """The request body is larger than the server accepts."""

    status = 413


class WrongMedia(InvalidRequest):
    """The request body is not JSON, or is compressed."""

    status = 415


class Unauthorized(MoesaicError):
    """The API key is missing or unknown."""

    status = 401


class Forbidden(MoesaicError):
    """The API key, or the origin of the web page, lacks permission for the request."""

    status = 403


class NotFound(MoesaicError):
    """The model, file, format, chat format or job does not exist; the message may list what is available."""

    status = 404


class WrongMethod(MoesaicError):
    """The route does not support the HTTP method; ``allowed`` names the methods that it supports."""

    status = 405

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"the method {method:.20} is not allowed on this route; use {allowed}")
        self.allowed = allowed


class Conflict(MoesaicError):
    """The idempotency key belongs to a different request; use a new key for each new request."""

    status = 409


class CheckpointError(MoesaicError):
    """A checkpoint is damaged, incomplete or inconsistent.

    ``path`` is the file or directory with the problem; the message begins with it.
    """

    status = 422

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)


class ConfigError(CheckpointError):
    """A configuration key is missing, has an invalid value, or requires a computation that is not supported."""


class TemplateError(ConfigError):
    """A chat template is missing or malformed, fails for a conversation, or exceeds a limit."""


class MalformedTemplate(TemplateError):
    """A chat template is not valid Jinja, so it fails for every conversation."""


class TokenizerError(CheckpointError):
    """The tokenizer is missing, damaged, or cannot be reproduced exactly."""


class DownloadError(MoesaicError):
    """A file could not be downloaded, or is damaged."""

    status = 502


class Overloaded(MoesaicError):
    """The queue is full; retry after ``retry_after`` seconds, if known."""

    status = 429
    retry_after: float | None = None


class KeyExhausted(Overloaded):
    """The rate limit of the API key is reached; retry after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(MoesaicError):
    """The server is loading, draining, or did not start the request in time; retry later."""

    status = 503
    retry_after: float | None = None


class NotEnoughMemory(MoesaicError):
    """The model does not fit in the free memory; nothing was loaded, and the message says what fits."""

    status = 503


class StorageFull(Unavailable):
    """The job store has no free space; it accepts no new jobs until space is freed."""


class StoreError(MoesaicError):
    """The job store cannot be used: it could lose jobs at its location, is damaged, or has another schema version."""


class PoisonedJob(MoesaicError):
    """Every worker that ran the request died; the job is a dead letter and is not retried."""


class TimedOut(MoesaicError):
    """The answer exceeded the server's time limit."""

    status = 504


class Cancelled(MoesaicError):
    """The caller cancelled the request."""

    status = 499


class NumericalError(MoesaicError):
    """The model computed NaN or infinity for this request; other requests in the batch are not affected."""


class EngineStopped(MoesaicError):
    """The engine was closed, or has failed; after a failure, ``__cause__`` is the original error."""

    status = 503


class NotInstalled(MoesaicError):
    """An optional package is not installed; the message has the command that installs it."""

    status = 501


class ConnectionFailed(MoesaicError):
    """The server cannot be reached, or closed the connection before it answered."""

    status = 502


class StreamBroken(ConnectionFailed):
    """A streamed answer broke off and cannot be resumed; the text received so far is incomplete."""


class AnswerChanged(StreamBroken):
    """The server sent a different answer when a broken stream was resumed; the text received so far is incomplete."""


class BadReply(MoesaicError):
    """The response does not follow the API; a proxy may have changed it, or the URL is not a Moesaic server."""

    status = 502
