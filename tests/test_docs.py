"""Check that what the documents show is true: programs run, commands parse, links resolve, references are current."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import moesaic
from moesaic import builtin, cli, registry
from moesaic.cli.run import split_arguments
from moesaic.serve.settings import Settings
from tests.support.documents import blocks
from tools import generate_reference
from tools.markdown import slug

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    ROOT / "moesaic/builtin/tales/README.md",
    ROOT / "recipes/tales/README.md",
    ROOT / "clients/js/README.md",
]
README = PAGES[0].read_text()
PROGRAMS = [ROOT / "README.md", DOCS / "tutorial/first-conversation.md", DOCS / "how-to/use-from-python.md"]

FLAGS = {
    "chat": "chat-format context device dtype format json kv-cache-dtype max-tokens message min-p plain-text plan "
    "repetition-penalty requantize seed stats system temperature top-k top-p speculation",
    "serve": "admin-port allowed-host cache-tokens chat-format context cors-origin device drain-timeout dtype format "
    "host idle-unload insecure-no-auth keep-alive-timeout keys kv-cache-dtype log-format log-level max-body memory "
    "otel pin port presets queue "
    "queue-timeout request-timeout requantize sequences strict-fields strict-model-name "
    "timeout-keep-alive tls-cert tls-key "
    "trusted-proxy "
    # TGI's launcher: moesaic/cli/tgi_flags.py says what each means
    "api-key cors-allow-origin cuda-graphs cuda-memory-fraction disable-custom-kernels disable-grammar-support "
    "enable-prefill-logprobs env graceful-termination-timeout hostname huggingface-hub-cache json-output "
    "lora-adapters master-addr master-port max-batch-prefill-tokens max-batch-size max-batch-total-tokens "
    "max-best-of max-client-batch-size max-concurrent-requests max-input-length max-input-tokens "
    "max-stop-sequences max-top-n-tokens max-total-tokens max-waiting-tokens model-id ngrok ngrok-authtoken "
    "ngrok-edge num-shard otlp-endpoint otlp-service-name payload-limit prometheus-port quantize revision "
    "rope-factor rope-scaling shard-uds-path sharded speculate tokenizer-config-path trust-remote-code usage-stats "
    "validation-workers waiting-served-ratio watermark-delta watermark-gamma weights-cache-override plan speculation",
    "gateway": "admin-port aime-endpoints allowed-host cors-origin crashes drain-timeout host insecure-no-auth jobs "
    "keep-alive-timeout keys lease log-format log-level max-body model otel port queue queue-per-key queue-timeout "
    "request-timeout timeout-keep-alive strict-fields tls-cert tls-key trusted-proxy",
    "worker": "api-auth-key api-server ca cache-tokens chat-format context device drain-timeout dtype format gateway "
    "idle-unload insecure-plaintext job-type key key-file kv-cache-dtype log-format log-level memory name pin plan "
    "presets queue requantize sequences slots speculation",
    "admin": "ca force insecure-plaintext json key key-file most request url",
    "launch": "address cpus gpus program replicas to worker",
    "keys": "admin concurrent file model priority requests-per-minute tokens-per-minute worker",
    "run-batch": "cache-tokens chat-format concurrency context device dtype format kv-cache-dtype plan requantize "
    "speculation",
    "plan": "batch context device for format hardware json kv-cache-dtype picture",
    "run": "context serve yes",
    "pull": "sha256 to",
    "convert": "adapter decode shards to",
    "list": "json",
    "pack": "dtype format requantize",
    "perplexity": "convention device dtype format json kl-divergence kv-cache-dtype length out reference "
    "reference-format requantize",
    "quantize": "bits calibrate dtype format heat-map json requantize tokens",
    "train": "",
    "eval": "apply-chat-template batch-size chat-format confirm-run-unsafe-code context device dtype format gen-kwargs "
    "include-path json kv-cache-dtype limit num-fewshot out requantize samples-out seed system-instruction tasks",
    "bench": "",
}
"""The flags of each command. Adding a flag is a decision, so it is made here too."""


def console_lines(page: Path) -> list[str]:
    """Return the command lines of a page, without the prompt."""
    return [
        line[2:]
        for block in blocks("console", page.read_text())
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def moesaic_commands(line: str) -> list[list[str]]:
    """Return the arguments of each call of ``moesaic`` in a command line, behind pipes and variables too."""
    calls = []
    for part in re.split(r"\s\|\s", line):
        words = shlex.split(part)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] == "moesaic":
            calls.append(words[1:])
    return calls


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser()
    [actions] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions.choices)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", without_code(page.read_text()), re.M)
    return {slug(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings}


@pytest.fixture
def output_of(tmp_path, monkeypatch, capsys) -> Callable[[Path], str]:
    """Return a function that runs a program in this process, which has imported torch, and returns its output.

    The default model is tales, which is faster.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtin, "PACKAGE", "no_such_package")

    def run(path: Path) -> str:
        monkeypatch.setattr("sys.argv", [str(path)])
        runpy.run_path(str(path), run_name="__main__")
        return str(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda path: path.stem)
