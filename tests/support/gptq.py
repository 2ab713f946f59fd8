"""Checkpoints in the layouts of GPTQ and AWQ with random codes, written and decoded bit by bit from their descriptions.

Nothing here comes from Moesaic's readers: integers are packed and unpacked as strings of bits by numpy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support import checkpoints

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row of the weight in each four bits of a word of AWQ, from the lowest on."""
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "vocab_size": 32}
"""Sizes for which each matrix has a multiple of 32 rows, and groups of 128 columns do not divide all of them."""
QUANTIZED = re.compile(r".*\.([qkvo]_proj|gate_proj|up_proj|down_proj|w[123])\.weight")
Tensors = dict[str, torch.Tensor]


def pack(values: np.ndarray, bits: int) -> torch.Tensor:
    """Return non-negative integers [n, m] as int32 words [n * bits / 32, m], each column as one string of bits."""
    digits = (values[:, None, :] >> np.arange(bits)[:, None]) & 1
    octets = np.packbits(digits.reshape(-1, values.shape[1]).astype(np.uint8), axis=0, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(octets.T).view("<i4").T.copy())


def unpack(words: torch.Tensor, bits: int) -> np.ndarray:
    """Return the integers [n, m] in words [n * bits / 32, m]; the reverse of ``pack``."""
    octets = np.ascontiguousarray(words.numpy().T).view(np.uint8)
    digits = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(octets), -1, bits)
    return (digits.astype(np.int64) << np.arange(bits)).sum(-1).T


