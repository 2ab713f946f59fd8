"""Checkpoints written as GGUF files: the ``gguf`` package, the reference implementation, finds the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from moesaic import packed
from moesaic.checkpoints import open_checkpoint
from moesaic.checkpoints._gguf_names import gguf_name
from moesaic.convert import convert
from moesaic.errors import CheckpointError, ConfigError, InvalidParameter
from tests.support import checkpoints, gguf_files
from tests.support.gguf_files import FLOATS, KINDS, SCALES, TinyFile
from tests.support.gptq import Awq, Gptq, case
from tests.support.loading import load_model
from tests.support.quantized import Bitsandbytes, Compressed, files

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "vocab_size": 32}
INEXACT = "cannot be written exactly in a quantized type of GGUF"


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return type, shape and bytes of each tensor in a file, as the ``gguf`` package reads it."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1])), t.data.tobytes()) for t in reader.tensors}


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file under classic names, decoded by the ``gguf`` package; head size 16."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = gguf.dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)).astype(np.float32)
        found[tensor.name] = torch.from_numpy(weight).reshape(*map(int, tensor.shape[::-1]))
    return found


def check_weights(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Assert that the file holds exactly these weights, which have classic names and heads of 16."""
    found, used = decoded(path), set()
    for name, weight in expected.items():
        place = gguf_name(name)
        assert place is not None
        used.add(place[0])
        theirs = found[place[0]] if place[1] is None else found[place[0]][place[1]]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            theirs = theirs.reshape(-1, 8, 2, theirs.shape[-1]).transpose(1, 2).reshape(theirs.shape)
        assert torch.equal(theirs, weight.float()), name
    assert used == found.keys()


def types(path: Path, part: str) -> set[str]:
    """Return the types of the tensors whose names contain ``part``."""
    return {kind for name, (kind, _, _) in stored(path).items() if part in name}


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_comes_back_with_the_same_bytes(kind, experts, tmp_path):
    path = TinyFile(kind, experts).write(tmp_path / "tiny.gguf")
    convert(path, tmp_path / "new.gguf", "gguf")
    assert stored(tmp_path / "new.gguf") == stored(path)
    if kind in SCALES:
        packed.pack(path, tmp_path / "packed")
        convert(tmp_path / "packed", tmp_path / "again", "gguf")
        assert stored(tmp_path / "again" / "again.gguf") == stored(path)


def test_experts_in_tensors_of_their_own_become_a_stack(tmp_path):
    tiny = TinyFile("Q4_K", 3)
    expected = stored(tiny.write(tmp_path / "stacked.gguf"))
    tiny.split_experts()
    convert(tiny.write(tmp_path / "split.gguf"), tmp_path / "new.gguf", "gguf")
    assert stored(tmp_path / "new.gguf") == expected


def test_experts_of_different_types_are_refused_or_decoded(tmp_path):
    tiny = TinyFile("Q8_0", 3)
    tiny.split_experts()
    name, other = "blk.1.ffn_up.2.weight", TinyFile("Q4_1", 3, seed=1)
    other.split_experts()
    tiny.tensors[name] = other.tensors[name]
    source = tiny.write(tmp_path / "mixed.gguf")
    with pytest.raises(
        CheckpointError, match=r"experts\.2\.w3\.weight \(Q4_1\) .*: the experts of its layer have no type"
    ):
        convert(source, tmp_path / "new.gguf", "gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mixed.gguf"]
    convert(source, tmp_path / "new.gguf", "gguf", decode=True)
    assert types(tmp_path / "new.gguf", "blk.1.ffn_up_exps") == {"F32"}
    assert types(tmp_path / "new.gguf", "blk.0.ffn_up_exps") == {"Q8_0"}
    ours = checkpoints.read(tmp_path / "new.gguf")
    assert all(torch.equal(ours[name], weight) for name, weight in checkpoints.read(source).items())


