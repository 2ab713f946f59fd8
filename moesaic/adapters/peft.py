"""Adapters in the files of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Three ways to store adapters of experts are read:

    experts.N.w1.lora_A.weight            per expert, as PEFT with transformers 4 wrote them: A [r, in], B [out, r]
    experts.base_layer.lora_A.weight      fused, as PEFT 0.18 and later do with ``target_parameters``: A [E r, in] has
    experts.lora_A.weight                 one expert after the other, B [out, E r] has the expert as its fastest index;
                                          the first is for gate and up together, the second for down
    the same, transposed                  PEFT 0.18 took the parameters for [E, in, out], so A and B are exchanged; the
                                          shapes tell

Written are the names per expert, which every reader of LoRA for Mixtral knows.

Legend: r rank, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moesaic.adapters import ATTENTION, DENSE, TARGETS, AdapterConfig, by_weight
from moesaic.checkpoints import _write
from moesaic.checkpoints._safetensors import write_file
from moesaic.checkpoints._views import InMemory
from moesaic.errors import CheckpointError, NotFound

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NEUTRAL: Mapping[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "megatron_config": None,
}
"""Keys of PEFT's configuration that this module supports only with these values, or an empty one."""

_MATRIX = re.compile(r"(?P<weight>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<part>w[123])")
_FUSED = re.compile(r"(?P<layer>.+)\.(?:block_sparse_moe|mlp)\.experts(?P<inner>\.base_layer)?")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it is stored.

    Attributes:
        config: its sizes.
        base: name of the model that it was trained on; empty if the file states none.
        tensors: its matrices, with the names of ``adapters.matrices``.
    """

    config: AdapterConfig
    base: str
    tensors: Mapping[str, Tensor]


def write(folder: Path, config: AdapterConfig, base: str, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter to ``folder``, which is created; files of an earlier one are replaced.

    Args:
        folder: the folder.
        config: sizes of the adapter.
        base: name of the model that it belongs to.
        tensors: its matrices, with the names of ``adapters.matrices``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    for weight, pair in by_weight(tensors).items():
        for side, matrix in zip("AB", pair, strict=True):
            stored[f"{PREFIX}{weight}.lora_{side}.weight"] = matrix.detach().cpu()
    settings = {
        **{key: value for key, value in NEUTRAL.items() if value is not None},
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(_targets(tensors)),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    new = folder / f".{WEIGHTS}.new"
    write_file(new, {name: InMemory(tensor, new) for name, tensor in stored.items()})
    _write.sync(new)
    new.replace(folder / WEIGHTS)
    _write.write_json(folder / CONFIG, settings)


def read(folder: Path, experts: int = 0, hidden_size: int = 0) -> AdapterFile:
    """Return the adapter in ``folder``.

    Args:
        folder: folder with the files of PEFT.
        experts: number of experts of the model; 0 for a dense one.
        hidden_size: hidden size of the model, which tells how fused matrices of experts lie.

    Raises:
        NotFound: the folder or a file of it is missing.
        CheckpointError: a file is damaged, or the adapter has a part that is not supported.
    """
    settings = _settings(folder / CONFIG)
    path = _existing(folder / WEIGHTS)
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"is damaged: {error}") from error
    pairs = _pairs(path, stored)
    found = _matrices(path, pairs, experts, hidden_size)
    ranks = {tensor.shape[-2] for name, tensor in found.items() if name.endswith(".a")}
    if len(ranks) != 1:
        raise CheckpointError(path, f"its matrices have the ranks {sorted(ranks)}; only one rank is supported")
    rank = ranks.pop()
    # Fused gate and up matrices may have twice the rank that the configuration states, and the same scale.
    scale = float(settings["lora_alpha"]) / (settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"])
    ordered = tuple(name for name in TARGETS if name in _targets(found))
    config = AdapterConfig(rank, scale * rank, ordered)
    return AdapterFile(config, str(settings.get("base_model_name_or_path") or ""), found)


def _targets(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names in ``TARGETS`` of the weights that have matrices."""
    return {weight.rpartition(".")[2] for weight in by_weight(tensors)}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NotFound(f"{path}: no such file; an adapter has {CONFIG} and {WEIGHTS}")
    return path


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(_existing(path).read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(path, f"is no JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise CheckpointError(path, f"peft_type is {kind!r}; only LORA is supported")
    for key, neutral in NEUTRAL.items():
        if settings.get(key) not in (neutral, None, [], {}, False):
            raise CheckpointError(path, f"{key} is {settings[key]!r}, which is not supported")
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise CheckpointError(path, "rank_pattern and alpha_pattern are not supported")
    if not isinstance(settings.get("r"), int) or settings["r"] < 1:
        raise CheckpointError(path, f"r is {settings.get('r')!r}, expected a positive integer")
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise CheckpointError(path, f"lora_alpha is {settings.get('lora_alpha')!r}, expected a number")
    return settings


def _pairs(path: Path, stored: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return A and B of each weight, by its name without PEFT's prefix."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        match = _MATRIX.fullmatch(key.removeprefix(PREFIX))
        if match is None or tensor.dim() != 2:
            raise CheckpointError(path, f"{key} is no matrix of LoRA")
        pairs.setdefault(match["weight"], {})[match["side"]] = tensor.float()
    for name, pair in pairs.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
            raise CheckpointError(path, f"the matrices of {name} do not fit together: {shapes}")
    return pairs


def _matrices(
    path: Path, pairs: Mapping[str, Mapping[str, Tensor]], experts: int, hidden_size: int
) -> dict[str, Tensor]:
    """Return the matrices of all weights with the names of ``adapters.matrices``."""
    found: dict[str, Tensor] = {}
    single: dict[str, dict[int, Mapping[str, Tensor]]] = {}
    for name, pair in pairs.items():
        if match := _EXPERT.fullmatch(name):
            stack = match["stack"].replace(".mlp.experts", ".block_sparse_moe.experts")
            single.setdefault(f"{stack}.{match['part']}", {})[int(match["expert"])] = pair
        elif match := _FUSED.fullmatch(name):
            stack = f"{match['layer']}.block_sparse_moe.experts"
            found |= _fused(path, name, stack, pair, experts, hidden_size, gate_up=bool(match["inner"]))
        elif name.rpartition(".")[2] in (*ATTENTION, *DENSE):
            found |= {f"{name}.a": pair["A"], f"{name}.b": pair["B"]}
        else:
            raise CheckpointError(path, f"adapters of {name} are not supported")
    for name, each in single.items():
        if set(each) != set(range(experts)):
            raise CheckpointError(path, f"{name} has adapters of {len(each)} experts, but the model has {experts}")
        found |= {f"{name}.{side.lower()}": torch.stack([each[e][side] for e in range(experts)]) for side in "AB"}
    return found


def _fused(
    path: Path,
    name: str,
    stack: str,
    pair: Mapping[str, Tensor],
    experts: int,
    hidden_size: int,
    *,
    gate_up: bool,
) -> dict[str, Tensor]:
    """Return the matrices of w1 and w3, or of w2, from fused ones of all experts."""
    total, columns = pair["A"].shape
    rows = pair["B"].shape[0]
    if not experts or total % experts:
        raise CheckpointError(path, f"{name} has {total} rows, which {experts} experts do not divide")
    rank = total // experts
    a = pair["A"].reshape(experts, rank, columns)
    b = pair["B"].reshape(rows, rank, experts).permute(2, 0, 1)  # [E, out, r]
    inputs, outputs = (columns, rows) if gate_up else (rows, columns)
    if inputs != hidden_size and outputs == hidden_size:  # stored as the change of the transposed weight
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    elif inputs != hidden_size:
        raise CheckpointError(path, f"{name} is for {columns} x {rows}, but the hidden size is {hidden_size}")
    if not gate_up:
        return {f"{stack}.w2.a": a.contiguous(), f"{stack}.w2.b": b.contiguous()}
    gate, up = b.chunk(2, dim=1)
    return {
        f"{stack}.w1.a": a.contiguous(),
        f"{stack}.w1.b": gate.contiguous(),
        f"{stack}.w3.a": a.clone(),
        f"{stack}.w3.b": up.contiguous(),
    }
