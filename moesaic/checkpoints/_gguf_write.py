"""Writes GGUF files: quantized weights keep their codes, in the block type that holds them exactly.

Norms and routers become F32, as llama.cpp requires; other floats keep their dtype. The experts of a layer become one
stack of each kind.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic import gguf
from moesaic.checkpoints import Checkpoint, check_head
from moesaic.checkpoints._decoder import DecoderConfig
from moesaic.checkpoints._exact import Inexact
from moesaic.checkpoints._gguf_blocks import DECODERS
from moesaic.checkpoints._gguf_encoders import encode_rows
from moesaic.checkpoints._gguf_exact import exact_types, recoded
from moesaic.checkpoints._gguf_metadata import own_header, parse, records, rope_factors
from moesaic.checkpoints._gguf_names import ROPE_FACTORS, ROTARY, gguf_name
from moesaic.checkpoints._gguf_tensors import PLAIN
from moesaic.checkpoints._views import CodedView, Index, InMemory, Rotary, Stored, TensorInfo, View, bounds, dtype_name
from moesaic.checkpoints._write import WriteOptions, balanced, check_shards, new_path, views
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.gguf import TYPES, BlockType, NewTensor

_BY_NAME = {kind.name: kind for kind in TYPES.values()}
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: its name and shape, its type, and views of its rows; experts of a stack are one view each."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    pieces: Sequence[View]

    @property
    def described(self) -> NewTensor:
        return NewTensor(self.name, self.shape, self.type, sum(piece.info.nbytes for piece in self.pieces))


def write(source: Checkpoint, path: Path, options: WriteOptions) -> None:
    """Write ``source`` as a GGUF file, with its vocabulary and chat template.

    Args:
        source: the checkpoint to write.
        path: the new file if the name ends with .gguf, otherwise a new folder for it.
        options: ``shards`` files; more than one need a folder.

    Raises:
        InvalidParameter: ``path`` exists, or there are more shards than tensors, or several for one file.
        ConfigError: GGUF files cannot express the configuration.
        TokenizerError: GGUF files cannot express the tokenizer.
        CheckpointError: a tensor has no name in GGUF files, or no type holds it exactly; or the source cannot be read,
            or the target cannot be written.
    """
    decoder, linear = parse(source)
    check_head(source)
    tensors = _tensors(source, decoder, decode=options.decode)
    check_shards(options.shards, len(tensors))
    is_file = path.suffix == ".gguf"
    if is_file and options.shards > 1:
        raise InvalidParameter("shards", f"is {options.shards}, but {path.name} is one file; name a folder")
    vocabulary = {} if own_header(source) else options.vocabulary()
    values = records(source, decoder, linear, vocabulary)
    with new_path(path) as temporary:
        if not is_file:
            temporary.mkdir()
        sizes = {tensor.name: tensor.described.nbytes for tensor in tensors}
        by_name = {tensor.name: tensor for tensor in tensors}
        for number, names in enumerate(balanced(sizes, options.shards)):
            file = temporary if is_file else temporary / f"{path.name}.gguf"
            if options.shards > 1:
                file = file.with_name(gguf.part_name(path.name, number + 1, options.shards))
                values = [*(values if number == 0 else ()), *gguf.split_records(number, options.shards, len(tensors))]
            _write_file(file, values, [by_name[name] for name in names], options)


def _write_file(file: Path, values: Sequence[bytes], tensors: Sequence[_Tensor], options: WriteOptions) -> None:
    with file.open("wb") as stream:
        stream.write(gguf.header(values, [tensor.described for tensor in tensors]))
        for tensor in tensors:
            for piece in tensor.pieces:
                data = piece.read().contiguous()
                stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
                if options.on_write is not None:
                    options.on_write(data.nbytes)
            stream.write(bytes(gguf.padding(tensor.described.nbytes)))


def _tensors(source: Checkpoint, decoder: DecoderConfig, *, decode: bool) -> list[_Tensor]:
    """Return the tensors to write: the embedding, the layers in order, then the others.

    Raises:
        CheckpointError: a tensor has no name in GGUF files, an expert is missing, or no type holds a tensor exactly.
    """
    members: dict[str, dict[int | None, str]] = {}
    for name in views(source):
        place = gguf_name(name)
        if place is None:
            raise CheckpointError(source.tensors[name].file, f"{name} has no name in this layout; use hf")
        members.setdefault(place[0], {})[place[1]] = name
    made = [_tensor(source, name, members[name], decoder, decode=decode) for name in sorted(members, key=_position)]
    factors = rope_factors(decoder)
    if factors is not None:
        made.append(_Tensor(ROPE_FACTORS, tuple(factors.shape), _BY_NAME["F32"], [InMemory(factors, source.path)]))
    return made


def _position(name: str) -> tuple[int, int]:
    """Return a key that sorts tensors into the order of a file."""
    layer = name.split(".")[1]
    return (1, int(layer)) if name.startswith("blk.") else (0 if name.startswith("token_embd") else 2, 0)


def _tensor(
    source: Checkpoint, name: str, members: Mapping[int | None, str], decoder: DecoderConfig, *, decode: bool
) -> _Tensor:
    """Return the tensor ``name`` of a file; ``members`` has the classic name of each expert of a stack, or one name."""
    stacked = None not in members
    if stacked and sorted(key for key in members if key is not None) != list(range(decoder.experts or 0)):
        raise CheckpointError(source.path, f"{name} needs {decoder.experts} experts, found {len(members)}")
    names = [members[key] for key in sorted(members, key=lambda key: key or 0)]
    kind = _kind(source, names, decode=decode)
    shape = source.tensors[names[0]].shape
    pieces = [_rows(source, classic, kind, decoder) for classic in names]
    return _Tensor(name, (len(names), *shape) if stacked else shape, _BY_NAME[kind], pieces)


def _kind(source: Checkpoint, names: Sequence[str], *, decode: bool) -> str:
    """Return the type in which all of these tensors are written; with ``decode``, F32 if no type holds them exactly.

    Raises:
        CheckpointError: no type holds them exactly.
    """
    coded = [name for name in names if name in source.quantized]
    plain = {source.tensors[name].dtype for name in names if name not in coded}
    if unknown := [name for name in names if name not in coded and source.tensors[name].dtype not in _PLAIN]:
        info = source.tensors[unknown[0]]
        problem = f"{unknown[0]} is stored as {dtype_name(info.dtype)}, which cannot be written in the gguf layout"
        raise CheckpointError(info.file, f"{problem}; use hf")
    if not coded:
        small = len(source.tensors[names[0]].shape) == 1 or names[0].endswith(".gate.weight")
        return "F32" if small or len(plain) > 1 else _PLAIN[plain.pop()]
    mixed = "other experts of its layer are not quantized"
    found = _refusal(source, coded[0], mixed) if plain else _smallest(source, coded)
    if isinstance(found, str):
        return found
    if decode:
        return "F32"
    raise found


def _smallest(source: Checkpoint, names: Sequence[str]) -> str | CheckpointError:
    """Return the smallest type that holds all of these tensors exactly; an error to raise if there is none."""
    common: tuple[str, ...] = ()
    for number, name in enumerate(names):
        try:
            types = exact_types(source.quantized[name])
        except Inexact as error:
            return _refusal(source, name, str(error))
        common = tuple(kind for kind in (common if number else types) if kind in types)
        if not common:
            return _refusal(source, name, "the experts of its layer have no type in common")
    return common[0]


def _refusal(source: Checkpoint, name: str, reason: str) -> CheckpointError:
    problem = f"{name} ({source.stored_type(name)}) cannot be written exactly in a quantized type of GGUF: {reason}"
    advice = "add --decode to write it as F32, or convert to hf"
    return CheckpointError(source.tensors[name].file, f"{problem}; {advice}")


def _rows(source: Checkpoint, name: str, kind: str, decoder: DecoderConfig) -> View:
    """Return a view of a tensor as a file has it: floats, or the bytes of blocks; rotary rows are interleaved."""
    coded = kind in DECODERS
    rows: View = _Encoded(source.quantized[name], kind) if coded else _Cast(Stored(source, name), PLAIN[kind])
    return Rotary(rows, decoder.head_dim, half_split=False) if ROTARY.fullmatch(name) else rows


class _Cast:
    """View of another view in a dtype that holds its numbers exactly."""

    def __init__(self, other: View, dtype: torch.dtype) -> None:
        self._other = other
        self.info = TensorInfo(other.info.shape, dtype, other.info.file)

    def read(self, index: Index | None = None) -> Tensor:
        return self._other.read(index).to(self.info.dtype)


class _Encoded:
    """View of the rows [rows, bytes] uint8 of a quantized matrix in the block type ``kind``; rows are read whole."""

    def __init__(self, view: CodedView, kind: str) -> None:
        self._view, self._kind = view, kind
        rows, columns = view.info.shape
        block = DECODERS[kind].type
        self.info = TensorInfo((rows, columns // block.elements * block.nbytes), torch.uint8, view.info.file)

    def read(self, index: Index | None = None) -> Tensor:
        rows, _ = bounds(index, self.info.shape)
        assert self._view.format is not None
        codes = recoded(self._kind, self._view.format, self._view.codes((rows,)))
        assert codes is not None
        return encode_rows(self._kind, codes)
