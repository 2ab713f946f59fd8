"""Functions that format parts of a Markdown page, for the pages that are generated from the code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NOTE = "<!-- Written by tools/generate_reference.py from the code. Do not edit: run `make reference`. -->"


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *(part.strip() for part in parts if part.strip())]) + "\n"


def cell(text: object) -> str:
    return re.sub(r"\s+", " ", str(text)).strip().replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell(value) for value in line)} |" for line in lines)


def prose(docstring: str) -> str:
    """Turn reStructuredText's double backquotes into Markdown's single ones."""
    return docstring.replace("``", "`")


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and the documentation site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