@dataclass(frozen=True)
class Gptq:
    """A way to store weights in GPTQ's layout."""

    bits: int = 4
    group_size: int = 32
    act_order: bool = False
    version: str = "gptq"
    symmetric: bool = False
    quantizer: str | None = None
    scale: torch.dtype = torch.float16
    g_idx: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        settings = {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.symmetric}
        settings |= {"desc_act": self.act_order, "checkpoint_format": self.version, "damp_percent": 0.1}
        return settings | ({"meta": {"quantizer": [self.quantizer]}} if self.quantizer else {})

    def tensors(self, rows: int, columns: int, random: np.random.Generator) -> Tensors:
        """Return the tensors of a module whose weight has this shape."""
        size = columns if self.group_size == -1 else self.group_size
        g_idx = np.arange(columns) // size
        codes = random.integers(0, 1 << self.bits, (columns, rows))
        zeros = random.integers(0, 1 << self.bits, (g_idx[-1] + 1, rows))
        if self.symmetric:
            zeros[:] = 1 << (self.bits - 1)
        if self.act_order:
            random.shuffle(g_idx)
        tensors = {
            "qweight": pack(codes, self.bits),
            "qzeros": self._stored_zeros(zeros),
            "scales": torch.from_numpy(random.uniform(0.01, 0.1, zeros.shape)).to(self.scale),
        }
        return tensors | ({"g_idx": torch.from_numpy(g_idx.astype(np.int32))} if self.g_idx else {})

    def _stored_zeros(self, zeros: np.ndarray) -> torch.Tensor:
        if self.version == "gptq" and not self._by_word:
            zeros = (zeros - 1) & ((1 << self.bits) - 1)
        words = pack(zeros.T, self.bits).T.contiguous()
        return words - self._constants(words.shape[1]) if self._by_word else words

    @property
    def _by_word(self) -> bool:
        """Whether the program subtracts constants from the words of zero points."""
        if self.version != "gptq" or self.quantizer is None:
            return False
        return self.bits != 3 or int(self.quantizer.split(":")[1].split(".")[0]) < 7

    def _constants(self, words: int) -> torch.Tensor:
        ones = {
            2: ["01010101010101010101010101010101"],
            3: [
                "00100100100100100100100100100100",
                "10010010010010010010010010010010",
                "01001001001001001001001001001001",
            ],
            4: ["00010001000100010001000100010001"],
            8: ["00000001000000010000000100000001"],
        }[self.bits]
        return torch.tensor([int(ones[word % len(ones)], 2) for word in range(words)]).to(torch.int32)

    def weight(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight [rows, columns] float32 of a module."""
        codes, qzeros = unpack(tensors["qweight"], self.bits), tensors["qzeros"]
        if self._by_word:
            zeros = unpack((qzeros + self._constants(qzeros.shape[1])).T, self.bits).T
        else:
            zeros = (unpack(qzeros.T, self.bits).T + (self.version == "gptq")) % (1 << self.bits)
        size = len(codes) if self.group_size == -1 else self.group_size
        g_idx = tensors["g_idx"].numpy() if "g_idx" in tensors else np.arange(len(codes)) // size
        scales = tensors["scales"].float().numpy()
        return torch.from_numpy((scales[g_idx] * (codes - zeros[g_idx]).astype(np.float32)).T.copy())


@dataclass(frozen=True)
class Awq:
    """A way to store weights in the layout of AWQ's version GEMM."""

    group_size: int = 32
    bits = 4

    @property
    def settings(self) -> dict[str, Any]:
        settings = {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "version": "gemm"}
        return settings | {"zero_point": True, "modules_to_not_convert": ["gate"]}

    def tensors(self, rows: int, columns: int, random: np.random.Generator) -> Tensors:
        size = columns if self.group_size == -1 else self.group_size
        zeros = random.integers(0, 16, (-(-columns // size), rows))
        return {
            "qweight": self._pack(random.integers(0, 16, (columns, rows))),
            "qzeros": self._pack(zeros),
            "scales": torch.from_numpy(random.uniform(0.01, 0.1, zeros.shape)).half(),
        }

    def _pack(self, values: np.ndarray) -> torch.Tensor:
        shuffled = values.reshape(len(values), -1, 8)[:, :, AWQ_ROWS].reshape(values.shape)
        return pack(shuffled.T, 4).T.contiguous()

    def _unpack(self, words: torch.Tensor) -> np.ndarray:
        shuffled = unpack(words.T, 4).T.reshape(len(words), -1, 8)
        values = np.empty_like(shuffled)
        values[:, :, AWQ_ROWS] = shuffled
        return values.reshape(len(words), -1)

    def weight(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes, zeros = self._unpack(tensors["qweight"]), self._unpack(tensors["qzeros"])
        size = len(codes) if self.group_size == -1 else self.group_size
        groups, scales = np.arange(len(codes)) // size, tensors["scales"].float().numpy()
        return torch.from_numpy((scales[groups] * (codes - zeros[groups]).astype(np.float32)).T.copy())


Method = Gptq | Awq


def older_name(module: str) -> str:
    """Return the name of a module as programs of 2023 and 2024 write it: the classic one."""
    return module


def newer_name(module: str) -> str:
    """Return the name of a module as GPTQModel writes it today."""
    numbers = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    module = re.sub(r"\.(w[123])$", lambda match: f".{numbers[match[1]]}", module)
    return module.replace("block_sparse_moe", "mlp")


@dataclass(frozen=True)
class Case:
    """A quantized model: its config.json, its tensors on disk, and the plain weights by their classic names."""

    config: dict[str, Any]
    stored: Tensors
    weights: Tensors

    def write(self, path: Path, tensors: Mapping[str, torch.Tensor | None] | None = None, /, **settings: Any) -> Path:
        """Write the quantized checkpoint.

        ``settings`` replace those of the quantization, ``tensors`` those of the checkpoint; ... and None remove one.
        """
        changed = self.config["quantization_config"] | settings
        changed = {key: value for key, value in changed.items() if value is not ...}
        kept = {name: tensor for name, tensor in (self.stored | (tensors or {})).items() if tensor is not None}
        return checkpoints.write(path, self.config | {"quantization_config": changed}, kept)

    def write_plain(self, path: Path) -> Path:
        """Write the same model without quantization."""
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        return checkpoints.write(path, config, self.weights)


def case(method: Method, kind: str = "mixtral", name: Callable[[str], str] = older_name) -> Case:
    """Return a random model whose attention and feed-forward weights are quantized."""
    config = checkpoints.config(kind, **SIZES)
    random, stored, weights = np.random.default_rng(3), Tensors(), Tensors()
    for key, weight in checkpoints.weights(config).items():
        module = key.removesuffix(".weight")
        if QUANTIZED.fullmatch(key):
            tensors = method.tensors(*weight.shape, random)
            stored |= {f"{name(module)}.{part}": tensor for part, tensor in tensors.items()}
            weights[key] = method.weight(tensors)
        else:
            stored[f"{name(module)}.weight"] = weights[key] = weight.half()
    return Case(config | {"quantization_config": method.settings}, stored, weights)
