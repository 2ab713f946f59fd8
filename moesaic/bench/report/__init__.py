"""A report: one page with charts and tables from the result files of the benchmarks.

``records`` reads files, ``sections`` and ``speeds`` choose what to show, ``html`` and ``markdown`` write it down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moesaic.bench.report import html, markdown, records, sections
from moesaic.errors import InvalidParameter, InvalidRequest

SUFFIXES = (".html", ".md")


def write(files: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of result files, and return the paths that were written, the report last.

    Args:
        files: results of ``moesaic bench``, ``moesaic perplexity`` or ``moesaic eval``.
        out: a page NAME.html, or NAME.md with pictures NAME-1.svg and so on beside it.

    Raises:
        InvalidParameter: ``out`` has another suffix.
        InvalidRequest: a file is no result, or the report cannot be written. Nothing was written then, or no page.
    """
    if out.suffix not in SUFFIXES:
        raise InvalidParameter("out", f"{out} ends in neither {' nor '.join(SUFFIXES)}")
    page = sections.page([records.read(path) for path in files])
    if out.suffix == ".html":
        texts: Mapping[str, str] = {out.name: html.render(page)}
    else:
        text, pictures = markdown.render(page, out.stem)
        texts = {**pictures, out.name: text}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return [_replace(out.parent / name, text) for name, text in texts.items()]
    except OSError as error:
        raise InvalidRequest(f"{error.filename}: cannot be written: {error.strerror}") from error


def _replace(path: Path, text: str) -> Path:
    """Write a file that appears only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
