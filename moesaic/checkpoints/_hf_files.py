"""Chooses the weight files of a folder with Hugging Face's file names.

Programs that save a model again, or that fetch a part of a repository, leave files of an older state behind: an index
whose files are gone, torch files beside safetensors files, files without their index. This module finds the files that
are complete, and refuses a folder with two complete sets, since one of them is out of date. It does not read tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moesaic.checkpoints._json import read_json
from moesaic.checkpoints._views import View
from moesaic.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""File names of weights: that of a single file and that of an index; safetensors files are preferred."""


@dataclass(frozen=True)
class WeightFiles:
    """The files of one set of weights, and what their index says about them.

    Attributes:
        files: the files, of which some may be missing; empty if the folder has no weights.
        index: path of the index; None if the files have none.
        listed: name of the file that holds a tensor, by the tensor's name, as the index lists it.
    """

    files: list[Path]
    index: Path | None = None
    listed: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether there is at least one file, and all files exist."""
        return bool(self.files) and all(file.is_file() for file in self.files)

    def check(self, tensors: Mapping[str, View]) -> None:
        """Raise CheckpointError unless the files hold exactly the tensors that the index lists for them."""
        if self.index is None:
            return
        for name, file in self.listed.items():
            if name not in tensors or tensors[name].info.file.name != file:
                problem = f"{name} is missing: {self.index.name} lists it in this file"
                raise CheckpointError(self.index.with_name(file), problem)
        for name, view in tensors.items():
            if name not in self.listed:
                raise CheckpointError(view.info.file, f"{name} is unexpected: {self.index.name} does not list it")


def find_files(path: Path) -> WeightFiles:
    """Return the weight files to read from the folder ``path``.

    Files that the index lists may be missing; the reader of the files reports that.

    Raises:
        CheckpointError: an index is damaged, a file of a set without an index is missing, or two sets are complete.
    """
    leftover = WeightFiles([])
    for single, index in NAMES:
        listed = _read_index(path / index, Path(single).suffix) if (path / index).is_file() else WeightFiles([])
        has_single, shards = (path / single).is_file(), _shards(path, single)
        several = listed if listed.complete else WeightFiles(max(shards, key=len, default=[]))
        if has_single and path / single not in several.files and _is_set(several):
            raise CheckpointError(
                path, f"holds {single} and also {several.files[0].name}, ...: remove those that are out of date"
            )
        if listed.complete or (not has_single and any(file.is_file() for file in listed.files)):
            return listed
        if has_single:
            return WeightFiles([path / single])
        if shards:
            return _whole_set(path, shards)
        leftover = leftover if leftover.files else listed
    return leftover


def _is_set(files: WeightFiles) -> bool:
    """Return whether all files of the set exist, according to its index or to the total in their names."""
    return files.complete and (files.index is not None or len(files.files) == _total(files.files[0]))


def _shards(path: Path, single: str) -> list[list[Path]]:
    """Return the files whose names make them parts of ``single``, such as model-00001-of-00003.safetensors.

    They are grouped by the total that the names state.
    """
    groups: dict[int, list[Path]] = {}
    for file in sorted(path.glob(f"{Path(single).stem}-*-of-*{Path(single).suffix}")):
        if total := _total(file):
            groups.setdefault(total, []).append(file)
    return list(groups.values())


def _total(file: Path) -> int:
    """Return the total that the name of ``file`` states, 3 for -00001-of-00003; 0 if it states none."""
    match = re.fullmatch(r".+-\d+-of-(\d+)", file.stem)
    return int(match[1]) if match else 0


def _whole_set(path: Path, groups: list[list[Path]]) -> WeightFiles:
    """Return the only group that has all its files; raise CheckpointError if there is none or more than one."""
    complete = [group for group in groups if len(group) == _total(group[0])]
    if len(complete) > 1:
        names = " and ".join(group[0].name for group in complete)
        raise CheckpointError(path, f"holds two sets of weights, beginning with {names}: remove one of them")
    if not complete:
        found, total = len(groups[0]), _total(groups[0][0])
        problem = f"is one of {total} files, but the folder holds only {found} of them: fetch the others"
        raise CheckpointError(groups[0][0], problem)
    return WeightFiles(complete[0])


def _read_index(index: Path, suffix: str) -> WeightFiles:
    """Return the files that ``index`` lists, sorted by name; a name with a path or another ``suffix`` is refused."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(index, "has no weight_map")
    for name, file in listed.items():
        # With a path separator in a name, an index could read files outside its folder.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise CheckpointError(index, f"{name} is listed in {file!r}, which is not a plain {suffix} file name")
    by_file = dict(sorted(listed.items(), key=lambda item: item[1]))
    return WeightFiles([index.with_name(file) for file in dict.fromkeys(by_file.values())], index, by_file)
