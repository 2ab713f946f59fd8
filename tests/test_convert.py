"""Conversion between layouts and shard counts preserves every bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic import checkpoints, formats, models
from moesaic.convert import convert
from moesaic.errors import CheckpointError, ConfigError, InvalidParameter, NotFound
from moesaic.ops import Batch, Group
from tests.support.models import RANKS

transformers.utils.logging.disable_progress_bar()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny(kind: str, path: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Write a tiny random model with transformers, and a tokenizer file next to it."""
    torch.manual_seed(3)
    sizes = {
        **RANKS,
        "eos_token_id": [2, 3],
        **changes,
    }
    config, model = {
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[kind]
    model(config(**sizes)).to(dtype).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(b"pieces")
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    with checkpoints.open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return tiny("mixtral", tmp_path_factory.mktemp("mixtral"), torch.bfloat16, num_local_experts=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("llama"), torch.bfloat16, rope_parameters=LLAMA3_ROPE)


SLOW = pytest.mark.slow
"""Marks repeated cases in Meta's layout: a child process that imports torch reads each of its checkpoints."""


@pytest.mark.parametrize(
    ("to", "shards"),
    [
        *(("hf", shards) for shards in (1, 2, 4, 8)),
        *(("mistral", shards) for shards in (1, 2, 4, 8)),
        *(pytest.param("meta", shards, marks=[SLOW] * (shards in (2, 4))) for shards in (1, 2, 4, 8)),
    ],
)
def test_every_layout_and_shard_count_keeps_every_bit(mixtral, tmp_path, to, shards):
    seen = []
    convert(mixtral, tmp_path / "target", to, shards, lambda done, total: seen.append((done, total)))
    expected = weights(mixtral)
    with checkpoints.open_checkpoint(tmp_path / "target") as checkpoint:
        assert checkpoint.layout == to
        same({name: checkpoint.read(name).clone() for name in checkpoint.tensors}, expected)
    total = sum(tensor.nbytes for tensor in expected.values())
    assert seen[-1] == (total, total)
    suffix = "*.pth" if to == "meta" else "*.safetensors"
    assert len(list((tmp_path / "target").glob(suffix))) == shards
    assert (tmp_path / "target" / "tokenizer.model").read_bytes() == b"pieces"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_round_trip_through_every_layout_is_lossless(mixtral, tmp_path):
    steps = [("meta", 4), ("mistral", 3), ("meta", 8), ("hf", 5)]
    latest = mixtral
    for number, (to, shards) in enumerate(steps):
        convert(latest, tmp_path / str(number), to, shards)
        latest = tmp_path / str(number)
    same(weights(latest), weights(mixtral))
    with checkpoints.open_checkpoint(latest) as result, checkpoints.open_checkpoint(mixtral) as original:
        assert result.generation["eos_token_id"] == [2, 3]
        for key in ("num_local_experts", "num_experts_per_tok", "rms_norm_eps", "hidden_size", "intermediate_size"):
            assert result.config[key] == original.config[key], key
        assert result.config["rope_theta"] == original.config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *((kind, "mistral") for kind in ("mixtral", "mistral", "llama")),
        *(("mixtral", "meta"), ("llama", "meta"), pytest.param("mistral", "meta", marks=SLOW)),
    ],
)
def test_transformers_computes_the_same_after_a_round_trip(tmp_path, kind, to):
    """A wrong configuration or rotary order would change the logits."""
    changes: dict[str, object] = {"head_dim": 6, "num_key_value_heads": 2}
    if kind == "mistral":
        changes["sliding_window"] = 5
    if kind == "llama" and to == "meta":
        changes["rope_parameters"] = LLAMA3_ROPE
    source = tiny(kind, tmp_path / "source", **changes)
    convert(source, tmp_path / "target", to, 2)
    convert(tmp_path / "target", tmp_path / "back", "hf")
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        logits = [transformers.AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (source, tmp_path / "back")]
    assert torch.equal(*logits)


def test_rotary_rows_are_interleaved_in_metas_files(llama, tmp_path):
    """Row 2i + j of a head in Meta's file is row i + j * D / 2 of Hugging Face's."""
    convert(llama, tmp_path / "meta", "meta")
    stored = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    for original, classic in (("wq", "q_proj"), ("wk", "k_proj")):
        rows = weights(llama)[f"model.layers.1.self_attn.{classic}.weight"]
        for head in range(8):
            for pair in range(2):
                for half in range(2):
                    row = stored[f"layers.1.attention.{original}.weight"][head * 4 + 2 * pair + half]
                    assert torch.equal(row, rows[head * 4 + pair + half * 2])


def test_llama3_rope_scaling_survives_the_meta_layout(llama, tmp_path):
    convert(llama, tmp_path / "meta", "meta", 2)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == LLAMA3_ROPE


def test_the_mistral_layout_rejects_rope_scaling(llama, tmp_path):
    with pytest.raises(ConfigError, match="rope scaling cannot be written in the mistral layout"):
        convert(llama, tmp_path / "target", "mistral")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "the key 'attention_bias'"),
        ({"some_new_trick": 3}, "the key 'some_new_trick'"),
        ({"model_type": "qwen3"}, "model_type 'qwen3'"),
    ],
)
@pytest.mark.parametrize("to", ["mistral", "meta"])
def test_settings_that_a_layout_cannot_express_are_rejected(llama, tmp_path, change, message, to):
    source = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0, **change}))
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "target", to)
    assert not (tmp_path / "target").exists()


