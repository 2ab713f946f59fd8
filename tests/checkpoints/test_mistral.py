"""Mistral's layout in all forms that Mistral distributed; the files are written with torch and safetensors alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from moesaic import checkpoints
from moesaic.errors import CheckpointError, ConfigError

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 4,
    "hidden_dim": 48,
    "n_heads": 8,
    "n_kv_heads": 2,
    "norm_eps": 1e-05,
    "vocab_size": 96,
}
MOE = {**PARAMS, "moe": {"num_experts": 4, "num_experts_per_tok": 2}}


def interleaved(rows: torch.Tensor, head_dim: int = 4) -> torch.Tensor:
    """Return query or key rows in interleaved order, in which Mistral stores them."""
    out = torch.empty_like(rows)
    for row in range(len(rows)):
        head, offset = divmod(row, head_dim)
        half, pair = divmod(offset, head_dim // 2)
        out[head * head_dim + 2 * pair + half] = rows[row]
    return out


def originals(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights under Mistral's names."""
    words = {
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "model.": "",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe": "feed_forward",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    tensors = {}
    for name, tensor in weights.items():
        rotary = "q_proj" in name or "k_proj" in name
        for old, new in words.items():
            name = name.replace(old, new)
        tensors[name] = interleaved(tensor) if rotary else tensor.clone()
    return tensors


def torrent(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as in the first Mixtral torrent: experts fused, w2 of each transposed."""
    fused = {n.replace("feed_forward", "block_sparse_moe"): t for n, t in tensors.items() if ".experts." not in n}
    for layer in range(2):
        for number in ("w1", "w2", "w3"):
            parts = [tensors[f"layers.{layer}.feed_forward.experts.{e}.{number}.weight"] for e in range(4)]
            fused[f"layers.{layer}.block_sparse_moe.{number}"] = torch.cat(
                [p.T if number == "w2" else p for p in parts]
            )
    return fused


@pytest.fixture
def folder(tmp_path):
    def make(params: dict, **files: dict[str, torch.Tensor]):
        (tmp_path / "params.json").write_text(json.dumps(params))
        for name, tensors in files.items():
            file = tmp_path / name.replace("__", ".")
            save_file(tensors, file) if name.endswith("safetensors") else torch.save(tensors, file)
        return tmp_path

    return make


def read(tiny, path, weights, index=()):
    out = {}
    with checkpoints.open_checkpoint(path) as checkpoint:
        assert checkpoint.layout == "mistral"
        checkpoints.load_weights(tiny.slots(weights, out, index), checkpoint)
        return out, dict(checkpoint.config)


def test_dense_model_in_one_torch_file(tiny, folder):
    weights = tiny.truth(tiny.build("mistral", num_key_value_heads=2))
    path = folder({**PARAMS, "sliding_window": 16}, consolidated__00__pth=originals(weights))
    got, config = read(tiny, path, weights)
    tiny.same(got, weights)
    assert config["model_type"] == "mistral" and config["sliding_window"] == 16
    assert config["rope_theta"] == 10_000.0  # the default of a model with a window
    assert (config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"]) == (32, 48, 2)
    assert config["max_position_embeddings"] == 32768 and config["dtype"] == "float32"


def test_mixtral_in_safetensors(tiny, folder):
    weights = tiny.truth(tiny.build(num_key_value_heads=2).bfloat16())
    path = folder(MOE, consolidated__safetensors=originals(weights))
    got, config = read(tiny, path, weights)
    tiny.same(got, weights)
    assert config["model_type"] == "mixtral" and config["rope_theta"] == 1e6 and config["sliding_window"] is None
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    with checkpoints.open_checkpoint(path) as checkpoint:  # the second of two ranks
        for name, weight in weights.items():
            half = (slice(weight.shape[0] // 2, weight.shape[0]),)
            assert torch.equal(checkpoint.read(name, half), weight[half]), name


@pytest.mark.parametrize("fused", [False, True])
def test_mixtral_torrents_with_either_vocabulary(tiny, folder, fused):
    weights = tiny.truth(tiny.build(num_key_value_heads=2))
    tensors = originals(weights)
    params: dict[str, object] = MOE
    if fused:
        tensors = torrent(tensors)
        params = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": "4096",
            "rope_theta": 1e6,
        }
    names = list(tensors)
    path = folder(
        params,
        consolidated__00__pt={name: tensors[name] for name in names[::2]},
        consolidated__01__pt={name: tensors[name] for name in names[1::2]},
    )
    got, config = read(tiny, path, weights)
    tiny.same(got, weights)
    assert config["hidden_size"] == 32 and config["num_local_experts"] == 4
    assert config["sliding_window"] == (4096 if fused else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mystery": 1}, "the key 'mystery' is unknown"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared": 1}}, "the key 'shared'"),
        ({"moe": {"num_experts": 4}}, "both num_experts and num_experts_per_tok"),
        ({"causal": False}, "causal is False"),
        ({"n_heads": 0}, "n_heads is 0, expected a positive integer"),
        ({"norm_eps": "small"}, "norm_eps is 'small', expected a positive number"),
        ({"vocab_size": None}, "has no 'vocab_size'"),
    ],
)
def test_unknown_params_are_refused(folder, change, message):
    path = folder({**PARAMS, **change}, consolidated__safetensors={"norm.weight": torch.ones(32)})
    with pytest.raises(ConfigError, match=message):
        checkpoints.open_checkpoint(path)


def test_missing_or_misshapen_tensor_is_refused(tiny, folder):
    tensors = originals(tiny.truth(tiny.build("mistral", num_key_value_heads=2)))
    del tensors["layers.1.ffn_norm.weight"]
    path = folder(PARAMS, consolidated__safetensors=tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn_norm\.weight is missing: params\.json requires it"):
        checkpoints.open_checkpoint(path)
    tensors["layers.1.ffn_norm.weight"] = torch.ones(32)
    tensors["layers.0.attention.wk.weight"] = torch.ones(12, 32)
    save_file(tensors, path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"wk\.weight has the wrong shape: expected \[8, 32\], found \[12, 32\]"):
        checkpoints.open_checkpoint(path)


def test_tensor_in_two_files_is_refused(folder):
    path = folder(PARAMS, consolidated__00__pt={"a": torch.ones(1)}, consolidated__01__pt={"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"01\.pt: a is also in consolidated\.00\.pt"):
        checkpoints.open_checkpoint(path)


def test_hugging_face_layout_is_preferred(tiny, folder, tmp_path):
    tiny.build().save_pretrained(tmp_path)
    path = folder(MOE, consolidated__safetensors={"norm.weight": torch.ones(32)})
    with checkpoints.open_checkpoint(path) as checkpoint:
        assert checkpoint.layout == "hf"
