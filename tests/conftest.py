"""A tiny random model that can be talked to; what it says is nonsense."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import transformers


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with Mixtral's own tokenizer and room for 4096 tokens; tests copy it before they damage it."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.submodule_search_locations
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
    tokenizer = Path(next(iter(spec.submodule_search_locations))) / "data" / "tokenizer.model.v1"
    shutil.copy(tokenizer, path / "tokenizer.model")
    return path


@pytest.fixture(scope="session")
def mistral3(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the tokenizer of Mistral's third version, whose calls have a control token."""
    path = Path(shutil.copytree(talker, tmp_path_factory.mktemp("v3") / "model"))
    config = transformers.MixtralConfig.from_pretrained(path)
    config.vocab_size = 32768
    torch.manual_seed(6)
    transformers.MixtralForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.model").unlink()
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.submodule_search_locations
    data = Path(next(iter(spec.submodule_search_locations))) / "data"
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", path / "tokenizer.model")
    return path
