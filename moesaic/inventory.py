"""Inventory of this installation: models, weight formats, ops, checkpoint layouts and chat formats.

The rows come from the registry folders; this module formats each as one line of text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from moesaic import registry

Row = dict[str, str | list[str] | dict[str, str]]


def rows(kind: str) -> list[Row]:
    """Return one row per entry of a kind; ``kind`` is models, formats, ops, checkpoints or chat-formats."""
    if kind == "ops":
        return list(_ops())
    if kind == "chat-formats":
        return list(_chat_formats())
    return [_entry(kind, name) for name in registry.names(kind)]


def _entry(folder: str, name: str) -> Row:
    module = registry.load(folder, name)
    row: Row = {"name": name, "about": (inspect.getdoc(module) or "").partition("\n")[0]}
    return row | ({"model_types": list(module.MODEL_TYPES)} if folder == "models" else {})


def _chat_formats() -> Iterator[Row]:
    from moesaic.text.chat import FORMATS

    for name, chat_format in FORMATS.items():
        tokens = " ".join(chat_format.required_tokens)
        yield {
            "name": name,
            "about": f"requires the control tokens {tokens}" if tokens else "plain text, any tokenizer",
        }
    yield {"name": "template", "about": "the checkpoint's own template, rendered in a child process with limits"}
    yield {"name": "FILE.jinja", "about": "the Jinja template in this file, rendered in a child process with limits"}


def _weight_formats(op: str) -> Sequence[str | None]:
    """Return the formats of the weights that an op reads or writes; None for an op without weights."""
    if op == "store_codes":
        return ["grouped"]
    if op == "quantize":
        return registry.names("formats")
    return registry.names("formats") if op in ("linear", "experts") else [None]


def _ops() -> Iterator[Row]:
    """Yield one row per op, device and weight format; ops without weights have no format."""
    import torch

    from moesaic import ops

    for op in ops.OPS:
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            for weights in _weight_formats(op):
                reasons = {
                    name: reason for name, reason in ops.explain(op, device, weights).items() if reason is not None
                }
                on = f"{device}, {weights}" if weights else device
                yield {"name": op, "on": on, "backend": ops.chosen(op, device, weights), "passed_over": reasons}


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield one line of text per row, with aligned columns."""
    name_width = max((len(str(row["name"])) for row in rows), default=0)
    on_width = max((len(str(row.get("on", ""))) for row in rows), default=0)
    for row in rows:
        if "backend" in row:
            reasons = row["passed_over"]
            assert isinstance(reasons, dict)
            rejected = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
            yield f"{row['name']:<{name_width}}  {row['on']:<{on_width}}  {row['backend']}{rejected}"
        else:
            yield f"{row['name']:<{name_width}}  {row['about']}"
