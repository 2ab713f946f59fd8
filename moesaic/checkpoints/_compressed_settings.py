"""The settings of compressed-tensors: how each config group stores weights.

This module does not depend on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._views import Shape

PACKED, FORMATS = "pack-quantized", ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
BITS = (2, 4, 8)


@dataclass(frozen=True)
class Scheme:
    """How a config group stores weights.

    Attributes:
        packed: whether int32 words hold the codes.
        kind: int or float.
        bits: bits of a code.
        symmetric: whether the weights have no zero points: the signed integer 0 means 0.
        rows, columns: the size of the blocks that share a scale; None: all rows, or all columns.
    """

    packed: bool
    kind: str
    bits: int
    symmetric: bool
    rows: int | None
    columns: int | None

    def block(self, shape: Shape) -> Shape:
        """Return the size of the blocks of a matrix of ``shape`` that share a scale."""
        return min(self.rows or shape[0], shape[0]), min(self.columns or shape[1], shape[1])


def read_settings(fields: Fields) -> list[Scheme]:
    """Return the different schemes of the config groups.

    Raises:
        ConfigError: a setting is not known or not supported.
    """
    fields.take("quant_method", None)
    whole = fields.take("format", None)
    sparsity = fields.nested("sparsity_config")
    if sparsity is not None:
        sparsity.allow("format", "dense")
    groups = fields.nested("config_groups")
    if groups is None:
        raise fields.error("has no 'config_groups' in its quantization_config")
    schemes = []
    for name in groups.left:
        group = Fields(groups.left, fields.path).nested(name)
        assert group is not None
        schemes += _read_group(group, whole)
    fields.finish("global_compression_ratio ignore kv_cache_scheme quantization_status run_compressed version".split())
    return list(dict.fromkeys(schemes))


def _read_group(group: Fields, whole: Any) -> list[Scheme]:
    """Return the scheme of a config group as a list; an empty one if the group quantizes no weights.

    ``whole`` is the format of groups that have no format of their own.
    """
    weights = group.nested("weights")
    stored = group.take("format", whole)
    group.finish(("targets", "input_activations", "output_activations"))
    if weights is None or stored == "dense":
        return []
    if stored not in FORMATS:
        raise group.error(f"the format {stored!r} of quantized weights is not supported; use one of {FORMATS}")
    return [_read_weights(weights, packed=stored == PACKED)]


def _read_weights(weights: Fields, *, packed: bool) -> Scheme:
    kind, bits = weights.take("type", "int"), weights.take("num_bits", 8)
    supported = {"int": BITS, "float": () if packed else (8,)}.get(str(kind), ())
    if type(bits) is not int or bits not in supported:
        problem = f"weights of type {kind!r} with {bits!r} bits are not supported"
        raise weights.error(f"{problem}; supported: int with 2, 4 or 8 bits, and unpacked float with 8 bits")
    symmetric = weights.take("symmetric", True)
    if type(symmetric) is not bool:
        raise weights.error(f"symmetric is {symmetric!r}, expected true or false")
    weights.allow("dynamic", False)
    rows, columns = _read_block(weights)
    weights.finish(("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
    return Scheme(packed, str(kind), bits, symmetric, rows, columns)


def _read_block(weights: Fields) -> tuple[int | None, int | None]:
    """Return the rows and the columns of the blocks that share a scale; None: all."""
    group, block = weights.take("group_size", None), weights.take("block_structure", None)
    if group is not None and (type(group) is not int or group < -1):
        raise weights.error(f"group_size is {group!r}, expected a positive integer or -1")
    inferred = {None: "tensor", -1: "channel"}.get(group, "group")
    strategy = weights.take("strategy", inferred)
    if strategy in ("tensor", "channel"):
        return (None if strategy == "tensor" else 1), None
    if strategy not in ("group", "block"):
        raise weights.error(
            f"the strategy {strategy!r} is not supported for weights; use tensor, channel, group or block"
        )
    sizes = (1, group) if strategy == "group" else block
    if not isinstance(sizes, tuple | list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        expected = "a group_size" if strategy == "group" else "a block_structure of rows and columns"
        raise weights.error(f"the strategy {strategy!r} needs {expected}, positive integers")
    return sizes[0], sizes[1]
