"""Plans: what they count equals what is loaded, and the key/value cache fits the device's memory."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic import LLM, Classifier, LoadOptions, convert, formats, loading, memory, packed
from moesaic.errors import CheckpointError, InvalidParameter, InvalidRequest, NotEnoughMemory, NotFound
from moesaic.formats import Packed
from moesaic.model_sizes import ModelSizes
from moesaic.plan import LEAST_CONTEXT, Plan, make_plan, plan_spec
from tests.support.gguf_files import TinyFile, blocks
from tests.support.gptq import Gptq, case
from tests.support.models import transformers_model

PER_TOKEN = 2 * 2 * (2 * 8 * 4)
"""Bytes of a token in the cache of the tiny model: 2 layers' float32 keys and values, 2 heads of 8."""


def plan(path: Path, available: int | None = None, **options: Any) -> Plan:
    return make_plan(path, LoadOptions(**options), available)


def needed(path: Path) -> int:
    """Return the bytes that a model takes without its cache: its weights, and the memory of a step."""
    planned = plan(path)
    return (0 if planned.mapped else planned.weight_bytes) + ModelSizes.count(planned.spec).workspace_bytes()


def nbytes(module: torch.nn.Module) -> int:
    """Return the bytes of the weights that a loaded model holds."""
    return sum(parameter.nbytes for parameter in module.parameters())


def free_memory(monkeypatch: pytest.MonkeyPatch, available: int, total: int = 1 << 40) -> None:
    monkeypatch.setattr(memory, "available", lambda: available)
    monkeypatch.setattr(memory, "total", lambda: total)


def grouped_file(talker: Path, folder: Path) -> Path:
    return TinyFile("Q4_K", experts=3).write(folder / "tiny.gguf")


def mixed_file(talker: Path, folder: Path) -> Path:
    """Write a file whose layers have experts of different types, and a head of another type."""
    file, random = TinyFile("Q4_K", experts=3), np.random.default_rng(1)
    for name, shape in (("blk.1.ffn_down_exps.weight", (3, 256, 256)), ("output.weight", (96, 256))):
        file.tensors[name] = blocks("Q6_K", shape, random), "Q6_K"
    return file.write(folder / "mixed.gguf")


def gptq_folder(talker: Path, folder: Path) -> Path:
    return case(Gptq()).write(folder / "gptq")


def act_order_folder(talker: Path, folder: Path) -> Path:
    return case(Gptq(act_order=True)).write(folder / "gptq")


def packed_folder(talker: Path, folder: Path) -> Path:
    packed.pack(talker, folder / "packed", "experts=int2,attention=int8")
    return folder / "packed"


def packed_codes(talker: Path, folder: Path) -> Path:
    packed.pack(grouped_file(talker, folder), folder / "packed")
    return folder / "packed"


def same(talker: Path, folder: Path) -> Path:
    return talker


def tied(talker: Path, folder: Path) -> Path:
    transformers_model("Llama", {"tie_word_embeddings": True}).save_pretrained(folder)
    return folder


