"""What this build has: one row for each model, format, op, layout and chat format.

Knows how to ask the registry folders. Does not know how rows are shown beyond one line each.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from moesaic import registry

Row = dict[str, str | list[str] | dict[str, str]]


def of(what: str) -> list[Row]:
    """Return the rows of models, formats, ops, checkpoints or chat-formats."""
    if what == "ops":
        return list(_ops())
    if what == "chat-formats":
        return list(_chat_formats())
    return [_entry(what, name) for name in registry.names(what)]


def _entry(folder: str, name: str) -> Row:
    module = registry.load(folder, name)
    row: Row = {"name": name, "about": (inspect.getdoc(module) or "").partition("\n")[0]}
    return row | ({"model_types": list(module.MODEL_TYPES)} if folder == "models" else {})


def _chat_formats() -> Iterator[Row]:
    from moesaic.text.chat import FORMATS

    for name, form in FORMATS.items():
        needs = f"made of the control tokens {' '.join(form.required_tokens)}" if form.required_tokens else "plain text, for any tokenizer"
        yield {"name": name, "about": needs}
    yield {"name": "template", "about": "the checkpoint's own template, run in a child process with limits"}


def _ops() -> Iterator[Row]:
    """Yield a row for each op, device and weight format; ops without weights have none."""
    import torch

    from moesaic import ops

    for op in ops.OPS:
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            for format in registry.names("formats") if op in ("linear", "experts") else [None]:
                refused = {name: why for name, why in ops.explain(op, device, format).items() if why is not None}
                on = f"{device}, {format}" if format else device
                yield {"name": op, "on": on, "backend": ops.chosen(op, device, format), "passed_over": refused}


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield one line for each row, in columns."""
    wide = max((len(str(row["name"])) for row in rows), default=0)
    on = max((len(str(row.get("on", ""))) for row in rows), default=0)
    for row in rows:
        if "backend" in row:
            refused = row["passed_over"]
            assert isinstance(refused, dict)
            why = "".join(f"; not {name}: {reason}" for name, reason in refused.items())
            yield f"{row['name']:<{wide}}  {row['on']:<{on}}  {row['backend']}{why}"
        else:
            yield f"{row['name']:<{wide}}  {row['about']}"
