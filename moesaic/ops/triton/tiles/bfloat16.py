"""Reads weights in bfloat16."""

from __future__ import annotations

from moesaic.ops.triton.tiles._plain import read as read

ROTATED = False
