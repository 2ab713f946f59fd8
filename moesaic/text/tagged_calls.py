"""Parser of tool calls between tags, such as Hermes' ``<tool_call>`` and ``</tool_call>``.

The tags are removed from the text, even if it comes in pieces. ``ToolCallParser`` reads the text between them as lines
of JSON.
"""

from __future__ import annotations

from moesaic.text.stream import partial_match
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
        """Add text of the answer; return the text and the parts of calls that can be returned now."""
        text = self._tail + text
        cut = partial_match(text, self._tags)
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
        """End the answer; return the text and the parts of calls that were held back.

        ``cut`` says whether the answer is incomplete. The beginning of a tag at its end is then dropped.
        """
        rest, self._tail = "" if cut else self._tail, ""
        return [*super().add_text(rest), *super().finish(cut=cut)]
