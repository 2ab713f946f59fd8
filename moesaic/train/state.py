"""The state of a training run in one file, which is replaced as a whole, and the log of its steps."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.checkpoints import _write
from moesaic.checkpoints._safetensors import write_file
from moesaic.checkpoints._views import InMemory
from moesaic.errors import CheckpointError

STATE, LOG = "training_state.safetensors", "log.csv"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: number of finished steps.
        tokens: number of tokens that were computed.
        best: the lowest loss on the held-out examples; None before the first evaluation.
        best_step: number of steps after which it was reached.
        worse: evaluations since then.
        stopped_early: whether training ended because of them.
    """

    step: int = 0
    tokens: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    stopped_early: bool = False


@dataclass
class State:
    """What a stopped run continues from.

    Attributes:
        about: settings, data and model of the run; a run about something else does not continue it.
        progress: how far it is.
        tensors: on disk, matrices of the adapter, moments of the optimizer, and the best matrices; in a run that is
            in progress, the best matrices only.
    """

    about: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the state to ``folder``; an earlier one is replaced when the new one is on disk."""
        new = folder / f".{STATE}.new"
        content = json.dumps({"about": self.about, "progress": asdict(self.progress)})
        views = {name: InMemory(tensor.detach().cpu(), new) for name, tensor in self.tensors.items()}
        write_file(new, views, metadata={"moesaic": content})
        _write.sync(new)
        new.replace(folder / STATE)

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """Return the state in ``folder``; None if there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                content = json.loads(file.metadata()["moesaic"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(content["about"], Progress(**content["progress"]), tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(path, f"is damaged: {error}; remove it to train again") from error


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    Attributes:
        step: number of the step, from 1 on.
        loss: mean loss of the step's examples.
        learning_rate: learning rate of the step.
        gradient: norm of the gradient before it was clipped.
        tokens: tokens computed since the start of the run.
        tokens_s: tokens per second in this step.
        accuracy: share of the pairs in which the better answer gains more; only for preferences.
        router_loss: load-balancing loss of the router, if it is part of the loss.
        held_out_loss: mean loss of the held-out examples after this step, if they were evaluated.
    """

    step: int
    loss: float
    learning_rate: float
    gradient: float
    tokens: int
    tokens_s: float
    accuracy: float | None = None
    router_loss: float | None = None
    held_out_loss: float | None = None


class Log:
    """The log of a run as a CSV file, and for TensorBoard if a folder is given."""

    def __init__(self, file: Path, done: int, tensorboard: Path | None = None) -> None:
        """Open the log; lines after the first ``done`` steps are removed."""
        self._columns = list(Entry.__dataclass_fields__)
        kept: list[Mapping[str, str]] = []
        if done and file.exists():
            with file.open(encoding="utf-8", newline="") as old:
                kept = [row for row in csv.DictReader(old) if int(row["step"]) <= done]
        new = file.with_name(f".{file.name}.new")
        with new.open("w", encoding="utf-8", newline="") as target:
            rows = csv.DictWriter(target, self._columns)
            rows.writeheader()
            rows.writerows(kept)
        new.replace(file)
        self._file, self._board = file, _board(tensorboard) if tensorboard else None

    def add(self, entry: Entry) -> None:
        """Add a line."""
        values = {name: "" if value is None else value for name, value in asdict(entry).items()}
        with self._file.open("a", encoding="utf-8", newline="") as target:
            csv.DictWriter(target, self._columns).writerow(values)
        if self._board is not None:
            for name, value in asdict(entry).items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, entry.step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _board(folder: Path) -> Any:
    from moesaic.errors import NotInstalled

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise NotInstalled("the log for TensorBoard needs tensorboard: pip install 'moesaic[train]'") from error
    return SummaryWriter(folder)
