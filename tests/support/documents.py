"""Code blocks of Markdown pages."""

from __future__ import annotations

import re


def blocks(language: str, text: str) -> list[str]:
    """Return the fenced code blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
