"""Meta's layout, split over ranks as by fairscale; the test files are written with torch alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from moesaic import checkpoints
from moesaic.checkpoints import meta
from moesaic.errors import CheckpointError, ConfigError

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "vocab_size": 96,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
FEED_FORWARD = 16 * math.ceil(int(1.3 * int(8 * 32 / 3)) / 16)


@pytest.fixture
def llama(tiny):
    return tiny.truth(tiny.build("llama", intermediate_size=FEED_FORWARD).bfloat16())


def split(weights, shards: int, *, old_embedding: bool = False) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of each rank, under Meta's names."""
    words = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    words |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    words |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    words |= {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": ""}
    words |= {"self_attn": "attention", "mlp": "feed_forward"}
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in weights.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.view(8, 2, 2, 32).transpose(1, 2).reshape(32, 32)
        if tensor.dim() == 1:
            parts = [tensor] * shards
        elif "o_proj" in name or "down_proj" in name or (old_embedding and "embed" in name):
            parts = list(tensor.chunk(shards, 1))
        else:
            parts = list(tensor.chunk(shards, 0))
        for old, new in words.items():
            name = name.replace(old, new)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone()
    return ranks


def put(path, ranks, params=PARAMS, stem="consolidated"):
    (path / "params.json").write_text(json.dumps(params))
    for index, rank in enumerate(ranks):
        torch.save(rank, path / f"{stem}.{index:02d}.pth")
    return path


def read(tiny, path, weights):
    out = {}
    with checkpoints.open_checkpoint(path) as checkpoint:
        assert checkpoint.layout == "meta"
        checkpoints.load_weights(tiny.slots(weights, out), checkpoint)
        return out, dict(checkpoint.config)


@pytest.mark.parametrize(("shards", "old"), [(1, False), (2, True), (8, False)])
def test_any_number_of_ranks_is_read(tiny, llama, tmp_path, shards, old):
    got, config = read(tiny, put(tmp_path, split(llama, shards, old_embedding=old)), llama)
    tiny.same(got, llama)
    assert config["model_type"] == "llama" and config["intermediate_size"] == FEED_FORWARD
    assert config["rope_scaling"]["factor"] == 8.0 and config["max_position_embeddings"] == 131072


def test_parts_are_read_across_ranks(tiny, llama, tmp_path):
    with checkpoints.open_checkpoint(put(tmp_path, split(llama, 4))) as checkpoint:
        for name, weight in llama.items():
            part = tuple(slice(size // 8 * 3, size // 8 * 7) for size in weight.shape)
            assert torch.equal(checkpoint.read(name, part), weight[part]), name


def test_llama_2_vocabulary_comes_from_the_embedding(tiny, llama, tmp_path):
    params = {"dim": 32, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-6, "vocab_size": -1}
    params |= {"multiple_of": 16, "ffn_dim_multiplier": 1.3}
    ranks = split(llama, 2)
    for rank in ranks:
        rank["rope.freqs"] = torch.ones(2)
    got, config = read(tiny, put(tmp_path, ranks, params), llama)
    tiny.same(got, llama)
    assert config["vocab_size"] == 96 and config["rope_theta"] == 10_000.0 and "rope_scaling" not in config
    assert config["num_key_value_heads"] == 8 and config["max_position_embeddings"] == 4096


def test_merged_files_are_read(tiny, llama, tmp_path):
    put(tmp_path, split(llama, 4), stem="merged.4GPUs")
    put(tmp_path, split(llama, 2), stem="merged.2GPUs")
    tiny.same(read(tiny, tmp_path, llama)[0], llama)
    (tmp_path / "merged.2GPUs.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"merged\.2GPUs\.01\.pth: is missing"):
        checkpoints.open_checkpoint(tmp_path)


def test_ranks_of_different_checkpoints_are_refused(llama, tmp_path):
    ranks = split(llama, 4)
    put(tmp_path, ranks)
    torch.save(split(llama, 2)[0], tmp_path / "consolidated.03.pth")
    with pytest.raises(
        CheckpointError, match=r"03\.pth: .*wrong shape: expected .* as in consolidated\.00\.pth, found"
    ):
        checkpoints.open_checkpoint(tmp_path)
    incomplete = {name: tensor for name, tensor in ranks[3].items() if name != "output.weight"}
    torch.save(incomplete, tmp_path / "consolidated.03.pth")
    with pytest.raises(CheckpointError, match=r"03\.pth: output\.weight is missing, although it is in consolidated"):
        checkpoints.open_checkpoint(tmp_path)
    torch.save({**ranks[3], "norm.weight": torch.zeros(32).bfloat16()}, tmp_path / "consolidated.03.pth")
    with (
        checkpoints.open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"03\.pth: norm\.weight differs from the copy in consolidated\.00"),
    ):
        checkpoint.read("model.norm.weight")
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match=r"02\.pth: is missing"):
        checkpoints.open_checkpoint(tmp_path)


def test_unknown_params_are_refused(tmp_path):
    def refuse(match: str, **change: object) -> None:
        (tmp_path / "params.json").write_text(json.dumps({**PARAMS, **change}))
        with pytest.raises(ConfigError, match=match):
            checkpoints.open_checkpoint(tmp_path)

    torch.save({"norm.weight": torch.ones(32)}, tmp_path / "consolidated.00.pth")
    refuse("the key 'vision_chunk_size' is unknown", vision_chunk_size=448)
    refuse("use_scaled_rope is 1, expected true or false", use_scaled_rope=1)
    refuse("dim is '32.5'", dim="32.5")
    refuse("vocab_size is 0", vocab_size=0)


@pytest.mark.parametrize(
    ("hidden", "multiple", "factor", "size"),
    [  # the published numbers of Llama 2 7B, 13B, 70B, Llama 3 8B, 70B, 3.1 405B, 3.2 1B, 3B
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
        (16384, 4096, 1.2, 53248),
        (2048, 256, 1.5, 8192),
        (3072, 256, 1.0, 8192),
    ],
)
def test_feed_forward_size_follows_metas_formula(hidden, multiple, factor, size):
    assert meta._feed_forward_size(hidden, multiple, factor) == size
    keys = meta._feed_forward_keys(hidden, size)
    assert meta._feed_forward_size(hidden, keys["multiple_of"], keys.get("ffn_dim_multiplier")) == size


def test_every_feed_forward_size_can_be_written():
    for hidden in (1, 2, 7, 64, 4096):
        for size in (*range(1, 70), 999, 14336, 100_003):
            keys = meta._feed_forward_keys(hidden, size)
            assert meta._feed_forward_size(hidden, keys["multiple_of"], keys.get("ffn_dim_multiplier")) == size


def test_small_llama_3_2_is_recognized_by_size():
    for hidden, layers, factor in ((2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8.0)):
        fields = meta.Fields({**PARAMS, "dim": hidden, "n_layers": layers}, path := Path("params.json"))
        decoder = meta._decoder_config(fields)
        assert decoder.scaling is not None and decoder.scaling.factor == factor
        assert meta._params(decoder, path)["rope_scaling_factor"] == factor
