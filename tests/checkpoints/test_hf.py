"""Hugging Face's layout against what transformers itself writes."""

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
    """A copy that may be damaged."""
    return shutil.copytree(mixtral, tmp_path / "copy")


def read(tiny, path, weights):
    out = {}
    with checkpoints.open(path) as checkpoint:
        checkpoints.fill(tiny.slots(weights, out), checkpoint)
    return out


def home(path, name):
    """Return the file that the index gives for a tensor."""
    return path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][name]


@pytest.mark.parametrize("kind", ["mixtral", "mistral", "llama"])
@pytest.mark.parametrize("shard", ["40KB", "1GB"])
def test_reads_what_transformers_writes(tiny, tmp_path, kind, shard):
    model = tiny.build(kind).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    weights = tiny.truth(model)
    tiny.same(read(tiny, tmp_path, weights), weights)
    with checkpoints.open(tmp_path) as checkpoint:
        assert checkpoint.layout == "hf"
        assert checkpoint.config["model_type"] == kind
        assert checkpoint.generation["eos_token_id"] == 2


def test_reads_stacked_experts_and_newer_expert_names(tiny, tmp_path):
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
def test_reads_only_the_part_that_is_asked_for(tiny, tmp_path, stacked):
    model = tiny.build()
    weights = tiny.truth(model)
    model.config.save_pretrained(tmp_path)
    stored = model.state_dict() if stacked else {name: weight.contiguous() for name, weight in weights.items()}
    save_file(stored, tmp_path / "model.safetensors")
    with checkpoints.open(tmp_path) as checkpoint:
        for name, weight in weights.items():
            part = tuple(slice(size // 4, size // 2) for size in weight.shape)
            assert torch.equal(checkpoint.read(name, part), weight[part]), name
            assert torch.equal(checkpoint.read(name, part[:1]), weight[part[:1]]), name


def test_progress_counts_every_byte_once(tiny, mixtral):
    weights, seen = tiny.truth(tiny.build()), []
    with checkpoints.open(mixtral) as checkpoint:
        checkpoints.fill(tiny.slots(weights, {}), checkpoint, progress=lambda done, total: seen.append((done, total)))
    total = sum(weight.nbytes for weight in weights.values())
    assert seen[-1] == (total, total) and len(seen) == len(weights)
    assert seen == sorted(seen)


def test_a_missing_tensor_is_named_before_anything_is_stored(tiny, mixtral):
    weights, out = tiny.truth(tiny.build()), {}
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(32)
    with (
        checkpoints.open(mixtral) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.2\.input_layernorm\.weight is missing: expected shape \[32\]"),
    ):
        checkpoints.fill(tiny.slots(weights, out), checkpoint)
    assert not out


def test_a_surplus_tensor_is_named_with_its_file(tiny, mixtral):
    weights, out = tiny.truth(tiny.build()), {}
    del weights["model.norm.weight"]
    file = home(mixtral, "model.norm.weight").name
    with (
        checkpoints.open(mixtral) as checkpoint,
        pytest.raises(CheckpointError, match=rf"{file}: model\.norm\.weight is surplus.*found shape \[32\]"),
    ):
        checkpoints.fill(tiny.slots(weights, out), checkpoint)
    assert not out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda w: w[:-1].contiguous(), r"wrong shape: expected \[32, 32\], found \[31, 32\]"),
        (lambda w: w.to(torch.int8), "wrong dtype: expected .*float32.*, found int8"),
        (lambda w: w.to(torch.float8_e4m3fn), "wrong dtype.* found float8_e4m3fn"),
    ],
)
def test_shape_and_dtype_are_compared_before_anything_is_stored(tiny, folder, changed, message):
    name = "model.layers.1.self_attn.o_proj.weight"
    file, out = home(folder, name), {}
    tensors = load_file(file)
    save_file({**tensors, name: changed(tensors[name])}, file)
    with (
        checkpoints.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=f"{file.name}: {name}.*{message}"),
    ):
        checkpoints.fill(tiny.slots(tiny.truth(tiny.build()), out), checkpoint)
    assert not out


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "inf")])
def test_nan_and_infinity_are_refused(tiny, folder, bad, word):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    file = home(folder, name)
    tensors = load_file(file)
    tensors[name][1, 3] = bad
    save_file(tensors, file)
    with checkpoints.open(folder) as checkpoint, pytest.raises(CheckpointError, match=f"{name} holds {word}"):
        checkpoints.fill(tiny.slots(tiny.truth(tiny.build()), {}), checkpoint)


def test_a_head_tied_to_the_embedding_is_surplus_only_if_it_differs(tiny, tmp_path):
    model = tiny.build("llama", tie_word_embeddings=True)
    weights = tiny.truth(model)
    del weights["lm_head.weight"]
    model.config.save_pretrained(tmp_path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors")
    tiny.same(read(tiny, tmp_path, weights), weights)
    head[5, 5] += 1
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is surplus"):
        read(tiny, tmp_path, weights)


def test_frequency_tables_of_older_writers_are_passed_over(tiny, tmp_path):
    model = tiny.build("llama")
    weights = tiny.truth(model)
    model.config.save_pretrained(tmp_path)
    save_file(
        {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    tiny.same(read(tiny, tmp_path, weights), weights)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_file_that_is_cut_short_is_named(folder, keep):
    file = home(folder, "model.norm.weight")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file.name}: cut short"):
        checkpoints.open(folder)


def test_a_missing_shard_is_named(folder):
    file = home(folder, "model.norm.weight")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name}: cannot be read: No such file"):
        checkpoints.open(folder)


def test_index_and_files_must_agree(folder):
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    places = said["weight_map"]
    with_extra = {**places, "model.extra.weight": next(iter(places.values()))}
    index.write_text(json.dumps({"weight_map": with_extra}))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight is missing: .*index\.json says"):
        checkpoints.open(folder)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in places.items() if n != "model.norm.weight"}}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is surplus"):
        checkpoints.open(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", "", 3])
def test_an_index_may_not_point_outside_its_folder(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="which is not a plain"):
        checkpoints.open(folder)


def test_config_is_asked_for_by_name(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: does not hold a JSON object"):
        checkpoints.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: is missing"):
        checkpoints.open(folder)


def test_what_is_no_checkpoint_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(NotFound, match="no such folder"):
        checkpoints.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"Looked for hf: model\.safetensors"):
        checkpoints.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="give the folder"):
        checkpoints.open(tmp_path / "file")