GPTQ = {
    "Q4_0": Gptq(symmetric=True),
    "Q4_0 ": Gptq(group_size=128, symmetric=True, scale=torch.float32),
    "Q5_0": Gptq(group_size=64),
    "Q5_0 ": Awq(),
    " Q5_0": Awq(-1),
    "Q4_0  ": Gptq(bits=3),
    "  Q4_0": Gptq(bits=2),
    "Q8_0": Gptq(bits=8, symmetric=True),
}


@pytest.mark.parametrize("kind", GPTQ)
def test_integers_of_other_programs_become_a_type_that_holds_them_exactly(kind, tmp_path):
    model, method = case(GPTQ[kind]), GPTQ[kind]
    for name, tensor in model.stored.items():
        if tensor.dtype == torch.float32 and name.endswith("scales"):
            tensor.copy_(tensor.half())
            weight = {part: model.stored[f"{name[:-6]}{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            model.weights[f"{name[:-7]}.weight"] = method.weight(weight)
    convert(model.write(tmp_path / "source"), tmp_path / "new.gguf", "gguf")
    assert types(tmp_path / "new.gguf", "attn_q.") == types(tmp_path / "new.gguf", "exps") == {kind.strip()}
    check_weights(tmp_path / "new.gguf", model.weights)
    ours = checkpoints.read(tmp_path / "new.gguf")
    assert all(torch.equal(ours[name].float(), weight.float()) for name, weight in model.weights.items())


def test_offsets_that_are_exact_become_q4_1(tmp_path):
    model = case(Awq())
    for name, tensor in model.stored.items():
        if name.endswith("scales"):  # powers of two, so that scale * zero point is a float16 number
            tensor.copy_(2.0 ** tensor.float().log2().round())
            parts = {part: model.stored[f"{name[:-6]}{part}"] for part in ("qweight", "qzeros", "scales")}
            model.weights[f"{name[:-7]}.weight"] = Awq().weight(parts)
    convert(model.write(tmp_path / "source"), tmp_path / "new.gguf", "gguf")
    assert types(tmp_path / "new.gguf", "exps") == {"Q4_1"}
    check_weights(tmp_path / "new.gguf", model.weights)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (Compressed(group=32), "Q4_0"),
        (Compressed(group=64, symmetric=False), "Q5_0"),
        (Compressed(strategy="channel"), "Q4_0"),
        (Compressed("int-quantized", 8, strategy="channel"), "Q8_0"),
    ],
)
def test_compressed_tensors_with_bfloat16_scales(method, kind, tmp_path):
    model = files(method, "mixtral")
    convert(model.write(tmp_path / "source"), tmp_path / "new.gguf", "gguf")
    assert types(tmp_path / "new.gguf", "exps") == {kind}
    expected = checkpoints.read(model.write_plain(tmp_path / "plain"))
    ours = checkpoints.read(tmp_path / "new.gguf")
    assert all(torch.equal(ours[name].float(), weight.float()) for name, weight in expected.items())


