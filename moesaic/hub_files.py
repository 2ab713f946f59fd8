"""Names of models on the Hugging Face hub, and the files of a repository that make up a model.

A name is ``org/name``, ``org/name@revision``, or either with ``:choice`` for one of several GGUF models. The choice is
a quantization such as ``Q4_K_M``, or the path of a file. This module does not access the network.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from moesaic import gguf
from moesaic.errors import DownloadError, InvalidParameter

NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([^\s:@]+))?", re.ASCII)
QUANTIZATION = re.compile(r"(?:^|[._-])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F16|FP?32|FP16|[MN][VX]FP4\w*))$", re.IGNORECASE)
"""End of a file's name, without its suffix and the number of its part, that says how the weights are stored."""
DYNAMIC = "UD-"
"""Prefix of a quantization that chooses the type of each tensor by measurement; a name may leave it out."""
NO_MODELS = ("mmproj", "imatrix")
"""Words in the names of GGUF files that are not language models: an image encoder, and statistics of activations."""

# Files that are downloaded from every repository, and kinds of weights in order of preference.
ALWAYS = (
    *("config.json", "generation_config.json", "params.json", "tokenizer.json", "tokenizer.model*", "tekken.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("quantize_config.json", "quant_config.json", "LICENSE*", "README.md"),
)
WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("consolidated.safetensors", "consolidated[.-]*.safetensors", "consolidated.safetensors.index.json"),
    ("consolidated.[0-9][0-9].pt", "consolidated.[0-9][0-9].pth"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class HubName:
    """Name of a model on the hub. ``choice`` is a quantization or a file; None if the repository has one model."""

    repository: str
    revision: str | None = None
    choice: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubName | None:
        """Return the parts of a name, or None if ``name`` has another form."""
        match = NAME.fullmatch(name)
        return cls(match[1], match[2], match[3]) if match else None

    @property
    def model(self) -> str:
        """The name without the revision."""
        return self.repository if self.choice is None else f"{self.repository}:{self.choice}"


@dataclass(frozen=True)
class Selection:
    """Paths of the files to download, and of the GGUF file to open; None: the model is the folder of the files."""

    files: list[str]
    opened: str | None = None


def select(name: HubName, offered: Sequence[str]) -> Selection:
    """Return the files of the model ``name`` among the files ``offered`` by its repository.

    Raises:
        InvalidParameter: the choice is unknown or ambiguous, or one is needed; the message lists the choices.
        DownloadError: the repository has no weights in a supported format, or lacks a part of a split model.
    """
    files = choose_files(offered) if name.choice is None else []
    return Selection(files) if files else _select_gguf(name, offered)


def choose_files(offered: Sequence[str]) -> list[str]:
    """Return which of the files ``offered`` to download: configuration, tokenizer, and the safest kind of weights.

    The list is empty if there are no weights but those in GGUF files.
    """
    top = [file for file in offered if "/" not in file]
    for weights in WEIGHTS:
        if any(fnmatchcase(file, pattern) for file in top for pattern in weights):
            return [file for file in top if any(fnmatchcase(file, pattern) for pattern in (*weights, *ALWAYS))]
    return []


def gguf_choices(offered: Sequence[str]) -> dict[str, Selection]:
    """Return the complete GGUF models among the files ``offered``, by what chooses each of them after a colon."""
    models = _models(offered)
    complete = dict(zip(_choices(models), models, strict=True))
    return {
        name: Selection(model.files, model.first)
        for name, model in complete.items()
        if all(file in offered for file in model.files)
    }


# GGUF


@dataclass(frozen=True)
class _Model:
    """A GGUF model of a repository: one file, or several that are its parts."""

    stem: str
    """Path of the file without its suffix, or the common beginning of the paths of the parts."""
    parts: int
    """Number of files; 0 if the model is one file whose name has no number."""

    @property
    def files(self) -> list[str]:
        numbers = range(1, self.parts + 1)
        return [gguf.part_name(self.stem, number, self.parts) for number in numbers] or [f"{self.stem}.gguf"]

    @property
    def first(self) -> str:
        """Path of the only or the first file."""
        return gguf.part_name(self.stem, 1, self.parts) if self.parts else f"{self.stem}.gguf"

    @property
    def quantization(self) -> str:
        """The quantization that the file's name ends with, or else the name of its folder; empty if neither does."""
        path = PurePosixPath(self.stem)
        found = QUANTIZATION.search(path.name) or QUANTIZATION.search(path.parent.name)
        return found[1].upper() if found else ""

    def has(self, file: str) -> bool:
        """Return whether ``file``, a path or the last part of it, is a file of this model."""
        split = gguf.split_name(file)
        stem, parts = (split[0], split[2]) if split else (file.removesuffix(".gguf"), 0)
        return parts == self.parts and stem in (self.stem, PurePosixPath(self.stem).name)


def _select_gguf(name: HubName, offered: Sequence[str]) -> Selection:
    models = _models(offered)
    if not models:
        asked = "no GGUF files" if name.choice else "no weights in a supported format"
        raise DownloadError(f"{name.repository}: the repository has {asked}")
    found = models if name.choice is None else _chosen(name.choice, models)
    if len(found) != 1:
        problem = "has several GGUF models" if name.choice is None else f"has no GGUF model {name.choice!r}"
        if found and name.choice is not None:
            problem = f"has several GGUF models {name.choice!r}"
        choices = ", ".join(_choices(found or models))
        raise InvalidParameter("source", f"{name.repository} {problem}: add one of these after a colon: {choices}")
    [model] = found
    missing = next((file for file in model.files if file not in offered), None)
    if missing is not None:
        raise DownloadError(f"{name.repository}: the repository lacks {missing}, a part of the model: choose another")
    return Selection(model.files, model.first)


def _models(offered: Sequence[str]) -> list[_Model]:
    """Return the GGUF models among the files ``offered``, sorted by path."""
    found = set()
    for file in offered:
        if file.endswith(".gguf") and not any(word in file.lower() for word in NO_MODELS):
            split = gguf.split_name(file)
            found.add(_Model(split[0], split[2]) if split else _Model(file.removesuffix(".gguf"), 0))
    return sorted(found, key=lambda model: model.stem)


def _chosen(choice: str, models: Sequence[_Model]) -> list[_Model]:
    """Return the models that ``choice`` names: by file, or by quantization with and then without its prefix."""
    if choice.endswith(".gguf"):
        return [model for model in models if model.has(choice)]
    wanted = choice.upper()
    exact = [model for model in models if model.quantization == wanted]
    return exact or [model for model in models if model.quantization.removeprefix(DYNAMIC) == wanted]


def _choices(models: Sequence[_Model]) -> list[str]:
    """Return what chooses each of the models: the quantization, or the path if others have the same quantization."""
    counts = Counter(model.quantization for model in models)
    return [
        model.quantization if counts[model.quantization] == 1 and model.quantization else model.first
        for model in models
    ]
