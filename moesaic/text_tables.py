"""Tables of plain text, for terminals, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def aligned(grid: Iterable[Sequence[str]], *, left: int = 1) -> Iterator[str]:
    """Yield a line for each row of ``grid``: its first ``left`` columns are aligned left, the others right."""
    rows = list(grid)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = (
            f"{cell:<{width}}" if index < left else f"{cell:>{width}}" for index, (cell, width) in enumerate(cells)
        )
        yield "  ".join(padded).rstrip()


def number(value: float) -> str:
    """Return a speed or a time with about three digits that count."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """Return a share as a percentage; "-" if it is not known."""
    return "-" if share is None else f"{share:.0%}"
