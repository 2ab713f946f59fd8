"""What is chosen of a repository for a machine, and ``moesaic run``, with a hub on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import cli, packed, published, pull
from moesaic.errors import DownloadError, NotEnoughMemory, NotFound
from moesaic.hardware import Host, Machine, this_machine
from moesaic.load_options import LoadOptions
from moesaic.model_sizes import ModelSizes
from moesaic.plan import make_plan
from moesaic.planner import PROCESS_BYTES, STORED, Wish, hub
from tests.support.downloads import Server, downloads, use_as_hub
from tests.support.gguf_files import TinyFile

KINDS = ("F32", "Q8_0", "Q4_K", "Q2_K")
CONTEXT = 128


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with downloads() as server:
        use_as_hub(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture
def files(server: Server, tmp_path: Path) -> dict[str, Path]:
    """GGUF files of one model, which the repository org/name has as well."""
    paths = {kind: TinyFile(kind, experts=4).write(tmp_path / f"tiny.{kind}.gguf") for kind in KINDS}
    server.add_repository("org/name", {path.name: path.read_bytes() for path in paths.values()} | {"README.md": b"x"})
    return paths


def machine_for(path: Path, name: str | None = None, gb_s: float = 1000.0) -> Machine:
    """Return a computer whose memory the model at ``path`` just fits in, in the format ``name``."""
    sizes = ModelSizes.count(make_plan(path).spec)
    needed = sizes.weights(name).nbytes + sizes.workspace_bytes() + CONTEXT * sizes.cache_bytes_per_token()
    return Machine("a computer", host=Host(needed + PROCESS_BYTES, gb_s, 1e5, 1e5))


def chosen(machine: Machine, model: str = "org/name") -> hub.Choice:
    return hub.choose(model, machine, Wish(context=CONTEXT), None)


@pytest.mark.parametrize("kind", KINDS)
def test_largest_file_that_fits_is_chosen(kind: str, files: dict[str, Path]) -> None:
    choice = chosen(machine_for(files[kind]))
    assert (choice.source, choice.format) == (f"org/name:{kind}", None)
    assert choice.nbytes == files[kind].stat().st_size
    assert choice.others == {kind: path.stat().st_size for kind, path in files.items()}
    assert f"org/name:{kind}" in "\n".join(hub.choice_lines(choice))


def test_a_slow_machine_takes_fewer_bits_but_not_two(files: dict[str, Path]) -> None:
    assert chosen(machine_for(files["F32"], gb_s=0.001)).source == "org/name:Q4_K"


def test_nothing_fits(files: dict[str, Path]) -> None:
    with pytest.raises(NotEnoughMemory, match=r"org/name does not fit on a computer: .* are needed .* free memory"):
        chosen(Machine("a computer", host=Host(1000)))


def test_a_named_file_is_taken_as_it_is(files: dict[str, Path]) -> None:
    choice = chosen(machine_for(files["F32"]), "org/name:q2_k")
    assert choice.source == "org/name:q2_k" and choice.others == {}
    assert choice.report.rows[0].format == STORED


def test_plain_weights_are_quantized_if_they_have_to_be(server: Server, talker: Path) -> None:
    server.add_repository("org/plain", {file.name: file.read_bytes() for file in talker.iterdir()})
    assert chosen(machine_for(talker), "org/plain").format is None
    assert chosen(machine_for(talker, "q8"), "org/plain").format == "q8"


def test_published_models_have_several_repositories(server: Server, files: dict[str, Path], monkeypatch) -> None:
    monkeypatch.setitem(published.REPOSITORIES, "mistral-7b", ("org/missing", "org/name"))
    server.routes["/api/models/org/missing/tree/main"] = (404, {"X-Error-Code": "RepoNotFound"}, b"")
    assert chosen(machine_for(files["Q8_0"]), "mistral-7b").source == "org/name:Q8_0"
    monkeypatch.setitem(published.REPOSITORIES, "mistral-7b", ("org/missing",))
    with pytest.raises(NotFound, match="org/missing"):
        chosen(machine_for(files["Q8_0"]), "mistral-7b")


def test_an_unreachable_hub_is_one_error(server: Server) -> None:
    server.routes["/api/models/org/name/tree/main"] = (500, {}, b"")
    with pytest.raises(DownloadError, match="org/name"):
        chosen(Machine("a computer", host=Host(10**9)))


# moesaic plan and moesaic run


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "describe", lambda device="cpu": machine)


def test_plan_looks_at_the_hub(files, monkeypatch, capsys) -> None:
    on(machine_for(files["Q4_K"]), monkeypatch)
    assert cli.main(["plan", "org/name", "--context", str(CONTEXT)]) == 0
    out = capsys.readouterr().out
    assert "org/name:Q4_K" in out and "The repository also has: F32" in out
    assert not list((pull.cache_folder()).rglob("*.gguf"))


def test_run_downloads_quantizes_and_chats(server: Server, talker: Path, monkeypatch, capsys) -> None:
    server.add_repository("org/plain", {file.name: file.read_bytes() for file in talker.iterdir()})
    on(machine_for(talker, "q8"), monkeypatch)
    command = ["run", "org/plain", "--yes", "--context", str(CONTEXT), "--", "-m", "Hi", "--max-tokens", "3"]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    assert first.out.strip() and "org/plain: " in first.err and "then quantized to q8" in first.err
    [folder] = (pull.cache_folder() / "packed").iterdir()
    assert packed.is_packed(folder) and make_plan(folder).weight_bytes == make_plan(talker, q8()).weight_bytes
    before = (folder / packed.WEIGHTS).stat().st_mtime_ns
    assert cli.main(command) == 0  # the second time, everything is there
    assert (folder / packed.WEIGHTS).stat().st_mtime_ns == before


def q8() -> LoadOptions:
    return LoadOptions(format="q8")


def test_run_asks_once(files, monkeypatch, capsys) -> None:
    on(machine_for(files["Q4_K"]), monkeypatch)
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert cli.main(["run", "org/name", "--context", str(CONTEXT)]) == 2
    assert "add --yes" in capsys.readouterr().err
    asked: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    assert cli.main(["run", "org/name", "--context", str(CONTEXT)]) == 1
    assert asked == ["Go on? [Y/n] "] and "nothing was downloaded" in capsys.readouterr().err
    assert not list(Path(pull.cache_folder()).rglob("*.gguf"))


def test_run_takes_what_is_here_without_a_question(talker, monkeypatch, capsys) -> None:
    assert cli.main(["run", str(talker), "--context", "64", "--", "-m", "Hi", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["run", "./nothing"]) == 2
    assert "no such folder or file" in capsys.readouterr().err
