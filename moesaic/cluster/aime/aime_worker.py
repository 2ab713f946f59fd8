"""One of AIME's workers as this gateway knows it, and the jobs that it has.

An update of such a worker has the whole text so far: here is what of it is new. Knows no leases of others, no HTTP.
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
    """A job that a worker has; times by the monotonic clock."""

    id: str
    """As the worker knows it: a job that comes back to a worker is another one to it."""
    lease_token: LeaseToken
    data: Mapping[str, Any]
    before: str
    """What earlier leases have said."""
    tokens_before: int
    said: str
    """All that was said, with what was before."""
    logged: int
    """Events that its log has."""
    heard: float
    prompt_tokens: int = 0
    pending: list[Event] = field(default_factory=list)
    """Events that the log does not have yet: what is sent again after a failure must be the same."""
    doubted: float | None = None
    """Since when its worker seems not to have it."""

    def more(self, text: str, *, final: bool = False) -> str | None:
        """Return what a text has beyond what was said; None if it does not go on from there."""
        whole = self.before + (text if final else text.rstrip("\ufffd"))  # half a character may yet become one
        if whole.startswith(self.said):
            return whole[len(self.said) :]
        # What is stripped off a final text has been said, and does no harm.
        return "" if final and self.said.strip().startswith(whole.strip()) and whole.strip() else None

    def note(self, data: Mapping[str, Any], *, final: bool = False) -> None:
        """Take down what an update tells that was not known; a text that does not go on from what was said is none."""
        whole, generated = data.get("current_context_length"), data.get("num_generated_tokens")
        if type(whole) is int and type(generated) is int and whole > generated:
            self.prompt_tokens = self.prompt_tokens or whole - generated
        text = data.get("text")
        more = self.more(text, final=final) if isinstance(text, str) else None
        if not self.logged and not self.pending and (more or final):
            self.pending.append(PromptDone(0, (), self.prompt_tokens))
        if more:
            self.said += more
            self.pending.append(Delta(0, more))

    def failure(self, data: Mapping[str, Any]) -> MoesaicError | None:
        """Return what is wrong with a result."""
        error, text = data.get("error"), data.get("text")
        if error:
            return MoesaicError(f"the worker failed: {str(error)[:500]}")
        if not isinstance(text, str):
            return MoesaicError("the worker's result has no text")
        if self.more(text, final=True) is None:
            return Unavailable("the worker's result is not what it had said before: ask again")
        return None

    def end(self, data: Mapping[str, Any]) -> Finished:
        """Return the end that a result tells."""
        count, most = data.get("num_generated_tokens"), self.data.get("max_gen_tokens")
        generated = count if type(count) is int and count >= 0 else len(self.said) // 4
        prompt = data.get("prompt_length")
        if type(prompt) is int and prompt > 0:
            self.prompt_tokens = prompt
        reason = "length" if most is not None and generated >= most else "stop"
        return Finished(0, reason, self.prompt_tokens, self.tokens_before + generated)  # type: ignore[arg-type]


@dataclass
class AimeWorker:
    """One of AIME's workers."""

    name: str
    definitions: Sequence[Definition]
    """Endpoints of its job type."""
    slots: int
    owner: str
    legacy: bool
    """Whether it has begun without a login of its own."""
    about: Mapping[str, Any]
    heard: float
    jobs: dict[str, AimeJob] = field(default_factory=dict)
    steps: int = 0
    asking: int = 0
    """Requests for jobs that wait for an answer."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def definition(self) -> Definition:
        return self.definitions[0]

    @property
    def worker(self) -> str:
        """Its name among all workers."""
        return f"{self.owner}/aime:{self.definition.job_type}:{self.name}"

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(each.offered for each in self.definitions))

    @property
    def leases(self) -> list[LeaseToken]:
        return [running.lease_token for running in self.jobs.values()]

    def info(self) -> WorkerInfo:
        """Return the worker as it offers itself."""
        models = tuple(ModelInfo(model, about={"worker": "aime"}) for model in self.models)
        return WorkerInfo(self.worker, models, self.slots, self.about, self.owner)
