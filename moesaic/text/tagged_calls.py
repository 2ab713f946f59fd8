"""Tool calls between tags, such as Hermes' ``<tool_call>`` and ``</tool_call>``, as a filter before the parser.

The tags are removed from the text, cut at any position, and what is between them is parsed as lines of JSON.
"""

from __future__ import annotations

from moesaic.text.syntax import Syntax
from moesaic.text.tool_parser import Part, ToolCallParser
from moesaic.text.tools import Tools


class TaggedCallParser(ToolCallParser):
    """Splits one answer into text and tool calls; each call stands between the tags of its ``syntax``."""

    def __init__(self, syntax: Syntax, tools: Tools) -> None:
        super().__init__(syntax, tools)
        self._tags = syntax.opening.strip(), syntax.closing.strip()
        self._tail = ""  # the beginning of a tag, perhaps
        self._at_line_start = True  # where the parser accepts an object
        self._after_tag = False  # white space behind an opening tag is part of the tag

    def add_text(self, text: str) -> list[Part]:
        """Return the text and the calls that ``text`` completes."""
        text = self._tail + text
        cut = self._partial_tag(text)
        self._tail, text = text[cut:], text[:cut].replace(self._tags[1], "")
        first, *rest = text.split(self._tags[0])
        shown = self._outside_tags(first)
        for piece in rest:
            shown += "" if self._at_line_start else "\n"
            self._after_tag = self._at_line_start = True
            shown += self._outside_tags(piece)
        return super().add_text(shown)

    def _outside_tags(self, text: str) -> str:
        if self._after_tag:
            text = text.lstrip()
            self._after_tag = not text
        self._at_line_start = text.endswith("\n") if text else self._at_line_start
        return text

    def finish(self, *, cut: bool = False) -> list[Part]:
        """Return what was held back; call it once, at the end of the answer. A tag that was cut is no text."""
        rest, self._tail = "" if cut else self._tail, ""
        return [*super().add_text(rest), *super().finish(cut=cut)]

    def _partial_tag(self, text: str) -> int:
        """Return the start of an incomplete tag at the end of ``text``, or its length."""
        for start in range(max(0, len(text) - max(map(len, self._tags))), len(text)):
            if any(tag.startswith(text[start:]) and len(tag) > len(text) - start for tag in self._tags):
                return start
        return len(text)
