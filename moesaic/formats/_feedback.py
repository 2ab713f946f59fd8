"""Error feedback for the integer formats: GPTQ, arXiv:2210.17323, in the space of rotated weights.

Rounding a weight changes the outputs of its row. The weights of the row that are not rounded yet are changed so that
the mean squared change of the outputs is least. This depends on the Hessian of the error with respect to a row,
H = sum of x x^T over the inputs x. All rows share it.

Columns are rounded in their order. When the first column of a superblock is reached, several steps are tried for each
row, and for each step the scales of its groups, one after another. Those with the least error are kept: the sum of
(e / U[j, j])^2, where e is the error of column j. It is what the outputs lose if later columns repair what they can.

``csrc/feedback.cpp`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.formats import WeightFormat
from moesaic.formats._blocks import PAD, SUPER
from moesaic.formats._planes import ROWS
from moesaic.formats._rotation import rotate_activations, rotate_weights
from moesaic.formats._tiles import GROUP, SCALES, TRIED_STEPS, Choice, Tiled, best_choice, inverse, rounded

DAMPING = 0.01
"""What is added to the diagonal of a Hessian, as a fraction of its mean (arXiv:2210.17323 §3.3)."""


def is_fed_back(weight_format: WeightFormat | None) -> bool:
    """Return whether weights of this format can be quantized with error feedback.

    int8 cannot: its error is small beside that of activations, which its kernels round to eight bits too.
    """
    return isinstance(weight_format, Tiled) and bool(weight_format.levels)


def padded_columns(columns: int) -> int:
    """Return the number of columns with padding."""
    return -(-columns // PAD) * PAD


def feedback_factor(hessian: Tensor) -> Tensor:
    """Return what ``quantize`` needs to know of the inputs: upper triangular U [padded columns, padded columns].

    U^T U is the inverse of the Hessian of the rotated inputs, damped. Inputs that are all 0 give the identity, with
    which weights are rounded to nearest.

    Args:
        hessian: sum of x x^T over the inputs x of the layer, or a multiple of it: [columns, columns].
    """
    padding = padded_columns(len(hessian)) - len(hessian)
    half = _by_superblocks(F.pad(hessian.float(), (0, padding, 0, padding)), rotate_activations)
    damped = _by_superblocks(half.T, rotate_activations).double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    inverted = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverted, upper=True)
    return factor.float()


def rotate_padded(weight: Tensor) -> Tensor:
    """Return float32 weights [rows, columns], padded to whole blocks and rotated."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, padded_columns(columns) - columns, 0, -rows % ROWS))
    return _by_superblocks(padded, rotate_weights)


def _by_superblocks(x: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([transform(part) for part in x.split(SUPER, dim=1)], dim=1)


def quantize(weight_format: Tiled, weight: Tensor, factor: Tensor) -> dict[str, Tensor]:
    """Return the parts that store a weight with the least error on some inputs.

    Args:
        weight_format: a format for which ``is_fed_back`` holds.
        weight: the plain weight [rows, columns].
        factor: result of ``feedback_factor`` for the inputs.
    """
    parts = feed_back(weight_format, rotate_padded(weight), factor)
    return {"tiles": torch.cat([weight_format.store(*part) for part in parts], dim=1)}


def feed_back(weight_format: Tiled, rotated: Tensor, factor: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the steps, scales and codes of each superblock of rotated weights [R, columns], which are overwritten."""
    for begin in range(0, rotated.shape[1], SUPER):
        end = min(begin + SUPER, rotated.shape[1])
        part, inside = rotated[:, begin:end], factor[begin:end, begin:end]
        usual = part.square().mean(1).sqrt() * weight_format.usual_step
        tried = [_superblock(weight_format, part, inside, rounded(usual * share)) for share in TRIED_STEPS]
        _, errors, step, scale, codes = best_choice(tried)
        rotated[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
        yield step, scale, codes


def _superblock(weight_format: Tiled, rotated: Tensor, factor: Tensor, step: Tensor) -> Choice:
    """Quantize the rotated weights [R, width] of a superblock: loss, errors, step, scales and codes."""
    left, groups = rotated.clone(), []
    for begin in range(0, rotated.shape[1], GROUP):
        end = begin + GROUP
        part, inside = left[:, begin:end], factor[begin:end, begin:end]
        best = best_choice([_group(weight_format, part, inside, step, scale) for scale in SCALES])
        left[:, end:].addmm_(best[1], factor[begin:end, end:], alpha=-1)
        groups.append(best)
    loss, errors, scale, codes = zip(*groups, strict=True)
    return torch.stack(loss).sum(0), torch.cat(errors, 1), step, torch.stack(scale, 1), torch.cat(codes, 1)


def _group(weight_format: Tiled, rotated: Tensor, factor: Tensor, step: Tensor, scale: int) -> Choice:
    """Quantize the rotated weights [R, 16] of a group: loss, errors, scale and codes."""
    levels = torch.tensor(weight_format.levels, device=rotated.device).float()
    bounds, unit, left = (levels[1:] + levels[:-1]) / 2, step * scale, rotated.clone()
    inverted = inverse(unit)
    codes, errors = torch.empty_like(left, dtype=torch.int64), torch.empty_like(left)
    for column in range(left.shape[1]):
        codes[:, column] = code = torch.bucketize(left[:, column] * inverted, bounds)
        errors[:, column] = error = (left[:, column] - levels[code] * unit) / factor[column, column]
        left[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1)
    return errors.square().sum(1), errors, torch.full_like(codes[:, 0], scale), codes
