"""The training loop: steps, evaluations, saves, and continuation of a run that was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import adapters, memory
from moesaic.adapters import peft
from moesaic.errors import InvalidRequest, NumericalError
from moesaic.models import Decoder
from moesaic.train import order
from moesaic.train.model import forget_routing, prepare, router_loss
from moesaic.train.settings import Settings
from moesaic.train.state import LOG, STATE, Entry, Log, State
from moesaic.train.tasks import Task, evaluate

LARGE_ALLOCATION = 4 << 20
"""Bytes of temporary tensors whose memory is given back; pieces that stay would add 300 MB for each layer of 8x7B."""
MOMENTS = ("exp_avg", "exp_avg_sq")
BEST = "best."

OnStep = Callable[[Entry, int], None]
"""Called after each step with its line of the log and the number of steps."""


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        steps: number of steps, in earlier runs that it continued too.
        tokens: number of tokens that were computed.
        loss: mean loss of the last step.
        held_out_loss: the lowest loss on the held-out examples, which is that of the adapter; None without them.
        best_step: number of steps after which it was reached.
        stopped_early: whether the run ended because the loss did not improve any more.
    """

    steps: int
    tokens: int
    loss: float | None
    held_out_loss: float | None
    best_step: int
    stopped_early: bool


def train(
    model: Decoder,
    task: Task,
    settings: Settings,
    out: Path,
    *,
    base: str,
    held_out: Task | None = None,
    tensorboard: Path | None = None,
    on_step: OnStep | None = None,
) -> Outcome:
    """Train an adapter for ``model`` and write it to the folder ``out``.

    With held-out examples, the adapter is the one with the lowest loss on them. A run that was stopped is continued if
    ``out`` has its state and the settings, the data and the model are the same. It gives what it would have given.

    Args:
        model: the model; it gets an adapter, and its own weights stay as they are.
        task: what to learn.
        settings: how.
        out: folder for the adapter, the log and the state; it is created.
        base: name of the model, which the adapter states.
        held_out: what the adapter is evaluated on; None: nothing.
        tensorboard: folder for a log that TensorBoard shows; None: there is none.
        on_step: called after each step.

    Raises:
        InvalidParameter: the model has none of the weights that the adapter is for.
        InvalidRequest: ``out`` has the state of another run, or of one that is finished.
        NumericalError: the loss is NaN or infinite.
    """
    about = {
        "settings": json.loads(json.dumps(asdict(settings))),  # as the state holds them
        "base": base,
        "task": task.kind,
        "items": len(task),
        "weights": sum(task.weight(item) for item in range(len(task))),
        "held_out": len(held_out) if held_out else 0,
    }
    run = _Run(model, task, settings, out, base, held_out, _state(out, about))
    memory.map_large_allocations(LARGE_ALLOCATION)
    log = Log(out / LOG, run.state.progress.step, tensorboard)
    try:
        return run.finish(log, on_step)
    finally:
        log.close()


