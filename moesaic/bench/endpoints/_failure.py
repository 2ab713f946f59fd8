"""The failure of one request, as benchmarks count it."""

from __future__ import annotations


class RequestFailed(Exception):
    """One request failed.

    Attributes:
        kind: the kind of failure, by which failures are counted.
        detail: message of the server or of the operating system.
        retry_after: value of the Retry-After header, if there was one.
    """

    def __init__(self, kind: str, detail: str, retry_after: str | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after
