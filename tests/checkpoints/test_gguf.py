"""GGUF files, compared with the ``gguf`` package's decoding and with transformers' models."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from moesaic import checkpoints, ops
from moesaic.checkpoints._gguf_blocks import DECODERS
from moesaic.errors import CheckpointError, ConfigError, InvalidParameter, NotFound
from moesaic.gguf import TYPES
from moesaic.text import template
from moesaic.text.tokenizer import Tokenizer
from tests.support import gguf_files
from tests.support.gguf_files import KINDS, TinyFile, reference
from tests.support.loading import load_model
from tests.support.models import LLAMA31

IDS = [1, 5, 9, 33, 2, 7]


def read(path: Path) -> dict[str, torch.Tensor]:
    with checkpoints.open_checkpoint(path) as checkpoint:
        assert checkpoint.layout == "gguf"
        return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].float(), other[name]) for name in one)


def our_logits(path: Path) -> torch.Tensor:
    decoder = load_model(path, dtype="float32", format="float32").model
    with torch.inference_mode():
        return decoder.logits(decoder(ops.Batch.whole([IDS])))


def close(path: Path, model: torch.nn.Module) -> bool:
    return bool((our_logits(path) - gguf_files.logits(model, IDS)).abs().max() <= 1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_every_block_decodes_as_the_reference_does(kind):
    data = np.random.default_rng(1).integers(0, 256, (96, DECODERS[kind].type.nbytes * 3), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales may be infinite
        expected = dequantize(data, GGMLQuantizationType[kind])
    decoded = DECODERS[kind].decode_rows(torch.from_numpy(data).reshape(96, 3, -1))
    assert np.array_equal(decoded.numpy(), expected, equal_nan=True)


def test_sizes_of_blocks_are_those_of_the_reference():
    for code, kind in TYPES.items():
        theirs = GGMLQuantizationType(code)
        assert (theirs.name, *dequantize.__globals__["GGML_QUANT_SIZES"][theirs]) == tuple(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_of_each_type_equals_the_reference(kind, tmp_path):
    tiny = TinyFile(kind)
    path = tiny.write(tmp_path / "tiny.gguf")
    assert same(read(path), tiny.weights)
    assert close(path, tiny.apply(reference("llama")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixtral_of_each_type_equals_the_reference(kind, tmp_path):
    tiny = TinyFile(kind, experts=3)
    path = tiny.write(tmp_path / "tiny.gguf")
    assert same(read(path), tiny.weights)
    assert close(path, tiny.apply(reference("mixtral", num_local_experts=3, num_experts_per_tok=2)))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("layout", ["split_experts", "merge_experts"])
def test_a_model_keeps_the_codes_of_the_file(kind, layout, tmp_path):
    tiny = TinyFile(kind, experts=3)
    getattr(tiny, layout)()
    path = tiny.write(tmp_path / "tiny.gguf")
    model = load_model(path).model
    block, weights = model.blocks[1], tiny.weights
    for part, name in ((block.mlp.experts.gate, "w1"), (block.mlp.experts.down, "w2"), (block.mlp.experts.up, "w3")):
        assert part.format == DECODERS[kind].format
        expected = [weights[f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"] for e in range(3)]
        assert torch.equal(part.dequantize(), torch.stack(expected))
    assert torch.equal(block.attention.wq.weight.dequantize(), weights["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(model.head.weight.dequantize(), weights["lm_head.weight"])
    with torch.inference_mode():
        kept, exact = model.logits(model(ops.Batch.whole([IDS]))), our_logits(path)
    assert (kept - exact).norm() <= 0.1 * exact.norm()  # activations are rounded to eight bits


def test_experts_of_types_without_a_common_format_are_decoded(tmp_path):
    tiny, other = TinyFile("Q4_0", experts=2), TinyFile("Q5_1", experts=2)
    tiny.split_experts()
    other.split_experts()
    changed = "blk.0.ffn_up.1.weight"
    tiny.tensors[changed] = other.tensors[changed]
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    tiny.weights[name] = other.weights[name]
    model = load_model(tiny.write(tmp_path / "tiny.gguf")).model
    up = model.blocks[0].mlp.experts.up
    assert up.name == "float32" and torch.equal(up.dequantize()[1], tiny.weights[name])
    assert model.blocks[0].mlp.experts.gate.format == DECODERS["Q4_0"].format


def test_quantized_weights_are_rounded_again_only_on_demand(tmp_path):
    path = TinyFile("Q4_0").write(tmp_path / "tiny.gguf")
    with pytest.raises(InvalidParameter, match=r"int4 would round the .* weights of .* a second time"):
        load_model(path, format="int4")
    assert load_model(path, format="int4", requantize=True).model.blocks[0].mlp.up.weight.name == "int4"
    plain = TinyFile("F16").write(tmp_path / "plain.gguf")
    assert load_model(plain, format="int4").model.blocks[0].mlp.up.weight.name == "int4"


def test_float32_weights_of_a_large_file_are_not_rounded(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.checkpoints._decoder.LARGE", 1)
    path = TinyFile("Q4_0").write(tmp_path / "tiny.gguf")
    model = load_model(path, format="float32").model
    assert model.dtype == torch.bfloat16 and model.blocks[0].mlp.up.weight.name == "float32"


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("layout", ["split_experts", "merge_experts"])
def test_all_layouts_of_experts_hold_the_same_weights(kind, layout, tmp_path):
    tiny = TinyFile(kind, experts=3)
    getattr(tiny, layout)()
    assert not any("ffn_gate_exps" in name for name in tiny.tensors)
    assert same(read(tiny.write(tmp_path / "tiny.gguf")), tiny.weights)


@pytest.mark.parametrize("kind", ["BF16", "Q5_1", "Q3_K"])
def test_parts_of_tensors_are_read(kind, tmp_path):
    tiny = TinyFile(kind, experts=2)
    tiny.merge_experts()
    with checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf")) as checkpoint:
        for name, weight in tiny.weights.items():
            for part in ((slice(3, 64),), (slice(1, 90), slice(40, 200)), (slice(5, 5),)):
                part = part[: weight.dim()]
                assert torch.equal(checkpoint.read(name, part).float(), weight[part]), name


def test_an_expert_of_a_stack_is_read_alone(tmp_path, monkeypatch):
    tiny = TinyFile("Q4_0", experts=4)
    decoded = []
    decoder = type(DECODERS["Q4_0"])
    whole = decoder.decode_rows
    monkeypatch.setattr(decoder, "decode_rows", lambda self, rows: (decoded.append(rows.shape), whole(self, rows))[1])
    with checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf")) as checkpoint:
        checkpoint.read("model.layers.1.block_sparse_moe.experts.2.w3.weight", (slice(0, 8),))
    assert [math.prod(shape[:-2]) for shape in decoded] == [8]


def test_a_split_model_opens_by_any_part_and_by_its_folder(tmp_path):
    tiny = TinyFile("Q8_0", experts=2)
    parts = tiny.write_split(tmp_path, 3)
    for path in (*parts, tmp_path):
        assert same(read(path), tiny.weights)
    parts[1].unlink()
    for path in (parts[2], tmp_path):
        with pytest.raises(CheckpointError, match=r"tiny-00002-of-00003\.gguf: is missing: the model has 3 parts"):
            checkpoints.open_checkpoint(path)


def test_the_vocabulary_of_a_split_model_is_in_its_first_part(tmp_path):
    tiny = TinyFile("F16")
    tiny.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.chat_template": "{{ x }}",
    }
    for path in (*tiny.write_split(tmp_path, 2), tmp_path):
        assert Tokenizer.open(path).encode("aba") == [2, 0]
        assert template.load(path) == "{{ x }}"


def test_parts_of_different_models_are_refused(tmp_path):
    parts = TinyFile("F16").write_split(tmp_path, 3)
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match="is not part 3 of 3"):
        checkpoints.open_checkpoint(tmp_path)
    alone = shutil.copy(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="is part of a model of 3 files"):
        checkpoints.open_checkpoint(alone)


def test_a_part_with_fewer_tensors_is_refused(tmp_path):
    tiny = TinyFile("F16")
    parts = tiny.write_split(tmp_path, 2)
    fewer = dict([*tiny.tensors.items()][3::2])
    gguf_files.write(parts[1], {"split.no": np.uint16(1), "split.count": np.uint16(2)}, fewer)
    with pytest.raises(CheckpointError, match="announces 21 tensors, but the parts hold 20"):
        checkpoints.open_checkpoint(tmp_path)


def test_a_folder_with_several_models_names_them(tmp_path):
    for name in ("a.Q4_0.gguf", "b.Q8_0.gguf"):
        TinyFile("Q8_0").write(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several GGUF models: give the path of one of a\.Q4_0\.gguf, b\.Q8_0"):
        checkpoints.open_checkpoint(tmp_path)
    assert read(tmp_path / "b.Q8_0.gguf")


def test_safetensors_come_before_gguf(mixtral, tmp_path):
    folder = shutil.copytree(mixtral, tmp_path / "both")
    TinyFile("Q8_0").write(folder / "tiny.gguf")
    assert checkpoints.detect_layout(folder).__name__.endswith(".hf")
    assert checkpoints.detect_layout(folder / "tiny.gguf").__name__.endswith(".gguf")


def test_a_file_is_known_by_its_first_bytes(tmp_path):
    path = TinyFile("Q8_0").write(tmp_path / "sha256-0123")
    assert read(path)
    (tmp_path / "model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="is a file, but not a GGUF file"):
        checkpoints.open_checkpoint(tmp_path / "model.bin")
    with pytest.raises(NotFound):
        checkpoints.open_checkpoint(tmp_path / "absent.gguf")


def test_a_missing_head_is_the_embedding(tmp_path):
    tiny = TinyFile("Q5_K", tied=True)
    path = tiny.write(tmp_path / "tiny.gguf")
    assert close(path, tiny.apply(reference("llama", tie_word_embeddings=True)))


def test_a_window_makes_it_a_mistral(tmp_path):
    tiny = TinyFile("F32")
    tiny.metadata["llama.attention.sliding_window"] = 3
    path = tiny.write(tmp_path / "tiny.gguf")
    assert load_model(path).config["model_type"] == "mistral"
    assert close(path, tiny.apply(reference("mistral", sliding_window=3)))


@pytest.mark.parametrize(("name", "expected"), [("Mistral 7B Instruct", "mistral"), ("Llama 3", "llama")])
def test_the_name_tells_mistrals_models(name, expected, tmp_path):
    tiny = TinyFile("F16")
    tiny.metadata |= {"general.name": name, "llama.vocab_size": 90}  # the embedding's rows count, not this key
    with checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf")) as checkpoint:
        assert checkpoint.config["model_type"] == expected and checkpoint.config["vocab_size"] == 96
        assert checkpoint.config.get("sliding_window") is None


def test_linear_rope_scaling(tmp_path):
    tiny = TinyFile("F32")
    tiny.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert close(tiny.write(tmp_path / "tiny.gguf"), tiny.apply(reference("llama", rope_parameters=scaled)))


def llama31_factors(theta: float, length: int, factor: float = 8.0, high: float = 4.0) -> np.ndarray:
    """Return the factors that llama.cpp's converter writes for Llama 3.1's scaling."""
    factors = []
    for dimension in range(0, 64, 2):
        wavelength = 2 * math.pi * theta ** (dimension / 64)
        smooth = (length / wavelength - 1.0) / (high - 1.0)
        factors.append(1.0 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("length", [32, 8192])
def test_the_rope_scaling_of_llama_31_is_found_in_its_factors(length, tmp_path):
    tiny = TinyFile("F32")
    tiny.tensors["rope_freqs.weight"] = llama31_factors(5e5, length), "F32"
    tiny.metadata["llama.rope.freq_base"] = 5e5
    path = tiny.write(tmp_path / "tiny.gguf")
    assert load_model(path).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }
    scaling = {**LLAMA31, "original_max_position_embeddings": length}
    assert close(path, tiny.apply(reference("llama", rope_parameters=scaling)))


@pytest.mark.parametrize("change", ["band", "shape", "nan", "negative"])
def test_other_rope_factors_are_refused(change, tmp_path):
    tiny = TinyFile("F32")
    factors = llama31_factors(1e4, 32, high=8.0 if change == "band" else 4.0)
    factors = factors[:-1] if change == "shape" else factors
    factors[3] = {"nan": np.nan, "negative": -8.0}.get(change, factors[3])
    tiny.tensors["rope_freqs.weight"] = factors, "F32"
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
        checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))


def test_the_first_mixtrals_have_no_rope_base(tmp_path):
    for experts, base in ((8, 1e6), (4, 1e4)):
        tiny = TinyFile("Q8_0", experts=experts)
        del tiny.metadata["llama.rope.freq_base"]
        with checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf")) as checkpoint:
            assert checkpoint.config["rope_theta"] == base


@pytest.mark.parametrize(
    ("kind", "dtype"), [("Q4_0", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32")]
)
def test_quantized_weights_load_as_floats_that_hold_them_exactly(kind, dtype, tmp_path, monkeypatch):
    path = TinyFile(kind).write(tmp_path / "tiny.gguf")
    assert load_model(path).model.dtype == getattr(torch, dtype)
    monkeypatch.setattr("moesaic.checkpoints._decoder.LARGE", 1)
    large = {"Q4_0": "bfloat16"}.get(kind, dtype)
    assert load_model(path).model.dtype == getattr(torch, large)