def _state(out: Path, about: dict[str, Any]) -> State:
    """Return the state to continue in ``out``, or a new one."""
    found = State.read(out) if out.is_dir() else None
    if found is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InvalidRequest(f"{out} exists and is no unfinished run; choose another folder, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        return State(about)
    if found.about != about:
        different = next(key for key in about if found.about.get(key) != about[key])
        if different == "settings":
            old, new = found.about["settings"], about["settings"]
            different = ", ".join(key for key in new if old.get(key) != new[key])
        raise InvalidRequest(f"{out} has an unfinished run with other {different}; choose another folder, or remove it")
    return found


class _Run:
    """A run in progress."""

    def __init__(
        self,
        model: Decoder,
        task: Task,
        settings: Settings,
        out: Path,
        base: str,
        held_out: Task | None,
        state: State,
    ) -> None:
        self.state = state
        self._model, self._task, self._settings = model, task, settings
        self._out, self._base, self._held_out = out, base, held_out
        self._total = settings.total_steps(len(task))
        prepare(model, settings)
        self._matrices = adapters.matrices(model)
        self._optimizer = torch.optim.AdamW(
            self._matrices.values(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,  # the others need temporary memory for all matrices
        )
        if state.progress.step:
            self._restore()
        else:
            self._save()  # so that the folder is known as one of a run, should it stop before its next save

    def finish(self, log: Log, on_step: OnStep | None) -> Outcome:
        """Run the steps that are left, and write the adapter."""
        progress, settings = self.state.progress, self._settings
        loss: float | None = None
        with self._saved_when_stopped():
            items = order.batches(len(self._task), settings.batch, settings.seed, progress.step)
            while progress.step < self._total and not progress.stopped_early:
                entry = self._step(next(items))
                loss = entry.loss
                log.add(entry)
                if progress.step % settings.save_every == 0:
                    self._save()
                if on_step is not None:
                    on_step(entry, self._total)
        best = {name: self.state.tensors[BEST + name] for name in self._matrices} if self._held_out else self._matrices
        peft.write(self._out, settings.adapter, self._base, best)
        (self._out / STATE).unlink(missing_ok=True)
        return Outcome(progress.step, progress.tokens, loss, progress.best, progress.best_step, progress.stopped_early)

    @contextmanager
    def _saved_when_stopped(self) -> Iterator[None]:
        """Save the state if the user interrupts the run."""
        try:
            yield
        except KeyboardInterrupt:
            self._save()
            raise

    def _step(self, items: Sequence[int]) -> Entry:
        start, progress, settings = time.perf_counter(), self.state.progress, self._settings
        rate = settings.rate(progress.step, self._total)
        loss, right, balance = self._gradients(items)
        gradient = nn.utils.clip_grad_norm_(self._matrices.values(), settings.clip)
        if not (torch.isfinite(gradient) and torch.isfinite(torch.tensor(loss))):
            raise NumericalError(
                f"step {progress.step + 1}: the loss is {loss} and the norm of the gradient {float(gradient)}; "
                "try a lower learning rate"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        tokens = sum(self._task.tokens(item) for item in items)
        seconds = time.perf_counter() - start
        progress.step += 1
        progress.tokens += tokens
        evaluated = self._held_out is not None and (
            progress.step % settings.evaluate_every == 0 or progress.step == self._total
        )
        return Entry(
            step=progress.step,
            loss=loss,
            learning_rate=rate,
            gradient=float(gradient),
            tokens=progress.tokens,
            tokens_s=tokens / seconds,
            accuracy=right / len(items) if self._task.kind == "dpo" else None,
            router_loss=balance,
            held_out_loss=self._evaluate() if evaluated else None,
        )

    def _gradients(self, items: Sequence[int]) -> tuple[float, float, float | None]:
        """Add the gradients of a step's loss; return the mean loss, how many items are right, and the router's loss."""
        task, settings = self._task, self._settings
        weight = sum(task.weight(item) for item in items)
        tokens = sum(task.tokens(item) for item in items)
        loss, right, balance = 0.0, 0.0, 0.0 if settings.router_loss else None
        for part in self._parts(task, items):
            forget_routing(self._model)
            total, correct = task.loss(self._model, part)
            mean = total / weight
            loss, right = loss + float(mean.detach()), right + correct
            extra = router_loss(self._model) if settings.router_loss else None
            if extra is not None and balance is not None:
                share = sum(task.tokens(item) for item in part) / tokens
                balance += share * float(extra.detach())
                mean = mean + settings.router_loss * share * extra
            mean.backward()
        return loss, right, balance

    def _parts(self, task: Task, items: Sequence[int]) -> list[list[int]]:
        sizes = [task.tokens(item) for item in items]
        return list(order.parts(list(items), sizes, self._settings.micro_batch_tokens))

    def _evaluate(self) -> float:
        """Return the loss on the held-out items, and remember the adapter if it is the best so far."""
        assert self._held_out is not None
        progress = self.state.progress
        loss = evaluate(self._model, self._held_out, self._parts(self._held_out, range(len(self._held_out))))
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_step, progress.worse = loss, progress.step, 0
            self.state.tensors |= {BEST + name: each.detach().clone() for name, each in self._matrices.items()}
        else:
            progress.worse += 1
            patience = self._settings.patience
            progress.stopped_early = patience is not None and progress.worse >= patience
        return loss

    def _save(self) -> None:
        tensors: dict[str, Tensor] = dict(self.state.tensors)
        for name, parameter in self._matrices.items():
            tensors[name] = parameter.detach()
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{moment}": moments[moment] for moment in MOMENTS if moment in moments}
        State(self.state.about, self.state.progress, tensors).write(self._out)

    def _restore(self) -> None:
        stored = self.state.tensors
        adapters.load(self._model, {name: stored[name] for name in self._matrices})
        step = torch.tensor(float(self.state.progress.step))
        for name, parameter in self._matrices.items():
            moments = {moment: stored[f"{name}.{moment}"] for moment in MOMENTS}
            self._optimizer.state[parameter] = {"step": step.clone(), **moments}
        self.state.tensors = {name: each for name, each in stored.items() if name.startswith(BEST)}
