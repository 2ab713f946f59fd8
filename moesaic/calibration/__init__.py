"""Quantizes a model with calibration: weights are rounded so that the outputs on some tokens change least.

    quantize(src, dst, Settings("q2"), lambda: sequences)

writes the packed folder ``dst``, layer by layer. Weights in the formats int4, int3 and int2 get error feedback (GPTQ,
arXiv:2210.17323); all others are stored as ``packed.pack`` does. The folder is written as ``.NAME.unfinished`` beside
its final place, with a file of its state. A run that was stopped continues at the first layer that is not finished, and
gives the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic import checkpoints, models, ops, packed
from moesaic.calibration._layers import LayerQuantizer, advance, chunks
from moesaic.checkpoints import Checkpoint, _write
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.formats import Slot
from moesaic.models._layers import Block
from moesaic.packed import PackedManifest

Progress = Callable[[int, int], None]
Sequences = Sequence[Sequence[int]]


log = logging.getLogger("moesaic.calibration")


@dataclass
class State:
    """What a stopped run continues from.

    Attributes:
        settings: what the run was started with; a run with others does not continue it.
        manifest: description of the packed model, as keywords of ``PackedManifest``.
        sequences: ids of the calibration tokens.
        layers: number of finished layers.
        usage: tokens of each expert, for each finished layer; empty lists for dense layers.
    """

    settings: dict[str, Any]
    manifest: dict[str, Any]
    sequences: list[list[int]]
    layers: int = 0
    usage: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How a model is quantized. A run with other settings does not continue one that was stopped.

    Attributes:
        format: formats that weights are quantized to, as ``models.choose`` reads them.
        dtype: dtype of activations and plain weights; auto: the dtype that the checkpoint is stored in.
        requantize: whether weights that are quantized already may be rounded a second time.
        text: name of the calibration text.
        tokens: maximum number of calibration tokens.
    """

    format: str
    dtype: str = "auto"
    requantize: bool = False
    text: str = ""
    tokens: int = 16384

    def __post_init__(self) -> None:
        models.choose(self.format, "float32")  # refuses an unknown format before anything is read
        if self.tokens < 1:
            raise InvalidParameter("tokens", f"is {self.tokens}, expected at least 1")


def quantize(
    src: Path | str,
    dst: Path | str,
    settings: Settings,
    sequences: Callable[[], Sequences],
    progress: Progress | None = None,
) -> list[list[int]]:
    """Write the checkpoint ``src``, quantized with calibration, as the new packed folder ``dst``.

    Args:
        src: folder or GGUF file of a checkpoint in any layout.
        dst: a folder that does not exist yet, or is empty.
        settings: formats and calibration text.
        sequences: returns the ids of the calibration tokens; not called if an earlier run is continued.
        progress: called with the calibrated matrices that are finished, and their number.

    Returns:
        The number of calibration tokens of each expert, for each layer; empty lists for dense layers.

    Raises:
        NotFound: ``src`` does not exist.
        InvalidParameter: the format would round quantized weights; ``dst`` is not empty; an earlier run had other
            settings; or there are no calibration tokens.
        CheckpointError: ``src`` is damaged, ``dst`` cannot be written, or another process writes it.
    """
    target = Path(dst)
    _write.check_new(target)
    with checkpoints.open_checkpoint(src) as checkpoint, _unfinished(target) as (folder, file):
        manifest = packed.manifest_for(checkpoint, settings.format, settings.dtype, requantize=settings.requantize)
        given = {**asdict(settings), "dtype": manifest.dtype, "source": _identity(checkpoint)}
        state = _read_state(file, given)
        if state is None:
            ids = [list(sequence) for sequence in sequences()]
            if not any(ids):
                raise InvalidParameter("calibrate", "has no text")
            state = State(given, asdict(manifest), ids)
        _run(state, folder, file, checkpoint, progress)
        packed.finish(folder, PackedManifest(**state.manifest))
        _write.copy_tokenizer(checkpoint, folder)
        _write.publish(folder, target)
    return state.usage


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


def _write_state(file: Path, state: State, weights: Path) -> None:
    """Write the weights so far to disk, then the state that counts on them."""
    _write.sync(weights)
    new = file.with_name(f"{file.name}.new")
    _write.write_json(new, asdict(state))
    _write.sync(new)
    new.replace(file)


def _run(state: State, folder: Path, file: Path, checkpoint: Checkpoint, progress: Progress | None) -> None:
    """Quantize the layers that are not finished."""
    weights, resumed = folder / packed.WEIGHTS, file.exists()
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
        states = chunks(model, state.sequences)
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            if index < state.layers:
                done += sum(_is_later(slot) for slot in block.slots()) - 1
                count()
                advance(block, states)
                continue
            quantizer.quantize_block(block, states)
            state.usage.append(quantizer.usage)
            state.layers = index + 1
            _write_state(file, state, weights)
        quantizer.quantize_head(model, states)


def _is_later(slot: Slot) -> bool:
    return ops.is_fed_back(slot.format)
