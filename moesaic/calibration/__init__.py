"""Quantizes a model with calibration: weights are rounded so that the outputs on some tokens change least.

    quantize(src, dst, Settings("q2"), lambda: sequences)

writes the packed folder ``dst``, layer by layer. Weights in the formats int4, int3 and int2 get error feedback (GPTQ,
arXiv:2210.17323); all others are stored as ``packed.pack`` does. The folder is written as ``.NAME.unfinished`` beside
its final place, with a file of its state. A run that was stopped continues at the first layer that is not finished, and
gives the same bytes.

With a number of bits in place of formats, each weight gets its own format. One pass over the calibration text measures
how much the predictions suffer from each weight (``_sensitivity``), and the bits go to those of which they suffer most
(``_choice``).
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic import checkpoints, models, ops, packed
from moesaic.calibration._choice import MEASURED, Choice, Sensitivity, choices
from moesaic.calibration._choice import lines as lines
from moesaic.calibration._layers import LayerQuantizer
from moesaic.calibration._plain import PlainPass
from moesaic.calibration._sensitivity import Measurement
from moesaic.calibration._states import advance, chunks
from moesaic.checkpoints import Checkpoint, _write
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.formats import Slot
from moesaic.models._layers import Block
from moesaic.packed import PackedManifest

Progress = Callable[[int, int], None]
Sequences = Sequence[Sequence[int]]

CHOICES, GRADIENTS = "choices.json", "gradients.safetensors"

log = logging.getLogger("moesaic.calibration")


@dataclass
class State:
    """What a stopped run continues from.

    Attributes:
        settings: what the run was started with; a run with others does not continue it.
        manifest: description of the packed model, as keywords of ``PackedManifest``; empty while weights are measured.
        sequences: ids of the calibration tokens.
        choices: what was chosen for each weight, as keywords of ``Choice``; empty if the formats were given.
        layers: number of finished layers.
        usage: tokens of each expert, for each finished layer; empty lists for dense layers.
    """

    settings: dict[str, Any]
    manifest: dict[str, Any]
    sequences: list[list[int]]
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: int = 0
    usage: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How a model is quantized. A run with other settings does not continue one that was stopped.

    Attributes:
        format: formats that weights are quantized to, as ``models.choose`` reads them; None if ``bits`` are given.
        dtype: dtype of activations and plain weights; auto: the dtype that the checkpoint is stored in.
        requantize: whether weights that are quantized already may be rounded a second time.
        text: name of the calibration text.
        tokens: maximum number of calibration tokens.
        bits: bits per quantized weight, with scales, within which a format is chosen for each weight; None if
            ``format`` is given.
    """

    format: str | None
    dtype: str = "auto"
    requantize: bool = False
    text: str = ""
    tokens: int = 16384
    bits: float | None = None

    def __post_init__(self) -> None:
        if (self.format is None) == (self.bits is None):
            raise InvalidParameter("bits", "or format must be given, and not both")
        models.choose(self.named_format, "float32")  # refuses an unknown format before anything is read
        if self.tokens < 1:
            raise InvalidParameter("tokens", f"is {self.tokens}, expected at least 1")
        if self.bits is not None and not math.isfinite(self.bits):
            raise InvalidParameter("bits", f"is {self.bits}, expected a number")

    @property
    def named_format(self) -> str:
        """The formats; with ``bits``, the one in which weights are measured."""
        return self.format or MEASURED


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports.

    Attributes:
        usage: the number of calibration tokens of each expert, for each layer; empty lists for dense layers.
        choices: what was chosen for each weight, by the name of its tensor; those of the first expert stand for a
            stack. Empty if the formats were given.
    """

    usage: list[list[int]]
    choices: Mapping[str, Choice]


def quantize(
    src: Path | str,
    dst: Path | str,
    settings: Settings,
    sequences: Callable[[], Sequences],
    progress: Progress | None = None,
    measuring: Progress | None = None,
) -> Outcome:
    """Write the checkpoint ``src``, quantized with calibration, as the new packed folder ``dst``.

    Args:
        src: folder or GGUF file of a checkpoint in any layout.
        dst: a folder that does not exist yet, or is empty.
        settings: formats and calibration text.
        sequences: returns the ids of the calibration tokens; not called if an earlier run is continued.
        progress: called with the calibrated matrices that are finished, and their number.
        measuring: called with the layers whose weights are measured, and their number.

    Raises:
        NotFound: ``src`` does not exist.
        InvalidParameter: the format would round quantized weights; ``dst`` is not empty; an earlier run had other
            settings; there are no calibration tokens; or the smallest format takes more than ``bits``.
        CheckpointError: ``src`` is damaged, ``dst`` cannot be written, or another process writes it.
    """
    target = Path(dst)
    _write.check_new(target)
    with checkpoints.open_checkpoint(src) as checkpoint, _unfinished(target) as (folder, file):
        name, requantize = settings.named_format, settings.requantize
        manifest = packed.manifest_for(checkpoint, name, settings.dtype, requantize=requantize)
        if settings.bits is not None:
            choices(_unmeasured(manifest), settings.bits)  # refuses too few bits before anything is measured
        given = {**asdict(settings), "dtype": manifest.dtype, "source": _identity(checkpoint)}
        state = _read_state(file, given)
        if state is None:
            ids = [list(sequence) for sequence in sequences()]
            if not any(ids):
                raise InvalidParameter("calibrate", "has no text")
            state = State(given, {}, ids)
        resumed = bool(state.manifest)
        if not resumed:
            if settings.bits is not None:
                _choose(state, settings.bits, folder, file, checkpoint, measuring)
            chosen = {name: choice["format"] for name, choice in state.choices.items()}
            state.manifest = asdict(manifest) | {"formats": {**manifest.formats, **chosen}}
        _run(state, folder, file, checkpoint, progress, resumed=resumed)
        packed.finish(folder, PackedManifest(**state.manifest))
        _write.copy_tokenizer(checkpoint, folder)
        if state.choices:
            _write.write_json(folder / CHOICES, {"bits": settings.bits, "weights": state.choices})
        _write.publish(folder, target)
    return Outcome(state.usage, {name: Choice(**choice) for name, choice in state.choices.items()})


def _unmeasured(manifest: PackedManifest) -> dict[str, Sensitivity]:
    """Return the weights of a packed folder that are calibrated; those of the first expert stand for a stack."""
    slots = [slot for slot in manifest.build(Path()).slots() if _is_later(slot) and not slot.entry]
    return {slot.name: Sensitivity(tuple(slot.weight.shape), 0.0) for slot in slots if slot.weight is not None}


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what tells a checkpoint from another one: its path, and the sizes and times of its files."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


@contextmanager
def _unfinished(target: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the folder in which ``target`` is written, and the file of its state.

    Both stay if the block fails, but not if it fails before there is a state.

    Raises:
        CheckpointError: another process writes the folder, or it cannot be written.
    """
    folder = target.parent / f".{target.name}.unfinished"
    file = folder.with_name(f"{folder.name}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder, file
            file.unlink()
        except BlockingIOError as error:
            raise CheckpointError(target, "is being written by another process") from error
        finally:
            if not file.exists():
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise CheckpointError(target, f"could not be written: {error.strerror or error}") from error


def _read_state(file: Path, settings: Mapping[str, Any]) -> State | None:
    """Return the state of the run that was stopped; None if there is none.

    Raises:
        InvalidParameter: it had other settings.
        CheckpointError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        state = State(**json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(file, "damaged: delete it, and quantize again") from error
    wanted = json.loads(json.dumps(settings))
    if state.settings != wanted:
        changed = ", ".join(sorted(key for key in wanted if state.settings.get(key) != wanted[key]))
        problem = f"was begun with other settings ({changed}); repeat them to continue, or delete {file} to begin again"
        raise InvalidParameter("dst", problem)
    log.info("continuing at layer %d", state.layers)
    return state


def _choose(
    state: State, bits: float, folder: Path, file: Path, checkpoint: Checkpoint, progress: Progress | None
) -> None:
    """Measure the weights, and choose their formats; a run that is stopped continues at the next layer."""
    if not state.choices:
        _write_state(file, state)
        measurement = Measurement(checkpoint, state.sequences, folder / GRADIENTS)
        measurement.run(progress)
        state.choices = {name: asdict(choice) for name, choice in choices(measurement.found, bits).items()}
    _write_state(file, state)


def _write_state(file: Path, state: State, weights: Path | None = None) -> None:
    """Write the weights so far to disk, then the state that counts on them."""
    if weights is not None:
        _write.sync(weights)
    new = file.with_name(f"{file.name}.new")
    _write.write_json(new, asdict(state))
    _write.sync(new)
    new.replace(file)


def _run(
    state: State, folder: Path, file: Path, checkpoint: Checkpoint, progress: Progress | None, *, resumed: bool
) -> None:
    """Quantize the layers that are not finished; ``resumed`` if an earlier run has stored the other weights."""
    weights = folder / packed.WEIGHTS
    model = packed.begin(folder, PackedManifest(**state.manifest), resume=resumed)
    if not resumed:
        checkpoints.load_weights(model.slots(), checkpoint, later=_is_later)
        _write_state(file, state, weights)
    total = sum(_is_later(slot) for slot in model.slots())
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with torch.inference_mode():
        quantizer = LayerQuantizer(model, checkpoint, count)
        states, plain = chunks(model, state.sequences), PlainPass(checkpoint, state.sequences)
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            expected = plain.layer(index)
            if index < state.layers:
                done += sum(_is_later(slot) for slot in block.slots()) - 1
                count()
                advance(block, states)
                continue
            quantizer.quantize_block(block, states, expected)
            state.usage.append(quantizer.usage)
            state.layers = index + 1
            _write_state(file, state, weights)
        quantizer.quantize_head(model, states, plain.head())


def _is_later(slot: Slot) -> bool:
    return ops.is_fed_back(slot.format)