def test_shards_must_divide_the_weights(mixtral, tmp_path):
    with pytest.raises(InvalidParameter, match=r"shards: is 3, .* divide by 1, 2, 4, 8"):
        convert(mixtral, tmp_path / "target", "meta", 3)
    with pytest.raises(InvalidParameter, match="shards: is 0"):
        convert(mixtral, tmp_path / "target", "hf", 0)
    with pytest.raises(InvalidParameter, match="must be 1 to 41"):
        convert(mixtral, tmp_path / "target", "hf", 42)
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_is_copied_if_the_layout_cannot_tie(tmp_path):
    source = tiny("llama", tmp_path / "source", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights(source)
    for to in ("mistral", "meta"):
        convert(source, tmp_path / to, to)
        result = weights(tmp_path / to)
        assert torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])
        with checkpoints.open_checkpoint(tmp_path / to) as checkpoint:
            assert checkpoint.config["tie_word_embeddings"] is False
    convert(source, tmp_path / "hf", "hf", 2)
    same(weights(tmp_path / "hf"), weights(source))


def test_a_target_that_is_not_empty_is_left_unchanged(mixtral, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "letter").write_text("dear")
    with pytest.raises(InvalidParameter, match=r"dst: .*exists already"):
        convert(mixtral, tmp_path / "target", "hf")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["letter"]
    with pytest.raises(InvalidParameter, match="is inside the source"):
        convert(mixtral, mixtral / "inside", "hf")


def test_an_interrupted_write_leaves_nothing(mixtral, tmp_path):
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for to in ("hf", "mistral", "meta"):
        with pytest.raises(KeyboardInterrupt):
            convert(mixtral, tmp_path / "target", to, 2, stop)
        assert list(tmp_path.iterdir()) == []


def test_an_unwritable_target_raises(mixtral, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written: Not a directory"):
        convert(mixtral, tmp_path / "file" / "target", "hf")


def test_an_unknown_layout_raises(mixtral, tmp_path):
    with pytest.raises(NotFound, match=r"available: .*hf"):
        convert(mixtral, tmp_path / "target", "onnx")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_survives_conversion(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["mixtral", "mistral", "llama"]))
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * data.draw(st.integers(1, 3))
    changes: dict[str, object] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": 2 * data.draw(st.integers(1, 3)),
        "hidden_size": heads * data.draw(st.integers(1, 5)),
        "intermediate_size": data.draw(st.integers(1, 20)),
        "vocab_size": data.draw(st.integers(5, 40)),
        "num_hidden_layers": 1,
    }
    if kind == "mixtral":
        changes["num_local_experts"] = data.draw(st.integers(2, 5))
    root = tmp_path_factory.mktemp("shapes")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    source = tiny(kind, root / "source", dtype, **changes)
    convert(source, root / "mistral", "mistral", data.draw(st.integers(1, 4)))
    convert(root / "mistral", root / "hf", "hf", data.draw(st.integers(1, 4)))
    same(weights(root / "mistral"), weights(source))
    same(weights(root / "hf"), weights(source))


@pytest.fixture(scope="module")
def all_layouts(mixtral, tmp_path_factory):
    """Return folders with the same weights in every layout and several numbers of files."""
    root = tmp_path_factory.mktemp("all_layouts")
    folders = [mixtral]
    for to, shards in (("hf", 3), ("mistral", 1), ("mistral", 2), ("meta", 1), ("meta", 8)):
        folders.append(root / f"{to}-{shards}")
        convert(mixtral, folders[-1], to, shards)
    return folders


def logits(path: Path) -> torch.Tensor:
    """Return the logits that Moesaic computes from a checkpoint, [T, V]."""
    with checkpoints.open_checkpoint(path) as checkpoint:
        model = models.build(checkpoint.config, path, formats.load("float32"), dtype=torch.float32)
        checkpoints.load_weights(model.slots(), checkpoint)
    with torch.no_grad():
        return model.logits(model(Batch.whole([range(1, 30)])))


def test_all_layouts_give_the_same_logits(mixtral, all_layouts):
    expected = transformers.AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    with torch.no_grad():
        reference = expected(torch.arange(1, 30)[None]).logits[0]
    first = logits(all_layouts[0])
    assert (first - reference).abs().max() < 1e-4
    for path in all_layouts[1:]:
        assert torch.equal(logits(path), first), path.name


def test_a_rank_reads_only_its_slices(all_layouts):
    """Every layout returns exactly the slices that the slots of a rank name."""
    whole = weights(all_layouts[0])
    for path in (all_layouts[0], all_layouts[3], all_layouts[5]):
        with checkpoints.open_checkpoint(path) as checkpoint:
            for rank in range(2):
                bfloat16 = formats.load("bfloat16")
                model = models.build(checkpoint.config, path, bfloat16, dtype=torch.bfloat16, group=Group(rank, 2))
                for slot in model.slots():
                    tensor = checkpoint.read(slot.name, slot.index)
                    assert torch.equal(tensor, whole[slot.name][slot.index]), slot.name
                checkpoints.load_weights(model.slots(), checkpoint)
