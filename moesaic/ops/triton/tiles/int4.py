"""Reads weights in int4."""

from __future__ import annotations

from moesaic.ops.triton.tiles._integer import read as read

ROTATED = True
