"""The rotation of weights and activations: random signs and a Hadamard transform, which spread outliers.

The integer formats store rotated weights, and their kernels rotate activations before they round them. All columns then
have about the same magnitude, so that one scale for 256 columns rounds them well. Products do not change, because the
rotation is orthogonal: QuIP#, arXiv:2402.04396, and QuaRot, arXiv:2404.00456.

A superblock of 256 columns is multiplied with signs, then with the Hadamard matrix H of ones and minus ones. Narrower
ones are parts of 128 and 64 columns. Weights are divided by the size of H, so that activations need no division.
``csrc/rotation.h`` has the same rotation.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from moesaic.formats._blocks import SUPER


def rotate_weights(weight: Tensor) -> Tensor:
    """Return float32 weights [..., columns] of a superblock, rotated; ``columns`` is 64, 128, 192 or 256."""
    rotated = _transform(weight * _signs(weight.shape[-1], weight.device))
    sizes = [float(size) for size in _sizes(weight.shape[-1]) for _ in range(size)]
    return rotated / torch.tensor(sizes, device=weight.device)


def restore_weights(rotated: Tensor) -> Tensor:
    """Return the weights [..., columns] that ``rotate_weights`` rotated."""
    return _transform(rotated) * _signs(rotated.shape[-1], rotated.device)


def rotate_activations(x: Tensor) -> Tensor:
    """Return float32 activations [..., columns] of a superblock, rotated: their products with weights are the same."""
    return _transform(x * _signs(x.shape[-1], x.device))


def _transform(x: Tensor) -> Tensor:
    parts = x.split(_sizes(x.shape[-1]), dim=-1)
    return torch.cat([part @ _hadamard(part.shape[-1]).to(x.device) for part in parts], dim=-1)


def _sizes(columns: int) -> list[int]:
    """Return the sizes of the parts of a superblock: powers of two, the largest first."""
    return [size for size in (256, 128, 64) if columns & size]


@functools.cache
def _hadamard(size: int) -> Tensor:
    """Return the symmetric matrix [size, size] of ones and minus ones in Sylvester's order."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def _signs(columns: int, device: torch.device) -> Tensor:
    return _all_signs()[:columns].to(device)


@functools.cache
def _all_signs() -> Tensor:
    """Return the signs [256]: column i changes its sign if bit i of the SHA-256 of "moesaic" is set."""
    bits = int.from_bytes(hashlib.sha256(b"moesaic").digest(), "little")
    return torch.tensor([-1.0 if bits >> i & 1 else 1.0 for i in range(SUPER)])
