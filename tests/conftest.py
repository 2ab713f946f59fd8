"""Fixtures that several packages use: tiny models, servers and a browser."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from httpx._transports import default
from hypothesis import HealthCheck, settings

from tests.support.browser import ARGUMENTS
from tests.support.interpreter import import_library
from tests.support.require import package_folder, require
from tests.support.server import Server, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# How fast a machine makes examples says nothing about the code.
settings.register_profile("moesaic", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moesaic")

# Each httpx client reads the certificates of all authorities, 30 ms long; tests start more than a thousand clients.
default.create_ssl_context = functools.cache(default.create_ssl_context)

# Transformers and PEFT import Triton too. The kernels of tests/ops/triton run in its interpreter, and so must the
# functions of its library that they call.
import_library()

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores, so more threads only add waiting
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run(request: pytest.FixtureRequest) -> None:
    """Seed torch with the name of the test, so that a test draws the same numbers alone and in any order."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Mixtral with Mixtral's tokenizer and a context of 4096 tokens. Tests change copies only."""
    import transformers

    path = tmp_path_factory.mktemp("talker")
    torch.manual_seed(5)
    config = transformers.MixtralConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=4096,
        dtype="float32",
    )
    transformers.MixtralForCausalLM(config).save_pretrained(path)
    shutil.copy(package_folder("mistral_common") / "data/tokenizer.model.v1", path / "tokenizer.model")
    return path


@pytest.fixture(scope="session")
def mistral3(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Mixtral with Mistral's v3 tokenizer, which has control tokens for tool calls."""
    import transformers

    path = Path(shutil.copytree(talker, tmp_path_factory.mktemp("v3") / "model"))
    config = transformers.MixtralConfig.from_pretrained(path)
    config.vocab_size = 32768
    torch.manual_seed(6)
    transformers.MixtralForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.model").unlink()
    data = package_folder("mistral_common") / "data"
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", path / "tokenizer.model")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    require(chromium, "Chromium is not installed (apt-get install chromium)")
    require(importlib.util.find_spec("playwright"), "Playwright is not installed (pip install playwright)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def tales() -> Iterator[Server]:
    """Server of the model tales, which is fast and deterministic."""
    from moesaic.llm import LLM
    from moesaic.local_backend import LocalBackend

    llm = LLM.load("tales")
    with running(lambda: LocalBackend(llm)) as server:
        yield server


@pytest.fixture
def scripted() -> Iterator[Server]:
    """Server whose replies the test scripts."""
    with running() as server:
        yield server
