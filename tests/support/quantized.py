"""Checkpoints with quantized weights of random codes, and their weights, decoded with numpy from the published layouts.

Nothing here shares code with the readers. A matrix is a dictionary of tensors as a file has them, by the part of the
name after the module, and the plain weight that they stand for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic import ops
from moesaic.checkpoints._views import Index, TensorInfo, bounds, sizes
from tests.support import checkpoints
from tests.support.loading import load_model

Matrix = tuple[dict[str, Tensor], Tensor]
NF4 = torch.tensor(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12


class Held:
    """A view of a tensor in memory that counts the elements that were read."""

    def __init__(self, tensor: Tensor, file: str = "model.safetensors") -> None:
        self.tensor = tensor
        self.info = TensorInfo(tuple(tensor.shape), tensor.dtype, Path(file))
        self.read_elements = 0

    def read(self, index: Index | None = None) -> Tensor:
        part = bounds(index, self.info.shape)
        self.read_elements += math.prod(sizes(part))
        return self.tensor[part]


def bits_of(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Return rows of codes as rows of int32 words, bit by bit, lowest first."""
    single = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    flat = single.reshape(len(codes), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view("<i4")


@dataclass(frozen=True)
class Compressed:
    """A variant of compressed-tensors."""

    format: str = "pack-quantized"
    bits: int = 4
    symmetric: bool = True
    strategy: str = "group"
    group: int | None = None
    block: tuple[int, int] | None = None
    order: bool = False
    scale: torch.dtype = torch.bfloat16
    flat_scale: bool = False
    """Whether scales have no axis of length 1 at the end."""
    plain_zeros: bool = False
    """Whether zero points of packed weights are int8, as older versions wrote them."""

    @property
    def kind(self) -> str:
        return "float" if self.format == "float-quantized" else "int"

    def settings(self) -> dict[str, Any]:
        """Return the quantization_config."""
        weights = {"num_bits": self.bits, "type": self.kind, "symmetric": self.symmetric, "strategy": self.strategy}
        weights |= {"group_size": self.group, "dynamic": False, "observer": "minmax", "observer_kwargs": {}}
        weights |= {"block_structure": self.block and list(self.block), "actorder": "group" if self.order else None}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "config_groups": {"group_0": {**group, "output_activations": None}},
            "ignore": ["lm_head", "re:.*gate$"],
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "global_compression_ratio": 1.5,
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.20.1",
        }

    def matrix(self, rows: int, columns: int, generator: torch.Generator) -> Matrix:
        """Return random tensors of a matrix, and its weight."""
        height, width = self._block(rows, columns)
        grid = (-(-rows // height), -(-columns // width))
        scale = ((torch.rand(grid, generator=generator) + 0.5) * 0.05).to(self.scale)
        across, order = torch.arange(columns) // width, None
        if self.order:
            order = across[torch.randperm(columns, generator=generator)]
        down, across = torch.arange(rows) // height, across if order is None else order
        reach = 1 << (self.bits - 1)
        parts: dict[str, Tensor] = {"weight_scale": scale.squeeze(-1) if self.flat_scale else scale}
        if order is not None:
            parts["weight_g_idx"] = order.int()
        if self.kind == "float":
            level = (torch.rand(rows, columns, generator=generator) * 64 - 32).to(torch.float8_e4m3fn)
            parts["weight"] = level
            return parts, level.float() * scale.float()[down][:, across]
        level = torch.randint(-reach, reach, (rows, columns), generator=generator)
        zeros = torch.zeros(grid, dtype=torch.int64)
        if not self.symmetric:
            zeros = torch.randint(-reach, reach, grid, generator=generator)
            parts["weight_zero_point"] = self._zeros(zeros, reach)
        if self.format == "pack-quantized":
            parts["weight_packed"] = torch.from_numpy(bits_of((level + reach).numpy(), self.bits))
            parts["weight_shape"] = torch.tensor([rows, columns])
        else:
            parts["weight"] = level.to(torch.int8)
        return parts, (level - zeros[down][:, across]).float() * scale.float()[down][:, across]

    def _zeros(self, zeros: Tensor, reach: int) -> Tensor:
        if self.format != "pack-quantized" or self.plain_zeros:
            return zeros.to(torch.int8)
        return torch.from_numpy(bits_of((zeros + reach).numpy().T, self.bits).T.copy())

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        if self.block is not None:
            return self.block
        return {"tensor": (rows, columns), "channel": (1, columns), "group": (1, self.group or 0)}[self.strategy]


@dataclass(frozen=True)
class Bitsandbytes:
    """A variant of bitsandbytes."""

    levels: str = "nf4"
    block: int = 64
    nested: bool = False
    storage: torch.dtype = torch.uint8
    scale: torch.dtype = torch.float32
    turned: bool = False
    """Whether scales are [C / block, R], as a program with a certain CPU saves them after a forward pass."""

    def settings(self) -> dict[str, Any]:
        """Return the quantization_config."""
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": self.levels != "int8",
            "_load_in_8bit": self.levels == "int8",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.nested,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_threshold": 6.0,
            "load_in_4bit": self.levels != "int8",
            "load_in_8bit": self.levels == "int8",
        }

    def matrix(self, rows: int, columns: int, generator: torch.Generator) -> Matrix:
        """Return random tensors of a matrix, and its weight."""
        if self.levels == "int8":
            codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
            largest = torch.rand(rows, generator=generator) + 0.5
            parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
            return parts, codes.float() * (largest / 127)[:, None]
        count = rows * columns
        codes = torch.randint(0, 16, (count + count % 2,), generator=generator)
        packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
        table = NF4 if self.levels == "nf4" else FP4
        blocks = -(-count // self.block)
        scale, parts, state = self._scales(blocks, generator)
        if self.turned:
            parts["weight.absmax"] = parts["weight.absmax"].reshape(rows, -1).T.contiguous()
        state |= {"quant_type": self.levels, "blocksize": self.block, "dtype": "bfloat16", "shape": [rows, columns]}
        parts["weight"] = packed.view(self.storage)[:, None]
        parts["weight.quant_map"] = table.clone()
        parts[f"weight.quant_state.bitsandbytes__{self.levels}"] = as_bytes(state)
        weight = table[codes[:count]] * scale.repeat_interleave(self.block)[:count]
        return parts, weight.reshape(rows, columns)

    def _scales(self, blocks: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Return the scale of each block, the tensors that hold it, and keys of the JSON object."""
        if not self.nested:
            scale = (torch.rand(blocks, generator=generator) + 0.5).to(self.scale)
            return scale.float(), {"weight.absmax": scale}, {}
        stored = torch.randint(0, 256, (blocks,), generator=generator)
        levels = torch.linspace(-1, 1, 256)
        factors = torch.rand(-(-blocks // 256), generator=generator) * 0.1
        parts = {"weight.absmax": stored.to(torch.uint8), "weight.nested_absmax": factors}
        parts["weight.nested_quant_map"] = levels
        state = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        return levels[stored] * factors.repeat_interleave(256)[:blocks] + 0.25, parts, state


def as_bytes(state: Any) -> Tensor:
    """Return a JSON value as a tensor of bytes."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


CLASSIC: Mapping[str, str] = {}
NAMINGS: Mapping[str, Mapping[str, str]] = {
    "w1": CLASSIC,
    "block_sparse_moe, gate_proj": {".w1": ".gate_proj", ".w2": ".down_proj", ".w3": ".up_proj"},
    "mlp, gate_proj": {
        ".w1": ".gate_proj",
        ".w2": ".down_proj",
        ".w3": ".up_proj",
        "block_sparse_moe": "mlp",
    },
}
"""The names of experts in files: texts to replace in the classic name."""


@dataclass
class Files:
    """A model with quantized linear layers, not yet written: its tensors in the file, and its plain weights."""

    config: dict[str, Any]
    stored: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write the quantized checkpoint."""
        stored = {name: tensor.contiguous() for name, tensor in self.stored.items()}
        return checkpoints.write(path, self.config, stored)

    def write_plain(self, path: Path) -> Path:
        """Write a checkpoint with the plain weights."""
        config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        return checkpoints.write(path, config, self.plain)


def files(variant: Compressed | Bitsandbytes, kind: str, naming: Mapping[str, str] = CLASSIC, **changes: Any) -> Files:
    """Return a small model of ``kind`` in which the linear layers are quantized, but not router, embedding and head."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, **changes}
    config = checkpoints.config(kind, **sizes)
    out = Files({**config, "quantization_config": variant.settings()})
    generator = torch.Generator().manual_seed(3)
    for name, weight in checkpoints.weights(config).items():
        module = name.removesuffix(".weight")
        if not module.endswith(("_proj", "w1", "w2", "w3")):
            out.stored[renamed(name, naming)] = out.plain[name] = weight
            continue
        parts, out.plain[name] = variant.matrix(*weight.shape, generator)
        out.stored |= {f"{renamed(module, naming)}.{part}": tensor for part, tensor in parts.items()}
    return out


def stacked_files(variant: Compressed | Bitsandbytes, separator: str = ".") -> Files:
    """Return a small Mixtral whose quantized experts are stacks, one tensor for all experts of a layer.

    ``separator`` is between the name of the stack and the last part of a tensor's name.
    """
    config = checkpoints.config("mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    out = Files({**config, "quantization_config": variant.settings()})
    generator, experts = torch.Generator().manual_seed(3), config["num_local_experts"]
    for name, weight in checkpoints.weights(config).items():
        if ".experts." not in name:
            out.stored[name] = out.plain[name] = weight
    layer = "model.layers.0."
    for kind, rows, columns in (("gate_up", 192, 64), ("down", 64, 96)):
        parts, weights = _stack(variant, (experts, rows, columns), generator)
        for part, tensor in parts.items():
            last = part.removeprefix("weight").lstrip("._") if separator == "_" else part
            if isinstance(variant, Bitsandbytes):
                last = part.removeprefix("weight").lstrip(".")
            out.stored[f"{layer}mlp.experts.{kind}_proj{separator if last else ''}{last}"] = tensor
        for expert, weight in enumerate(weights):
            named = {"w2": weight} if kind == "down" else dict(zip(("w1", "w3"), weight.chunk(2), strict=True))
            for number, matrix in named.items():
                out.plain[f"{layer}block_sparse_moe.experts.{expert}.{number}.weight"] = matrix.clone()
    return out


def _stack(
    variant: Compressed | Bitsandbytes, shape: tuple[int, int, int], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Return random tensors of a stack of matrices, and its weights."""
    experts, rows, columns = shape
    if isinstance(variant, Compressed):
        matrices, weights = zip(*(variant.matrix(rows, columns, generator) for _ in range(experts)), strict=True)
        parts = {part: torch.stack([each[part] for each in matrices]) for part in matrices[0] if part != "weight_shape"}
        return parts, torch.stack(weights)
    parts, weight = variant.matrix(experts * rows, columns, generator)
    state = f"weight.quant_state.bitsandbytes__{variant.levels}"
    parts[state] = as_bytes(json.loads(bytes(parts[state].tolist())) | {"shape": list(shape)})
    return parts, weight.reshape(shape)


def assert_equals_plain(model: Files, folder: Path) -> None:
    """Write a model twice, quantized and plain, and compare the decoded weights and the logits bit by bit."""
    quantized, plain = model.write(folder / "quantized"), model.write_plain(folder / "plain")
    read = checkpoints.read(quantized)
    assert read.keys() == model.plain.keys()
    assert all(torch.equal(read[key], weight) for key, weight in model.plain.items())
    assert torch.equal(logits(quantized), logits(plain))


def logits(path: Path) -> Tensor:
    """Return the logits of a few tokens, from the model at ``path`` with its weights decoded to float32."""
    decoder = load_model(path, dtype="float32", format="float32").model
    with torch.inference_mode():
        return decoder.logits(decoder(ops.Batch.whole([[1, 5, 9, 3, 2, 7]])))


def renamed(name: str, naming: Mapping[str, str]) -> str:
    """Return the name of a tensor in a file."""
    for classic, other in naming.items():
        name = name.replace(classic, other)
    return name


Reader = Callable[[Mapping[str, Any], Mapping[str, Any], Path], Mapping[str, Any]]


def view_of(reader: Reader, variant: Compressed | Bitsandbytes, rows: int, columns: int) -> tuple[Any, Any, Tensor]:
    """Return the reader's view of one random matrix, the views of its tensors, and its weight."""
    parts, weight = variant.matrix(rows, columns, torch.Generator().manual_seed(rows * columns))
    held = {f"m.{part}": Held(tensor) for part, tensor in parts.items()}
    views = reader(held, variant.settings(), Path("config.json"))
    assert list(views) == ["m.weight"]
    return views["m.weight"], held, weight
