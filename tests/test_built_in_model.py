"""The built-in model has a name, which stands for it wherever a command takes a model."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from moesaic import cli
from moesaic.cli import flags
from moesaic.cli.serving import model_entries
from moesaic.cli.tgi_launcher import translate
from moesaic.errors import NotFound
from moesaic.llm import BUILT_IN
from moesaic.packed import is_packed
from tests.support.server import serving


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def served(*models: str) -> list[str]:
    args = translate(cli._parser().parse_args(["serve", *models]), {}).args
    return [entry.info.name for entry in model_entries(args)]


def test_its_name_is_its_folder() -> None:
    assert flags.folder("tales") == BUILT_IN and BUILT_IN.name == flags.BUILT_IN_NAME
    assert flags.folder(None) is None


def test_served_names() -> None:
    assert served() == ["built-in"] and served("tales") == ["tales"]
    assert served("story=tales", "gpt-4=tales") == ["story", "gpt-4"]
    assert served("--model-id", "tales") == served("tales")
    with pytest.raises(NotFound):
        served("story=talez")


def test_a_path_comes_first(tmp_path: Path) -> None:
    (tmp_path / "tales").mkdir()
    assert flags.folder("tales") == Path("tales")
    assert served("story=tales") == ["story"]


def test_it_is_served_by_a_name(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "story=tales", "other=tales") as url:
        models = httpx.get(url + "/v1/models").json()["data"]
        body = {"model": "story", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()
    assert [model["id"] for model in models] == ["story", "other"] and answer["model"] == "story"


def test_commands_take_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