def test_python_of_a_page_runs(page, tmp_path, output_of):
    [program] = blocks("python", page.read_text())
    (tmp_path / "program.py").write_text(program)
    assert len(output_of(tmp_path / "program.py")) > 100


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_and_are_short(example, output_of, monkeypatch, request):
    assert example.read_text().count("\n") < 40
    if "moesaic.client" in example.read_text():
        monkeypatch.setenv("MOESAIC_BASE_URL", request.getfixturevalue("tales").url)
    assert output_of(example).strip()


def test_an_example_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/logprobs.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_moesaic_commands_are_found_in_lines():
    assert moesaic_commands("echo 'a b' | KEY=1 moesaic chat --seed 8") == [["chat", "--seed", "8"]]
    assert moesaic_commands("make chat") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_parse(page):
    for line in console_lines(page):
        for arguments in moesaic_commands(line):
            cli._parser().parse_args(split_arguments(arguments)[0])


def test_pages_show_commands():
    assert sum(len(moesaic_commands(line)) for page in PAGES for line in console_lines(page)) > 100


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {
        name for page in PAGES for line in console_lines(page) for name in re.findall(r"\bmake (?:-s )?([a-z-]+)", line)
    }
    assert {"chat", "test"} <= used <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(page):
    for target, _, anchor in (
        link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", without_code(page.read_text()))
    ):
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert DOCS not in page.parents or DOCS in file.parents, f"{target} is not part of the site"
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_pages_named_in_the_code_exist():
    sources = [*(ROOT / "moesaic").rglob("*.py"), *(ROOT / "moesaic").rglob("*.toml"), *(ROOT / "tests").rglob("*.py")]
    for path in [*sources, ROOT / "pyproject.toml", ROOT / "CHANGELOG.md", *(ROOT / "recipes").rglob("*.py")]:
        for name in re.findall(r"(?<![\w/.])docs/[\w./-]+\.md", path.read_text()):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_the_site_shows_each_page():
    listed = set(
        re.findall(r'"([\w/-]+\.md)"', str(tomllib.loads((ROOT / "zensical.toml").read_text())).replace("'", '"'))
    )
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    decisions = {page for page in pages if re.match(r"decisions/\d", page)}
    assert listed == pages - decisions
    index = (DOCS / "decisions/index.md").read_text()
    assert decisions and all(page.removeprefix("decisions/") in index for page in decisions)


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return generate_reference.pages()


def test_reference_pages_are_current(reference):
    for name, text in reference.items():
        assert generate_reference.is_current(name, text), f"docs/reference/{name} is not current: run `make reference`"


def test_reference_names_what_this_build_has(reference):
    for folder in ("formats", "checkpoints", "models"):
        for name in registry.names(folder):
            assert f"`{name}`" in reference["supported.md"], f"{folder}/{name}"


def test_key_page_lists_the_open_routes(reference):
    routes = set(re.findall(r"^\| `(GET|POST) (\S+)` .*\| none \|$", reference["http-api.md"], re.M))
    section = (DOCS / "how-to/keys.md").read_text().partition("open without a key")[2].partition("AIME")[0]
    assert routes == set(re.findall(r"`(GET|POST) (\S+)`", section))


def test_serve_page_has_the_limits_of_the_settings():
    defaults = {field.name: field.default for field in fields(Settings)}
    rows = re.findall(r"^\| `(\w+)`[^|]* \| (\d+) \|", (DOCS / "how-to/serve.md").read_text(), re.M)
    assert len(rows) > 10
    for name, value in rows:
        assert defaults[name] == int(value), name


def test_the_glossary_is_short_and_sorted():
    terms = re.findall(r"^\| ([a-z][^|]*) \|", (DOCS / "glossary.md").read_text(), re.M)[1:]
    assert terms == sorted(terms)
    assert 20 < len(terms) <= 40


def test_flags_are_frozen():
    flags = {
        name: " ".join(
            sorted(
                option[2:]
                for action in parser._actions
                for option in action.option_strings
                if option[:2] == "--" and option != "--help"
            )
        )
        for name, parser in commands().items()
    }
    assert flags == {name: " ".join(sorted(flags.split())) for name, flags in FLAGS.items()}


@pytest.mark.parametrize("name", FLAGS)
def test_help_of_a_command_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"moesaic {name}" in shown.partition("example")[2]


def test_public_names_exist_and_are_documented():
    for name in moesaic.__all__:
        assert getattr(moesaic, name).__doc__


def test_the_architecture_page_names_each_part():
    page = (DOCS / "architecture.md").read_text()
    for path in (ROOT / "moesaic").iterdir():
        if not path.name.startswith("__pycache__"):
            assert path.name in page or path.stem in page, path.name