REFUSED = {
    "act-order": (Gptq(act_order=True), "no integer codes with a scale for each group of columns in order"),
    "8 bits with zero points": (Gptq(bits=8), "no type has their levels and zero points"),
    "float32 scales": (Gptq(scale=torch.float32), "their scales are not float16 numbers"),
    "NF4": (Bitsandbytes("nf4"), "no type has the levels of nf4"),
    "FP4": (Bitsandbytes("fp4"), "no type has the levels of fp4"),
    "float8": (Compressed("float-quantized", 8, strategy="channel"), "no integer codes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_type_holds_is_refused_or_decoded(name, tmp_path):
    method, reason = REFUSED[name]
    model = case(method) if isinstance(method, Gptq) else files(method, "mixtral")
    source = model.write(tmp_path / "source")
    with pytest.raises(CheckpointError, match=INEXACT) as caught:
        convert(source, tmp_path / "new", "gguf")
    assert reason in str(caught.value) and "--decode" in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "new", "gguf", decode=True)
    ours = checkpoints.read(tmp_path / "new")
    assert all(torch.equal(ours[key].float(), weight.float()) for key, weight in checkpoints.read(source).items())
    assert types(tmp_path / "new" / "new.gguf", "exps") == {"F32"}


def test_own_integer_formats_are_refused(tmp_path):
    source = checkpoints.write(tmp_path / "source", checkpoints.config("llama", **SIZES))
    packed.pack(source, tmp_path / "packed", "int4")
    with pytest.raises(CheckpointError, match=rf"q_proj\.weight \(int4\) {INEXACT}"):
        convert(tmp_path / "packed", tmp_path / "new.gguf", "gguf")
    convert(tmp_path / "packed", tmp_path / "floats", "hf")
    ours = checkpoints.read(tmp_path / "floats")
    for slot in load_model(tmp_path / "packed").model.slots():
        assert torch.equal(ours[slot.name].float(), slot.weight.dequantize() if slot.format else slot.weight)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "base": {"rope_theta": 123456.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
    "heads": {"head_dim": 32, "num_key_value_heads": 1},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_comes_back(name, tmp_path):
    source = checkpoints.write(tmp_path / "source", checkpoints.config("llama", **SIZES, **CONFIGS[name]))
    convert(source, tmp_path / "new.gguf", "gguf")
    one, other = (load_model(path).model.shape for path in (source, tmp_path / "new.gguf"))
    assert one.rope.frequencies(one.head_dim).allclose(other.rope.frequencies(one.head_dim), rtol=1e-5)
    assert vars(one) | {"rope": None, "norm_eps": 0} == vars(other) | {"rope": None, "norm_eps": 0}
    assert np.float32(one.norm_eps) == np.float32(other.norm_eps)
    expected = checkpoints.read(source)
    ours = checkpoints.read(tmp_path / "new.gguf")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.mark.parametrize(("kind", "window"), [("mistral", 32), ("mistral", None), ("mixtral", None)])
def test_family_and_window_come_back(kind, window, tmp_path):
    source = checkpoints.write(tmp_path / "source", checkpoints.config(kind, **SIZES | {"sliding_window": window}))
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "top_k": 7, "top_p": 0.5}))
    convert(source, tmp_path / "new.gguf", "gguf")
    with open_checkpoint(tmp_path / "new.gguf") as checkpoint:
        assert checkpoint.config["model_type"] == kind and checkpoint.config.get("sliding_window") == window
        assert checkpoint.generation == {"temperature": 0.25, "top_k": 7, "top_p": 0.5}
        assert checkpoint.config.get("num_experts_per_tok") == (2 if kind == "mixtral" else None)