def judge(talker: Path, folder: Path) -> Path:
    """Write a random classifier with a tokenizer."""
    names = {"id2label": {0: "sad", 1: "glad"}, "pad_token_id": 0, "vocab_size": 32000}
    transformers_model("Mixtral", names, "ForSequenceClassification").save_pretrained(folder)
    shutil.copy(talker / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (same, {}),
        (same, {"dtype": "bfloat16"}),
        (same, {"dtype": "float16"}),
        (same, {"format": "q8"}),
        (same, {"format": "q4"}),
        (same, {"format": "q2", "dtype": "bfloat16"}),
        (same, {"format": "grouped"}),
        (same, {"format": "experts=int2,attention=int8"}),
        (tied, {"format": "q4"}),
        (grouped_file, {}),
        (grouped_file, {"format": "q4", "requantize": True}),
        (mixed_file, {}),
        (gptq_folder, {}),
        (act_order_folder, {}),
        (packed_folder, {}),
        (packed_codes, {}),
        (judge, {}),
        (judge, {"format": "q4"}),
    ],
)
def test_planned_weights_equal_those_that_are_loaded(talker, tmp_path, write, options):
    planned = plan(write(talker, tmp_path), **options)
    loaded = loading.load_model(planned)
    assert planned.weight_bytes == nbytes(loaded.model)
    assert (loaded.layout, loaded.model.dtype) == (planned.spec.layout, planned.spec.dtype)
    # The groups are all weights that have a format; a tied head is the embedding.
    weights = {id(module): module for module in loaded.model.modules() if isinstance(module, Packed)}
    assert sum(group.nbytes for group in planned.weights) == sum(map(nbytes, weights.values()))
    assert {group.format for group in planned.weights} == {weight.name for weight in weights.values()}
    packed_parts = {id(part) for weight in weights.values() for part in weight.parameters()}
    others = [part for part in loaded.model.parameters() if id(part) not in packed_parts]  # norms and routers
    assert sum(group.weights for group in planned.weights) + sum(map(torch.numel, others)) == planned.parameters
    if planned.spec.layout != "packed":
        assert [dataclasses.replace(group, error=None) for group in loaded.weights] == list(planned.weights)
        assert all(group.error is not None for group in loaded.weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_tokens": 512},
        {"context": 64},
        {"cache_tokens": 500, "block_size": 32},
        {"cache_tokens": 512, "kv_cache_dtype": "int8"},
        {"cache_tokens": 512, "dtype": "bfloat16"},
        {"cache_tokens": 512, "kv_cache_dtype": "bfloat16", "format": "q4"},
    ],
)
def test_planned_bytes_equal_those_that_are_allocated(talker, options):
    planned = plan(talker, **options)
    with LLM.from_plan(planned, "talker") as llm:
        cache = sum(tensor.nbytes for tensor in llm.engine._runner.cache.tensors())
        assert (planned.weight_bytes, planned.cache_bytes) == (nbytes(llm.loaded.model), cache)
        assert planned.bytes == planned.weight_bytes + cache
        assert llm.context == min(planned.context, planned.cache_tokens)  # this model has no attention window
        assert llm.engine.cache_dtype == planned.cache_dtype
        assert llm.loaded.plan == planned


def test_keywords_of_llm_load_are_load_options(talker):
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "format": "q8",
        "requantize": True,
        "device": "cpu",
        "context": 60,
        "cache_tokens": 100,
        "kv_cache_dtype": "int8",
        "block_size": 8,
    }
    assert options.keys() == LoadOptions.__dataclass_fields__.keys()
    with LLM.load(talker, **options) as llm:
        assert llm.loaded.plan == plan(talker, **options)
        assert llm.engine._runner.cache.keys[0].shape[:2] == (13, 8) and llm.context == 60
    with pytest.raises(TypeError, match="dtpye"):
        LLM.load(talker, dtpye="bfloat16")
    assert not LoadOptions.__dataclass_fields__.keys() & inspect.signature(LLM.load).parameters.keys()


def test_cache_takes_a_quarter_of_available_memory(talker):
    available = needed(talker) + 4 * 1000 * PER_TOKEN

    def sizes(**options: Any) -> tuple[int, int]:
        planned = plan(talker, available, block_size=10, **options)
        return planned.context, planned.cache_tokens

    assert sizes() == (1000, 1000)
    assert sizes(kv_cache_dtype="bfloat16") == (2000, 2000)
    assert sizes(kv_cache_dtype="int8") == (2666, 2670)  # an int8 cache has a scale for each head
    assert sizes(context=100) == (100, 1000)
    assert sizes(context=50) == (50, 16 * 50)
    assert sizes(context=100, cache_tokens=505) == (100, 510)


def test_control_group_bounds_the_cache(talker, tmp_path, monkeypatch):
    limit = needed(talker) + 5 * 1000 * PER_TOKEN
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{1000 * PER_TOKEN}\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "memory.max",))
    with LLM.load(talker, block_size=10) as llm:
        assert llm.engine._runner.cache.keys[0].shape[:2] == (100, 10)
    with pytest.raises(NotEnoughMemory, match=r"--cache-tokens 4000 fits"):
        LLM.load(talker, cache_tokens=4001)


