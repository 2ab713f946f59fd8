"""Moesaic: serves sparse mixture-of-experts chat models on your own hardware.

This module exports the public names. Importing it is fast: torch is imported when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesaic import errors
from moesaic.engine.request import Sampling
from moesaic.load_options import LoadOptions

if TYPE_CHECKING:
    from moesaic.classifier import Classifier
    from moesaic.llm import LLM, Answer, Reply, Text
    from moesaic.text.grammar import Grammar

__version__ = "0.1.0"
__all__ = ["LLM", "Answer", "Classifier", "Grammar", "LoadOptions", "Reply", "Sampling", "Text", "errors"]


def __getattr__(name: str) -> Any:
    if name == "Classifier":
        from moesaic.classifier import Classifier

        return Classifier
    if name == "Grammar":
        from moesaic.text.grammar import Grammar

        return Grammar
    if name in __all__:
        from moesaic import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
