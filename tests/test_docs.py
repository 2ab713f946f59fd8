"""What the documents show is run: the README's Python and commands, the examples, the links, the flags."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic
from moesaic import cli, registry
from tests.support.documents import blocks

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "moesaic/builtin/tales/README.md",
    ROOT / "recipes/tales/README.md",
    ROOT / "clients/js/README.md",
]
README = PAGES[0].read_text()

FLAGS = {
    "chat": "chat-format context device dtype format json kv-cache-dtype max-tokens message min-p plain-text "
    "repetition-penalty seed stats system temperature top-k top-p",
    "serve": "allowed-host cache-tokens chat-format context cors-origin device drain-timeout dtype format host "
    "insecure-no-auth keys kv-cache-dtype log-format log-level max-body memory otel port queue queue-timeout "
    "request-timeout sequences strict-model-name tls-cert tls-key trusted-proxy "
    # TGI's launcher: moesaic/cli/tgi_flags.py says what each means
    "api-key cors-allow-origin cuda-graphs cuda-memory-fraction disable-custom-kernels disable-grammar-support "
    "enable-prefill-logprobs env graceful-termination-timeout hostname huggingface-hub-cache json-output "
    "lora-adapters master-addr master-port max-batch-prefill-tokens max-batch-size max-batch-total-tokens "
    "max-best-of max-client-batch-size max-concurrent-requests max-input-length max-input-tokens "
    "max-stop-sequences max-top-n-tokens max-total-tokens max-waiting-tokens model-id ngrok ngrok-authtoken "
    "ngrok-edge num-shard otlp-endpoint otlp-service-name payload-limit prometheus-port quantize revision "
    "rope-factor rope-scaling shard-uds-path sharded speculate tokenizer-config-path trust-remote-code usage-stats "
    "validation-workers waiting-served-ratio watermark-delta watermark-gamma weights-cache-override",
    "gateway": "admin-port aime-endpoints allowed-host cors-origin crashes drain-timeout host insecure-no-auth jobs "
    "keys lease log-format log-level max-body model otel port queue queue-per-key queue-timeout request-timeout "
    "tls-cert tls-key trusted-proxy",
    "worker": "api-auth-key api-server ca cache-tokens chat-format context device drain-timeout dtype format gateway "
    "insecure-plaintext job-type key key-file kv-cache-dtype log-format log-level memory name queue sequences slots",
    "admin": "ca insecure-plaintext json key key-file most request url",
    "launch": "address cpus gpus program replicas to worker",
    "keys": "admin concurrent file model priority requests-per-minute tokens-per-minute worker",
    "run-batch": "cache-tokens chat-format concurrency context device dtype format kv-cache-dtype",
    "pull": "sha256 to",
    "convert": "shards to",
    "list": "json",
    "pack": "dtype format",
    "perplexity": "device dtype format json kv-cache-dtype length out",
    "bench": "",
}
"""Every flag has an owner: a new one is a decision, made here."""


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser()
    [actions] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions.choices)


def test_the_readmes_python_runs(tmp_path):
    [program] = blocks("python", README)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_and_are_short(example, tmp_path, request):
    assert example.read_text().count("\n") < 40
    asks = "moesaic.client" in example.read_text()
    environment = os.environ | ({"MOESAIC_BASE_URL": request.getfixturevalue("tales").url} if asks else {})
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_readmes_commands_are_understood():
    shown = [line[2:] for page in PAGES for block in blocks("console", page.read_text()) for line in block.splitlines()]
    lines = [line for line in shown if line.startswith("moesaic ")]
    assert lines
    for line in lines:
        cli._parser().parse_args(shlex.split(line)[1:])


def test_what_make_is_told_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {
        name
        for page in PAGES
        for name in re.findall(r"\bmake (?:-s )?([a-z-]+)", "\n".join(blocks("console", page.read_text())))
    }
    assert {"chat", "test"} <= used <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_flags_are_frozen():
    found = {
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
    assert found == {name: " ".join(sorted(flags.split())) for name, flags in FLAGS.items()}


@pytest.mark.parametrize("name", FLAGS)
def test_every_command_explains_itself_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"moesaic {name}" in shown.partition("example")[2]


def test_public_names_exist_and_are_documented():
    for name in moesaic.__all__:
        assert getattr(moesaic, name).__doc__


def test_the_readme_names_what_this_build_has():
    for folder in ("formats", "checkpoints", "models"):
        for name in registry.names(folder):
            assert name in README.lower(), f"{folder}/{name}"


def test_the_architecture_page_draws_every_part():
    page = (ROOT / "docs/architecture.md").read_text()
    for path in (ROOT / "moesaic").iterdir():
        if not path.name.startswith("__pycache__"):
            assert path.name in page or path.stem in page, path.name