def test_free_memory_of_the_gpu_bounds_its_cache(talker, monkeypatch):
    weights, free = plan(talker).weight_bytes, needed(talker) + 4 * 1000 * PER_TOKEN
    free_memory(monkeypatch, 0)
    probed = []

    def probe(device: torch.device) -> tuple[int, int]:
        probed.append(device)
        return free, 1 << 40

    monkeypatch.setattr(torch.cuda, "mem_get_info", probe)
    on_gpu: dict[str, Any] = {"device": "cuda:1", "block_size": 10}
    assert plan(talker, **on_gpu).bytes == weights + 1000 * PER_TOKEN
    assert plan(talker, **on_gpu, cache_tokens=4000).cache_tokens == 4000
    with pytest.raises(NotEnoughMemory, match="--cache-tokens 4000 fits"):
        plan(talker, **on_gpu, cache_tokens=4001)
    assert set(probed) == {torch.device("cuda:1")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_torch_cannot_use_is_refused(talker):
    with pytest.raises(InvalidParameter, match=r"^device: is 'cuda', but torch cannot use it here: \w"):
        plan(talker, device="cuda")


def test_scarce_memory_is_left_to_the_weights(talker):
    weights, least = plan(talker).weight_bytes, needed(talker)
    assert plan(talker, least + 4 * 1600 * PER_TOKEN).bytes == weights + 1600 * PER_TOKEN
    assert plan(talker, least + LEAST_CONTEXT * PER_TOKEN).context == LEAST_CONTEXT // 4


def test_a_model_that_does_not_fit_is_refused_with_what_fits(talker, tmp_path):
    quantized = plan(talker, format="q4")
    available = needed(talker) - plan(talker).weight_bytes + quantized.weight_bytes + LEAST_CONTEXT * PER_TOKEN
    with pytest.raises(NotEnoughMemory, match=r"[MG]B of memory are free: --format q4 fits$"):
        plan(talker, available)
    with pytest.raises(NotEnoughMemory, match=r"a folder made by `moesaic pack` is mapped"):
        plan(talker, 0)
    assert plan(packed_folder(talker, tmp_path), available).mapped
    file = grouped_file(talker, tmp_path)
    with pytest.raises(NotEnoughMemory, match=r"--format q\d --requantize fits$"):
        plan(file, needed(file))


def test_auto_takes_the_first_format_that_fits(talker, tmp_path):
    work = needed(talker) - plan(talker).weight_bytes + LEAST_CONTEXT * PER_TOKEN
    for name in (None, "q8", "q4", "q2"):
        wanted = plan(talker, format=name)
        assert plan(talker, work + wanted.weight_bytes, format="auto").spec.formats == wanted.spec.formats
    with pytest.raises(NotEnoughMemory, match="pack"):
        plan(talker, work, format="auto")
    file = grouped_file(talker, tmp_path)  # codes of a file are not rounded again without being asked
    assert plan(file, format="auto").spec == plan(file).spec
    with pytest.raises(NotEnoughMemory, match="--requantize"):
        plan(file, needed(file), format="auto")


def test_quantized_weights_count_quantized(talker):
    plain, quantized = (plan(talker, format=name).weight_bytes for name in (None, "experts=int4"))
    shapes = [(4, 48, 32), (4, 48, 32), (4, 32, 48)] * 2
    saved = [4 * math.prod(shape) - formats.load("int4").nbytes(shape) for shape in shapes]
    assert plain - quantized == sum(saved) > 0


def test_weights_in_two_layouts_count_once(talker, tmp_path):
    convert.convert(talker, tmp_path / "mistral", "mistral")
    both = Path(shutil.copytree(talker, tmp_path / "both"))
    for name in ("params.json", "consolidated.safetensors"):
        shutil.copy(tmp_path / "mistral" / name, both)
    once = plan(talker).weight_bytes
    assert plan(both).weight_bytes == plan(tmp_path / "mistral").weight_bytes == once
    assert nbytes(loading.load_model(plan(both)).model) == once


def test_mapped_weights_take_no_memory(talker, tmp_path, monkeypatch):
    path = packed_folder(talker, tmp_path)
    free_memory(monkeypatch, needed(path) + 4 * 1600 * PER_TOKEN)
    planned = plan(path)
    assert planned.mapped and planned.bytes == planned.cache_bytes == 1600 * PER_TOKEN
    assert planned.weight_bytes == plan(talker, 1 << 40, format="experts=int2,attention=int8").weight_bytes
    on_gpu = plan(path, memory.available() + planned.weight_bytes, device="cuda")
    assert not on_gpu.mapped and on_gpu.bytes == planned.weight_bytes + 1600 * PER_TOKEN
    with pytest.raises(InvalidParameter, match="format: cannot be changed"):
        plan(path, format="q4")


def test_a_classifier_has_no_cache(talker, tmp_path):
    planned = plan(judge(talker, tmp_path), format="q8")
    assert planned.labels == ("sad", "glad")
    assert (planned.cache_tokens, planned.bytes) == (0, planned.weight_bytes)
    classifier = Classifier.from_plan(planned)
    assert classifier.labels == planned.labels and nbytes(classifier.loaded.model) == planned.bytes
    assert sum(classifier.classify(["a king"])[0].values()) == pytest.approx(1)
    with pytest.raises(InvalidRequest, match="holds a classifier"):
        LLM.from_plan(planned, "judge")


def test_a_model_is_loaded_as_planned_although_memory_changed(talker, monkeypatch):
    free_memory(monkeypatch, 1 << 40)
    planned = plan(talker, context=100)
    free_memory(monkeypatch, 0)
    with LLM.from_plan(planned, "talker") as llm:
        assert llm.engine._runner.cache.keys[0].shape[:2] == (100, 16)


def test_a_checkpoint_that_changed_after_it_was_planned_is_refused(talker, tmp_path):
    path = Path(shutil.copytree(talker, tmp_path / "model"))
    planned = plan(path)
    shutil.rmtree(path)
    transformers_model("Mixtral", {"vocab_size": 32000}).save_pretrained(path)
    with pytest.raises(CheckpointError):
        loading.load_model(planned)


def test_the_same_spec_with_other_sizes(talker):
    planned = plan(talker)
    again = plan_spec(planned.spec, LoadOptions(context=50, cache_tokens=60))
    assert again == plan(talker, context=50, cache_tokens=60)
    assert (again.context, again.cache_tokens, planned.max_length) == (50, 64, 4096)


REFUSED: list[dict[str, Any]] = [
    {"dtype": "int3"},
    {"format": "q5"},
    {"device": "toaster"},
    {"kv_cache_dtype": "int4"},
    {"block_size": 0},
    {"cache_tokens": 0},
    {"context": 1},
    {"context": 10**6},
]


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_invalid_options_are_refused(talker, options):
    [name] = options
    with pytest.raises(InvalidParameter, match=f"^{name}: "):
        plan(talker, **options)


def test_what_cannot_be_loaded_cannot_be_planned(talker, tmp_path):
    with pytest.raises(NotFound, match="moesaic pull"):
        plan(tmp_path / "nowhere")
    shutil.copytree(talker, tmp_path / "damaged")
    config = json.loads((talker / "config.json").read_text())
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    with pytest.raises(CheckpointError):
        plan(tmp_path / "damaged")
    with pytest.raises(InvalidParameter, match="--requantize"):
        plan(grouped_file(talker, tmp_path), format="q4")


def test_no_weights_are_read(talker, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.checkpoints.Checkpoint.read", None)
    writers: list[Callable[[Path, Path], Path]] = [same, grouped_file, gptq_folder]
    assert all(plan(write(talker, tmp_path)).weight_bytes for write in writers)
