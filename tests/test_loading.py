"""Sizes of loaded models: the key/value cache fits the device's memory, and predictions equal what is allocated."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moesaic import LLM, Classifier, convert, formats, memory, packed
from moesaic.errors import CheckpointError, InvalidParameter, NotFound
from moesaic.loading import cache_bytes_per_token, cache_dtype, memory_needed, plan_cache
from tests.support.models import transformers_model

PER_TOKEN = 2 * 2 * (2 * 8 * 4)
"""Bytes of a token in the cache of the tiny model: 2 layers' float32 keys and values, 2 heads of 8."""


def allocated(llm: LLM) -> int:
    """Return the bytes of the weights and of the key/value cache that a loaded model holds."""
    tensors = (*llm.loaded.model.parameters(), *llm.engine._runner.cache.tensors())
    return sum(tensor.nbytes for tensor in tensors)


def free_memory(monkeypatch: pytest.MonkeyPatch, available: int, total: int = 1 << 40) -> None:
    monkeypatch.setattr(memory, "available", lambda: available)
    monkeypatch.setattr(memory, "total", lambda: total)


def on_cuda(model: torch.nn.Module) -> SimpleNamespace:
    """Return a stand-in for ``model`` on a GPU, with the attributes that a plan for the cache needs."""
    weight = SimpleNamespace(device=torch.device("cuda:1"))
    return SimpleNamespace(
        max_length=model.max_length, cache_shapes=model.cache_shapes, parameters=lambda: iter([weight])
    )


@pytest.fixture(scope="module")
def model(talker):
    with LLM.load(talker, cache_tokens=160) as llm:
        yield llm.loaded.model


def test_cache_takes_a_quarter_of_available_memory(model, monkeypatch):
    free_memory(monkeypatch, 4 * 1000 * PER_TOKEN)
    assert plan_cache(model, None, None, 10, torch.float32) == (1000, 1000)
    assert plan_cache(model, None, None, 10, torch.bfloat16) == (2000, 2000)
    assert plan_cache(model, None, None, 10, torch.int8) == (2666, 2670)  # an int8 cache has a scale for each head
    assert plan_cache(model, 100, None, 10, torch.float32) == (100, 1000)
    assert plan_cache(model, 50, None, 10, torch.float32) == (50, 16 * 50)
    assert plan_cache(model, 100, 505, 10, torch.float32) == (100, 510)


