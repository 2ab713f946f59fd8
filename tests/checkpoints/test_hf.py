"""Hugging Face's layout, compared with files that transformers writes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import checkpoints
from moesaic.errors import CheckpointError, ConfigError, NotFound


@pytest.fixture
def folder(mixtral, tmp_path):
    """A copy of the checkpoint, for a test to damage."""
    return shutil.copytree(mixtral, tmp_path / "copy")


def read(tiny, path, weights):
    out = {}
    with checkpoints.open_checkpoint(path) as checkpoint:
        checkpoints.load_weights(tiny.slots(weights, out), checkpoint)
    return out


def file_of(path, name):
    """Return the file that the index lists for a tensor."""
    return path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][name]


@pytest.mark.parametrize("kind", ["mixtral", "mistral", "llama"])
@pytest.mark.parametrize("shard", ["40KB", "1GB"])
def test_checkpoint_of_transformers_is_read(tiny, tmp_path, kind, shard):
    model = tiny.build(kind).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    weights = tiny.truth(model)
    tiny.same(read(tiny, tmp_path, weights), weights)
    with checkpoints.open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layout == "hf"
        assert checkpoint.config["model_type"] == kind
        assert checkpoint.generation["eos_token_id"] == 2


def test_stacked_experts_and_newer_names_are_read(tiny, tmp_path):
    model = tiny.build()
    weights = tiny.truth(model)
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tiny.same(read(tiny, tmp_path, weights), weights)
    numbers = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for scheme in ("mlp", "block_sparse_moe"):
        named = {}
        for name, weight in weights.items():
            for old, new in numbers.items():
                if f".{old}." in name:
                    name = name.replace(old, new).replace("block_sparse_moe", scheme)
            named[name] = weight.contiguous()
        save_file(named, tmp_path / "model.safetensors")
        tiny.same(read(tiny, tmp_path, weights), weights)


@pytest.mark.parametrize("stacked", [False, True])
def test_parts_of_tensors_are_read(tiny, tmp_path, stacked):
    model = tiny.build()
    weights = tiny.truth(model)
    model.config.save_pretrained(tmp_path)
    stored = model.state_dict() if stacked else {name: weight.contiguous() for name, weight in weights.items()}
    save_file(stored, tmp_path / "model.safetensors")
    with checkpoints.open_checkpoint(tmp_path) as checkpoint:
        for name, weight in weights.items():
            part = tuple(slice(size // 4, size // 2) for size in weight.shape)
            assert torch.equal(checkpoint.read(name, part), weight[part]), name
            assert torch.equal(checkpoint.read(name, part[:1]), weight[part[:1]]), name


def test_progress_counts_every_byte_once(tiny, mixtral):
    weights, calls = tiny.truth(tiny.build()), []
    with checkpoints.open_checkpoint(mixtral) as checkpoint:
        checkpoints.load_weights(
            tiny.slots(weights, {}), checkpoint, progress=lambda done, total: calls.append((done, total))
        )
    total = sum(weight.nbytes for weight in weights.values())
    assert calls[-1] == (total, total) and len(calls) == len(weights)
    assert calls == sorted(calls)


def test_missing_tensor_is_found_before_storing(tiny, mixtral):
    weights, out = tiny.truth(tiny.build()), {}
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(32)
    with (
        checkpoints.open_checkpoint(mixtral) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.2\.input_layernorm\.weight is missing: expected shape \[32\]"),
    ):
        checkpoints.load_weights(tiny.slots(weights, out), checkpoint)
    assert not out


def test_unexpected_tensor_is_named_with_its_file(tiny, mixtral):
    weights, out = tiny.truth(tiny.build()), {}
    del weights["model.norm.weight"]
    file = file_of(mixtral, "model.norm.weight").name
    with (
        checkpoints.open_checkpoint(mixtral) as checkpoint,
        pytest.raises(CheckpointError, match=rf"{file}: model\.norm\.weight is unexpected.*found shape \[32\]"),
    ):
        checkpoints.load_weights(tiny.slots(weights, out), checkpoint)
    assert not out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda w: w[:-1].contiguous(), r"wrong shape: expected \[32, 32\], found \[31, 32\]"),
        (lambda w: w.to(torch.int8), "wrong dtype: expected .*float32.*, found int8"),
        (lambda w: w.to(torch.float8_e4m3fn), "wrong dtype.* found float8_e4m3fn"),
    ],
)
def test_shape_and_dtype_are_checked_before_storing(tiny, folder, changed, message):
    name = "model.layers.1.self_attn.o_proj.weight"
    file, out = file_of(folder, name), {}
    tensors = load_file(file)
    save_file({**tensors, name: changed(tensors[name])}, file)
    with (
        checkpoints.open_checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=f"{file.name}: {name}.*{message}"),
    ):
        checkpoints.load_weights(tiny.slots(tiny.truth(tiny.build()), out), checkpoint)
    assert not out


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "inf")])
def test_nan_and_infinity_are_refused(tiny, folder, bad, word):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    file = file_of(folder, name)
    tensors = load_file(file)
    tensors[name][1, 3] = bad
    save_file(tensors, file)
    with (
        checkpoints.open_checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=f"{name} holds {word}"),
    ):
        checkpoints.load_weights(tiny.slots(tiny.truth(tiny.build()), {}), checkpoint)


def test_tied_head_is_unexpected_only_if_it_differs(tiny, tmp_path):
    model = tiny.build("llama", tie_word_embeddings=True)
    weights = tiny.truth(model)
    del weights["lm_head.weight"]
    model.config.save_pretrained(tmp_path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors")
    tiny.same(read(tiny, tmp_path, weights), weights)
    head[5, 5] += 1
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is unexpected"):
        read(tiny, tmp_path, weights)


def test_frequency_tables_are_ignored(tiny, tmp_path):
    model = tiny.build("llama")
    weights = tiny.truth(model)
    model.config.save_pretrained(tmp_path)
    save_file(
        {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    tiny.same(read(tiny, tmp_path, weights), weights)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_truncated_file_is_named(folder, keep):
    file = file_of(folder, "model.norm.weight")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file.name}: truncated"):
        checkpoints.open_checkpoint(folder)


def test_missing_shard_is_named(folder):
    file = file_of(folder, "model.norm.weight")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name}: cannot be read: No such file"):
        checkpoints.open_checkpoint(folder)


def test_index_and_files_must_agree(folder):
    index = folder / "model.safetensors.index.json"
    file_names = json.loads(index.read_text())["weight_map"]
    with_extra = {**file_names, "model.extra.weight": next(iter(file_names.values()))}
    index.write_text(json.dumps({"weight_map": with_extra}))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight is missing: .*index\.json lists"):
        checkpoints.open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in file_names.items() if n != "model.norm.weight"}}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is unexpected"):
        checkpoints.open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", "", 3])
def test_index_cannot_name_files_outside_its_folder(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="which is not a plain"):
        checkpoints.open_checkpoint(folder)


def test_bad_or_missing_config_is_named(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: does not hold a JSON object"):
        checkpoints.open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: is missing"):
        checkpoints.open_checkpoint(folder)


def test_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(NotFound, match="no such folder"):
        checkpoints.open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"Looked for hf: model\.safetensors"):
        checkpoints.open_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="give the folder"):
        checkpoints.open_checkpoint(tmp_path / "file")
