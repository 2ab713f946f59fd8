"""Reads weights in float32."""

from __future__ import annotations

from moesaic.ops.triton.tiles._plain import read as read

ROTATED = False