def test_control_group_bounds_the_cache(talker, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{5 * 1000 * PER_TOKEN}\n")
    (tmp_path / "memory.current").write_text(f"{1000 * PER_TOKEN}\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "memory.max",))
    with LLM.load(talker, block_size=10) as llm:
        assert llm.engine._runner.cache.keys[0].shape[:2] == (100, 10)
    with pytest.raises(InvalidParameter, match=r"cache_tokens: is 5001, which needs 0.0 GB, but the device has 0.0 GB"):
        LLM.load(talker, cache_tokens=5001)


def test_free_memory_of_the_gpu_bounds_its_cache(model, monkeypatch):
    free_memory(monkeypatch, 1 << 40)
    probed = []

    def probe(device: torch.device) -> tuple[int, int]:
        probed.append(device)
        return 4 * 1000 * PER_TOKEN, 5000 * PER_TOKEN

    monkeypatch.setattr(torch.cuda, "mem_get_info", probe)
    assert plan_cache(on_cuda(model), None, None, 10, torch.float32) == (1000, 1000)
    assert plan_cache(on_cuda(model), None, 5000, 10, torch.float32) == (1000, 5000)
    with pytest.raises(InvalidParameter, match="cache_tokens"):
        plan_cache(on_cuda(model), None, 5001, 10, torch.float32)
    assert set(probed) == {torch.device("cuda:1")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_tokens": 512},
        {"context": 64},
        {"cache_tokens": 500, "block_size": 32},
        {"cache_tokens": 512, "kv_cache_dtype": "int8"},
        {"cache_tokens": 512, "dtype": "bfloat16"},
        {"cache_tokens": 512, "weight_format": "q4"},
        {"cache_tokens": 512, "weight_format": "experts=int2,attention=int8"},
    ],
)
def test_prediction_equals_what_is_allocated(talker, options):
    needed = memory_needed(talker, **options)
    with LLM.load(talker, **{"format" if key == "weight_format" else key: options[key] for key in options}) as llm:
        assert needed == allocated(llm)


def test_scarce_memory_is_left_to_the_weights(talker, model, monkeypatch):
    weights = sum(parameter.nbytes for parameter in model.parameters())
    free_memory(monkeypatch, weights + 4 * 1600 * PER_TOKEN)
    assert memory_needed(talker) == weights + 1600 * PER_TOKEN
    free_memory(monkeypatch, 0)
    assert memory_needed(talker) == weights + 16 * PER_TOKEN  # one block


def test_prediction_for_a_gpu_uses_its_memory(talker, model, monkeypatch):
    weights = sum(parameter.nbytes for parameter in model.parameters())
    free_memory(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (weights + 4 * 1600 * PER_TOKEN, 1 << 40))
    assert memory_needed(talker, device="cuda") == weights + 1600 * PER_TOKEN


def test_cache_counts(talker):
    small, large = (memory_needed(talker, cache_tokens=tokens) for tokens in (160, 1600))
    assert large - small == 1440 * PER_TOKEN
    half = memory_needed(talker, cache_tokens=1600, kv_cache_dtype="bfloat16")
    assert large - half == 1600 * PER_TOKEN // 2


def test_quantized_weights_count_quantized(talker):
    plain, quantized = (memory_needed(talker, cache_tokens=16, weight_format=name) for name in (None, "experts=int4"))
    shapes = [(4, 48, 32), (4, 48, 32), (4, 32, 48)] * 2
    saved = [4 * math.prod(shape) - formats.load("int4").nbytes(shape) for shape in shapes]
    assert plain - quantized == sum(saved) > 0


def test_weights_in_two_layouts_count_once(talker, tmp_path):
    convert.convert(talker, tmp_path / "mistral", "mistral")
    both = Path(shutil.copytree(talker, tmp_path / "both"))
    for name in ("params.json", "consolidated.safetensors"):
        shutil.copy(tmp_path / "mistral" / name, both)
    once = memory_needed(talker, cache_tokens=160)
    assert memory_needed(both, cache_tokens=160) == memory_needed(tmp_path / "mistral", cache_tokens=160) == once
    with LLM.load(both, cache_tokens=160) as llm:
        assert allocated(llm) == once


def test_packed_folder_counts_packed_weights(talker, tmp_path):
    packed.pack(talker, tmp_path / "packed", "experts=int2,attention=int8")
    needed = memory_needed(tmp_path / "packed", cache_tokens=512)
    assert needed == memory_needed(talker, cache_tokens=512, weight_format="experts=int2,attention=int8")
    with LLM.load(tmp_path / "packed", cache_tokens=512) as llm:
        assert needed == allocated(llm)
    with pytest.raises(InvalidParameter, match="format: cannot be changed"):
        memory_needed(tmp_path / "packed", weight_format="q4")


def test_classifier_counts_without_a_cache(talker, tmp_path):
    names = {"id2label": {0: "sad", 1: "glad"}, "pad_token_id": 0, "vocab_size": 32000}
    transformers_model("Mixtral", names, "ForSequenceClassification").save_pretrained(tmp_path)
    shutil.copy(talker / "tokenizer.model", tmp_path)
    classifier = Classifier.load(tmp_path)
    weights = sum(parameter.nbytes for parameter in classifier.loaded.model.parameters())
    assert memory_needed(tmp_path, weight_format="q4") == weights


def test_prediction_refuses_what_loading_refuses(talker, tmp_path):
    with pytest.raises(NotFound):
        memory_needed(tmp_path / "nowhere")
    for options in ({"dtype": "int3"}, {"weight_format": "q5"}, {"device": "toaster"}, {"kv_cache_dtype": "int4"}):
        with pytest.raises(InvalidParameter):
            memory_needed(talker, **options)
    with pytest.raises(InvalidParameter, match="context"):
        memory_needed(talker, context=10**6)
    shutil.copytree(talker, tmp_path / "damaged")
    config = json.loads((talker / "config.json").read_text())
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    with pytest.raises(CheckpointError):
        memory_needed(tmp_path / "damaged")


def test_cache_dtype_follows_activations(model):
    assert cache_dtype(model, "auto") == torch.float32
    assert cache_bytes_per_token(model, cache_dtype(model, "auto")) == PER_TOKEN