def test_floats_keep_their_dtype_and_norms_become_float32(tmp_path):
    config = checkpoints.config("mixtral", **SIZES)
    tensors = {name: tensor.bfloat16() for name, tensor in checkpoints.weights(config).items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    convert(checkpoints.write(tmp_path / "source", config, tensors), tmp_path / "new.gguf", "gguf")
    found = {name: kind for name, (kind, _, _) in stored(tmp_path / "new.gguf").items()}
    assert {name for name, kind in found.items() if kind == "F32"} == {
        *("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.0.ffn_gate_inp.weight", "output_norm.weight")
    }
    assert found["output.weight"] == "F16" and found["token_embd.weight"] == found["blk.0.ffn_up_exps.weight"] == "BF16"
    check_weights(tmp_path / "new.gguf", tensors)


def test_biases_are_kept(tmp_path):
    config = checkpoints.config("llama", **SIZES)
    biases = {f"model.layers.0.self_attn.{part}_proj.bias": torch.zeros(size) for part, size in (("q", 64), ("o", 64))}
    source = checkpoints.write(tmp_path / "source", config, checkpoints.weights(config) | biases)
    convert(source, tmp_path / "new.gguf", "gguf")
    assert {"blk.0.attn_q.bias", "blk.0.attn_output.bias"} <= stored(tmp_path / "new.gguf").keys()
    convert(tmp_path / "new.gguf", tmp_path / "back", "hf")
    assert checkpoints.read(tmp_path / "back").keys() == checkpoints.read(source).keys()
    load_model(tmp_path / "new.gguf")


def test_rows_of_biases_are_reordered_like_those_of_weights(tmp_path):
    config = checkpoints.config("llama", **SIZES)
    tensors = checkpoints.weights(config) | {"model.layers.0.self_attn.k_proj.bias": torch.arange(32.0)}
    convert(checkpoints.write(tmp_path / "source", config, tensors), tmp_path / "new.gguf", "gguf")
    [bias] = (data for name, (_, _, data) in stored(tmp_path / "new.gguf").items() if name == "blk.0.attn_k.bias")
    assert np.frombuffer(bias, np.float32)[:4].tolist() == [0, 8, 1, 9]
    assert torch.equal(
        checkpoints.read(tmp_path / "new.gguf")["model.layers.0.self_attn.k_proj.bias"], torch.arange(32.0)
    )


@pytest.mark.parametrize("shards", [2, 5])
def test_a_split_model(shards, tmp_path):
    source = TinyFile("Q6_K", 3).write(tmp_path / "tiny.gguf")
    convert(source, tmp_path / "new", "gguf", shards)
    names = [f"new-{number + 1:05d}-of-{shards:05d}.gguf" for number in range(shards)]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == names
    parts = [stored(tmp_path / "new" / name) for name in names]
    assert all(parts) and {name: tensor for part in parts for name, tensor in part.items()} == stored(source)
    ours = checkpoints.read(tmp_path / "new")
    assert all(torch.equal(ours[name], weight) for name, weight in checkpoints.read(source).items())


def test_a_target_that_cannot_be_written_is_refused_first(tmp_path):
    source = TinyFile("Q8_0").write(tmp_path / "tiny.gguf")
    with pytest.raises(InvalidParameter, match=r"shards: is 2, but new\.gguf is one file; name a folder"):
        convert(source, tmp_path / "new.gguf", "gguf", 2)
    with pytest.raises(InvalidParameter, match="shards: is 99, but must be 1 to"):
        convert(source, tmp_path / "new", "gguf", 99)
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(InvalidParameter, match="exists already"):
        convert(source, tmp_path / "there.gguf", "gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "tensors", "problem"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, "rope scaling of type 'yarn'"),
        ({"some_new_trick": 3}, {}, "some_new_trick"),
        ({}, {"v_head.weight": torch.ones(3)}, r"v_head\.weight has no name in this layout"),
        ({}, {"model.norm.weight": torch.ones(64, dtype=torch.float64)}, "stored as float64, which cannot be written"),
    ],
)
def test_what_the_layout_cannot_express_is_refused(changes, tensors, problem, tmp_path):
    config = checkpoints.config("llama", **SIZES, **changes)
    plain = checkpoints.weights(checkpoints.config("llama", **SIZES))
    source = checkpoints.write(tmp_path / "source", config, plain | tensors)
    with pytest.raises((CheckpointError, ConfigError), match=problem):
        convert(source, tmp_path / "new", "gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_metadata_of_the_source_is_kept(tmp_path):
    tiny = TinyFile("Q4_0")
    tiny.metadata |= {"general.license": "mit", "general.name": "Tiny", "general.file_type": 2, "quantize.x": "y"}
    tiny.metadata |= {"tokenizer.ggml.model": "none", "tokenizer.chat_template": "{{ x }}"}
    convert(tiny.write(tmp_path / "tiny.gguf"), tmp_path / "folder", "gguf")
    fields = gguf.GGUFReader(tmp_path / "folder" / "folder.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["general.name"] == "Tiny" and found["general.license"] == "mit" and found["quantize.x"] == "y"
    assert found["tokenizer.chat_template"] == "{{ x }}" and "general.file_type" not in found
    assert found["llama.vocab_size"] == 96 and found["llama.rope.freq_base"] == 1e4
    assert FLOATS and gguf_files.METADATA.keys() <= found.keys()
