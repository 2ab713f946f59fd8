"""State of a worker that speaks the protocol of the AIME API server and is connected to this gateway, and of its jobs.

Each update from such a worker contains the job's whole text so far; ``AimeJob`` extracts the new part. This module does
not depend on HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.backend import Delta, Event, Finished, ModelInfo, PromptDone
from moesaic.cluster.aime.settings import Definition
from moesaic.cluster.jobs import LeaseToken
from moesaic.cluster.protocols import WorkerInfo
from moesaic.errors import MoesaicError, Unavailable


@dataclass
class AimeJob:
    """A job that runs on an AIME API worker. Times are in seconds of the monotonic clock."""

    id: str
    """The job's id at the worker. A job that is leased to the same worker again gets a new id."""
    lease_token: LeaseToken
    data: Mapping[str, Any]
    """The parameters of the job, as they are sent to the worker."""
    previous_text: str
    """Text that was generated under earlier leases."""
    previous_tokens: int
    """Number of tokens that were generated under earlier leases."""
    text: str
    """The whole text of the answer so far, including ``previous_text``."""
    logged: int
    """Number of the job's events that the gateway has in the job's log."""
    last_update: float
    """Time of the worker's last update of this job."""
    prompt_tokens: int = 0
    pending: list[Event] = field(default_factory=list)
    """Events that are not in the log yet. They stay the same when an append is repeated after a failure."""
    missing_since: float | None = None
    """Time since which the worker seems to have lost the job; None if it has the job."""

    def continuation(self, text: str, *, final: bool = False) -> str | None:
        """Return what is new in a worker's text (``final``: its result); None if the text contradicts ``self.text``."""
        # An update can end within a character; the next one has the rest of it.
        whole = self.previous_text + (text if final else text.rstrip("\ufffd"))
        if whole.startswith(self.text):
            return whole[len(self.text) :]
        # AIME API workers strip white space and stop words from the final text, after updates have contained them.
        return "" if final and self.text.strip().startswith(whole.strip()) and whole.strip() else None

    def record_update(self, data: Mapping[str, Any], *, final: bool = False) -> None:
        """Add the events of an update or, with ``final``, a result to ``pending``. A contradicting text is ignored."""
        context_tokens, generated = data.get("current_context_length"), data.get("num_generated_tokens")
        if type(context_tokens) is int and type(generated) is int and context_tokens > generated:
            self.prompt_tokens = self.prompt_tokens or context_tokens - generated
        text = data.get("text")
        delta = self.continuation(text, final=final) if isinstance(text, str) else None
        if not self.logged and not self.pending and (delta or final):
            self.pending.append(PromptDone(0, (), self.prompt_tokens))
        if delta:
            self.text += delta
            self.pending.append(Delta(0, delta))

    def failure(self, data: Mapping[str, Any]) -> MoesaicError | None:
        """Return the error in a worker's result ``data``, or of an invalid result; None if the result is valid."""
        error, text = data.get("error"), data.get("text")
        if error:
            return MoesaicError(f"the worker failed: {str(error)[:500]}")
        if not isinstance(text, str):
            return MoesaicError("the worker's result has no text: see the worker's log")
        if self.continuation(text, final=True) is None:
            return Unavailable("the worker's result contradicts its earlier updates: try again")
        return None

    def finished_event(self, data: Mapping[str, Any]) -> Finished:
        """Return the event that ends the answer, from the worker's result ``data``."""
        count, max_tokens = data.get("num_generated_tokens"), self.data.get("max_gen_tokens")
        generated = count if type(count) is int and count >= 0 else len(self.text) // 4
        prompt = data.get("prompt_length")
        if type(prompt) is int and prompt > 0:
            self.prompt_tokens = prompt
        reason = "length" if max_tokens is not None and generated >= max_tokens else "stop"
        return Finished(0, reason, self.prompt_tokens, self.previous_tokens + generated)  # type: ignore[arg-type]


@dataclass
class AimeWorker:
    """An AIME API worker that is connected to this gateway. Times are in seconds of the monotonic clock."""

    name: str
    definitions: Sequence[Definition]
    """The endpoints whose jobs the worker runs: those of its job type."""
    slots: int
    owner: str
    """The name of the worker's key."""
    legacy: bool
    """Whether the worker requests jobs without a login, as older AIME API workers do."""
    about: Mapping[str, Any]
    last_seen: float
    jobs: dict[str, AimeJob] = field(default_factory=dict)
    steps: int = 0
    """Number of lease renewals. It stands in for the engine's step counter, which AIME API workers do not report."""
    pending_requests: int = 0
    """Number of the worker's job requests (long polls) that wait for a response."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def definition(self) -> Definition:
        return self.definitions[0]

    @property
    def full_name(self) -> str:
        """The worker's name in the gateway's registry of the workers of all protocols."""
        return f"{self.owner}/aime:{self.definition.job_type}:{self.name}"

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(definition.offered for definition in self.definitions))

    @property
    def leases(self) -> list[LeaseToken]:
        return [job.lease_token for job in self.jobs.values()]

    def info(self) -> WorkerInfo:
        """Return the registration of this worker for ``WorkerService.register``."""
        models = tuple(ModelInfo(model, about={"worker": "aime"}) for model in self.models)
        return WorkerInfo(self.full_name, models, self.slots, self.about, self.owner)
