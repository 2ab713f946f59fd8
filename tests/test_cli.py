"""The command line as a shell runs it: output, one-line errors, exit codes."""

import argparse
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import __version__, cli, registry
from moesaic.checkpoints import open_checkpoint
from moesaic.llm import LLM


def run(*arguments: str | Path, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([sys.executable, "-m", "moesaic.cli", *map(str, arguments)], input=data, capture_output=True)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail with exit code 2 and a one-line error, and return the line."""
    assert cli.main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("moesaic: error: ")
    return err


def test_help_imports_nothing_slow() -> None:
    program = """
import sys
from moesaic import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0
modules = {"torch", "numpy", "rich", "prompt_toolkit", "tokenizers", "huggingface_hub", "asyncio", "ssl"}
slow = modules & sys.modules.keys()
assert not slow, slow
"""
    for arguments in (["--help"], ["chat", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_modules_of_a_model_are_frozen_once_and_the_collector_goes_on() -> None:
    program = """
import gc
from moesaic.cli.loading import collection_paused
for first in (True, False):
    before = gc.get_freeze_count()
    with collection_paused():
        assert not gc.isenabled()
        import torch
    assert gc.isenabled() and (gc.get_freeze_count() > before + 100_000) == first
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"moesaic {__version__}\n"


@pytest.mark.parametrize("command", ["chat", "pull", "convert", "pack", "list", "perplexity", "eval", "bench"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert f"  moesaic {command}" in text and "example" in text


@pytest.mark.parametrize("arguments", [[], ["dance"], ["chat", "--top-k", "x"], ["convert", "a", "b", "--to", "z"]])
def test_wrong_command_lines_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "error:" in capsys.readouterr().err


# chat


def test_piped_input_is_one_message(talker: Path) -> None:
    done = run("chat", talker, "--max-tokens", "8", "--temperature", "0", stdin="Tell me\na story.\n")
    assert (done.returncode, done.stderr) == (0, "")
    with LLM.load(talker) as llm:
        messages = [{"role": "user", "content": "Tell me\na story."}]
        assert done.stdout == llm.chat(messages, max_tokens=8, temperature=0.0).text + "\n"


def test_message_flag_with_json(
    talker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ignored")))
    flags = ["--json", "--max-tokens", "8", "--seed", "1", "--stats"]
    assert cli.main(["chat", str(talker), "-m", "Hello", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert (answer["reason"], answer["tokens"]) == ("length", 8)
    assert set(answer) == {
        *("text", "reason", "tokens", "prompt_tokens"),
        *("seconds", "first_token_seconds", "tokens_per_second"),
    }
    assert err.startswith("8 tokens · ") and err.count("\n") == 1


def test_plain_text_and_system(
    talker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = ["--max-tokens", "6", "--temperature", "0", "-m", "Hello"]
    said = []
    for more in (["--plain-text"], ["--system", "Be brief."], ["--chat-format", "plain"]):
        assert cli.main(["chat", str(talker), *greedy, *more]) == 0
        said.append(capsys.readouterr().out)
    with LLM.load(talker) as llm, LLM.load(talker, chat_format="plain") as plain:
        options = {"max_tokens": 6, "temperature": 0.0}
        hello = {"role": "user", "content": "Hello"}
        assert said == [
            llm.complete("Hello", **options).text + "\n",
            llm.chat([{"role": "system", "content": "Be brief."}, hello], **options).text + "\n",
            plain.chat([hello], **options).text + "\n",
        ]


@pytest.mark.parametrize(("stdin", "words"), [(b"", "empty"), (b" \n", "empty"), (b"\xff\n", "not UTF-8")])
def test_invalid_input_is_refused(
    talker: Path,
    stdin: bytes,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    line = refused(capsys, "chat", talker)
    assert line.startswith("moesaic: error: standard input is ") and words in line


def test_chat_errors_are_one_line(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("-m", "Hello")
    assert "no such folder" in refused(capsys, "chat", tmp_path / "none", *ask)
    assert "top_p: is 2.0" in refused(capsys, "chat", tmp_path / "none", *ask, "--top-p", "2")  # before it is loaded
    assert "unknown chat format 'x'" in refused(capsys, "chat", tmp_path / "none", *ask, "--chat-format", "x")
    assert "the message is empty" in refused(capsys, "chat", talker, "-m", " ")
    assert "--plain-text excludes --system" in refused(capsys, "chat", talker, *ask, "--plain-text", "--system", "x")
    assert "maximum context length" in refused(capsys, "chat", talker, "-m", "word " * 100, "--context", "64")
    assert "context: is 1" in refused(capsys, "chat", talker, *ask, "--context", "1")
    assert "device" in refused(capsys, "chat", talker, *ask, "--device", "abacus")


def change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


def name_an_architecture(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (cut, "model.safetensors"),
        (
            lambda folder: change(folder, "model.norm.weight", torch.ones(7)),
            "model.norm.weight has the wrong shape: expected [32], found [7]",
        ),
        (lambda folder: change(folder, "model.norm.weight", torch.full((32,), float("nan"))), "NaN"),
        (lambda folder: name_an_architecture(folder, "evil\x1b]0;owned\x07\nsecond"), "evil\\x1b]0;owned"),
    ],
)
def test_checkpoint_errors_are_one_line(
    talker: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    words: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(talker, folder)
    damage(folder)
    assert words in refused(capsys, "chat", folder, "-m", "Hello")


def test_unreachable_hub_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "neither org/name" in refused(capsys, "pull", "a b c")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    program = """
from moesaic import cli
assert cli.main(["pull", "org/missing"]) == cli.main(["chat", "org/missing", "-m", "Hello"]) == 2
"""  # in a process of its own, because the hub's library reads the environment when it is imported
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    line = "moesaic: error: org/missing: the hub cannot be reached, and the model is not in the cache\n"
    assert done.stderr == 2 * line


def test_closed_output_is_exit_code_141(talker: Path) -> None:
    command = (
        f"{sys.executable} -m moesaic.cli chat {talker} -m Hello --max-tokens 4000 | head -c 5; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, errors="replace")
    assert done.stdout.endswith("141\n") and done.stderr == ""


# other commands


def test_convert(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(talker), str(tmp_path / "new"), "--to", "mistral"]) == 0
    with open_checkpoint(tmp_path / "new") as checkpoint:
        assert checkpoint.layout == "mistral"
    line = refused(capsys, "convert", talker, tmp_path / "new", "--to", "hf")
    assert str(tmp_path / "new") in line
    assert "no such folder" in refused(capsys, "convert", tmp_path / "none", tmp_path / "x", "--to", "hf")
    assert not (tmp_path / "x").exists()
    line = refused(capsys, "convert", talker, tmp_path / "x", "--to", "gptq", "--decode")
    assert "has no quantized weights that can be written as gptq" in line and not (tmp_path / "x").exists()


def test_perplexity(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a rabbit.")
    assert cli.main(["perplexity", str(text), str(talker), "--length", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 1 and found["bytes"] == 36 and 1000 < found["perplexity"] < 1e6
    assert cli.main(["perplexity", str(text), str(talker), "--length", "16"]) == 0
    assert f"perplexity {found['perplexity']:.4f} ± " in capsys.readouterr().out
    assert "no such file" in refused(capsys, "perplexity", tmp_path / "none.txt", talker)
    assert "'q5' is unknown" in refused(capsys, "perplexity", text, talker, "--format", "q4", "--format", "q5")
    assert "length: is 0" in refused(capsys, "perplexity", text, talker, "--length", "0")


def test_perplexity_by_the_convention_of_llama_cpp(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a rabbit. " * 3)
    call = ["perplexity", str(text), str(talker), "--length", "8", "--convention", "llama.cpp"]
    assert cli.main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["convention"] == "llama.cpp" and found["tokens"] % 3 == 0 and found["perplexity_standard_error"] > 0
    assert cli.main(call) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert f"{found['perplexity']:.4f} ± {found['perplexity_standard_error']:.4f} per token" in first
    assert last.endswith("windows of 8 of which the second half counts, as llama.cpp's")
    assert "needs two windows" in refused(capsys, *call[:3], "--convention", "llama.cpp")


def test_eval_needs_lm_eval(talker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for tasks in ("arc_easy", "list"):
        assert "pip install 'moesaic[eval]'" in refused(capsys, "eval", talker, "--tasks", tasks)
    assert "'q5' is unknown" in refused(capsys, "eval", talker, "--tasks", "arc_easy", "--format", "q5")
    assert "limit: is 0.0" in refused(capsys, "eval", talker, "--tasks", "arc_easy", "--limit", "0")


def test_perplexity_of_several_formats(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("Once upon a time there was a rabbit.")
    asked = ["float32", "int8", "experts=int2,attention=int8"]
    formats = [part for name in asked for part in ("--format", name)]
    assert cli.main(["perplexity", str(text), str(talker), *formats, "--json", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in rows] == asked
    assert rows[0]["bits_per_weight"] == 32 > rows[1]["bits_per_weight"] > 8
    alone = []
    for name in asked:
        assert cli.main(["perplexity", str(text), str(talker), "--format", name, "--json"]) == 0
        alone.append(json.loads(capsys.readouterr().out))
    assert rows == alone
    record = json.loads(out.read_text())
    assert record["figures"] == {"model": talker.name, "formats": rows} and record["command"].startswith(
        "moesaic perplexity "
    )
    assert cli.main(["perplexity", str(text), str(talker), *formats]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == asked and "+0.00%" in lines[1] and lines[4].startswith("1 doc")


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("models", "mixtral"),
        ("formats", "bfloat16"),
        ("checkpoints", "hf"),
        ("ops", "experts"),
        ("chat-formats", "aime"),
    ],
)
def test_list(what: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cli.main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert name in [row["name"] for row in rows]
    assert [line.split()[0] for line in lines] == [row["name"] for row in rows]
    assert all(row.get("about", row.get("backend")) for row in rows)


def test_constants_match_the_modules() -> None:
    from moesaic import calibration, checkpoints, load_options
    from moesaic.bench import windows
    from moesaic.checkpoints import _targets
    from moesaic.cli import quality, quantize
    from moesaic.engine import Sampling

    assert ("auto", *checkpoints.FLOAT_DTYPES) == load_options.DTYPES
    assert tuple(_targets.QUANTIZATIONS) == cli.QUANTIZATIONS
    assert calibration.Settings("q4").tokens == quantize.TOKENS
    assert set(cli.SAMPLING) <= set(Sampling.__dataclass_fields__)
    assert quality.CONVENTIONS == windows.CONVENTIONS


@pytest.mark.parametrize(
    ("folder", "command", "dest", "extra"),
    [
        ("checkpoints", ["convert"], "to", set(cli.QUANTIZATIONS)),
        ("cluster/launch", ["launch"], "launcher", set()),
        ("bench/endpoints", ["bench", "serving"], "dialect", {"auto"}),
    ],
)
def test_a_new_registry_file_becomes_a_choice(
    folder: str, command: list[str], dest: str, extra: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda name: [*names(name), "brand_new"] if name == folder else names(name))
    choices = choices_of(*command, dest=dest)
    dashes = folder == "bench/endpoints"
    assert choices == {name.replace("_", "-") if dashes else name for name in registry.names(folder)} | extra


def choices_of(*command: str, dest: str) -> set[str]:
    """Return the choices of an argument of a subcommand."""
    parser = cli._parser()
    for name in command:
        [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = commands.choices[name]
    [argument] = [action for action in parser._actions if action.dest == dest]
    return set(argument.choices or ())
