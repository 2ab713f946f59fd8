"""GGUF files that are refused, and what becomes of the ones that are converted and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic import checkpoints, cli, packed
from moesaic.convert import convert
from moesaic.errors import CheckpointError, ConfigError, InvalidParameter
from moesaic.llm import LLM
from moesaic.text import template
from moesaic.text.tokenizer import Tokenizer
from tests.support.gguf_files import TinyFile
from tests.support.loading import load_model

LONG = 1 << 31
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope scaling of type 'yarn'"),
        ({"llama.logit_scale": 2.0}, "the key 'logit_scale' is unknown and may change the computation"),
        ({"llama.attention.value_length": 32}, "value_length is 32"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32"),
        ({"llama.attention.head_count_kv": [2, 1]}, "differs between layers"),
        ({"llama.attention.head_count_kv": ["2"]}, "expected an array of the documented type"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "expected a positive number"),
        ({"llama.attention.head_count": 0}, "head_count is 0, expected a positive integer"),
        ({"llama.attention.head_count": 3}, "q_proj.weight has the wrong shape"),
        ({"llama.embedding_length": LONG}, "hidden_size is 2147483648 in the metadata, but the tensors have 256"),
        (
            {"llama.feed_forward_length": LONG},
            "intermediate_size is 2147483648 in the metadata, but the tensors have 256",
        ),
        ({"llama.block_count": LONG}, "num_hidden_layers is 2147483648 in the metadata, but the tensors have 2"),
        ({"llama.expert_count": LONG}, "num_local_experts is 2147483648 in the metadata, but the tensors have 3"),
        ({"llama.expert_used_count": 0}, "must contain both expert_count and expert_used_count"),
        ({"llama.expert_count": -1.0}, "expert_count is -1.0"),
        ({"llama.expert_gating_func": 2}, "expert_gating_func is 2"),
        ({"llama.attention.causal": False}, "attention.causal is False"),
    ],
)
def test_metadata_that_changes_the_computation_or_contradicts_the_tensors(change, message, tmp_path):
    tiny = TinyFile("Q8_0", experts=3)
    tiny.metadata |= {"llama.attention.key_length": 64, **change}
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))
    assert "\n" not in str(caught.value)


def test_other_architectures_are_named(tmp_path):
    path = TinyFile("Q8_0").write(tmp_path / "tiny.gguf", architecture="qwen2")
    with pytest.raises(ConfigError, match="has the architecture 'qwen2'; only 'llama'"):
        checkpoints.open_checkpoint(path)


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ1_0", "NVFP4"])
def test_other_types_are_named(kind, tmp_path):
    tiny = TinyFile("F16")
    nbytes = {"IQ2_XXS": 66, "TQ1_0": 54, "NVFP4": 4 * 36}[kind]
    tiny.tensors["blk.1.attn_v.weight"] = np.zeros((128, nbytes), np.uint8), kind
    with pytest.raises(CheckpointError, match=rf"blk\.1\.attn_v\.weight has type {kind}, which is not supported; use"):
        checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))


def test_unknown_and_missing_tensors_are_named(tmp_path):
    tiny = TinyFile("F16")
    tiny.tensors["blk.0.attn_q.bias"] = np.ones(256, np.float32), "F32"
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.bias is unexpected"):
        load_model(tiny.write(tmp_path / "bias.gguf"))
    del tiny.tensors["blk.0.attn_q.bias"], tiny.tensors["blk.1.ffn_norm.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.post_attention_layernorm\.weight is missing"):
        load_model(tiny.write(tmp_path / "norm.gguf"))
    del tiny.tensors["token_embd.weight"]
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing"):
        load_model(tiny.write(tmp_path / "embedding.gguf"))


def test_one_weight_under_two_names_is_refused(tmp_path):
    tiny = TinyFile("F16", experts=2)
    tiny.tensors["blk.0.ffn_up.1.weight"] = np.zeros((256, 256), np.float16), "F16"
    with pytest.raises(CheckpointError, match=r"experts\.1\.w3\.weight, which another tensor holds as well"):
        checkpoints.open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tiny = TinyFile("Q8_0")
    data, _ = tiny.tensors["blk.1.attn_v.weight"]
    data[7, :2] = 255  # a scale that is not a number
    with pytest.raises(CheckpointError, match=r"v_proj\.weight holds NaN"):
        load_model(tiny.write(tmp_path / "tiny.gguf"))


@pytest.fixture
def with_vocabulary(tmp_path: Path) -> tuple[TinyFile, Path]:
    """A Mixtral in a file that also has a vocabulary and a chat template."""
    tiny = TinyFile("Q4_K", experts=2)
    pieces: list[Any] = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", "a", "b", "ab", "\u2581ab"]
    tiny.metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(token_id) for token_id in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "general.sampling.temp": 0.2,
    }
    return tiny, tiny.write(tmp_path / "tiny.gguf")


def test_a_converted_file_keeps_weights_vocabulary_and_template(with_vocabulary, tmp_path):
    tiny, path = with_vocabulary
    convert(path, tmp_path / "hf", "hf")
    with checkpoints.open_checkpoint(tmp_path / "hf") as checkpoint:
        assert checkpoint.layout == "hf"
        assert checkpoint.tensors.keys() == tiny.weights.keys()
        assert all(torch.equal(checkpoint.read(name), weight) for name, weight in tiny.weights.items())
        assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.2}
    for source in (path, tmp_path / "hf"):
        assert Tokenizer.open(source).encode("ab a", bos=True) == [1, 263, 259, 260]
        assert template.load(source) == "{{ messages[0].content }}"
    convert(tmp_path / "hf", tmp_path / "mistral", "mistral")
    assert Tokenizer.open(tmp_path / "mistral").encode("ab") == [263]


def test_a_file_talks(tmp_path, capsys):
    tiny = TinyFile("Q4_K", experts=2)
    pieces = ["<end>", "<turn>", *(chr(code) for code in range(33, 125)), "<|im_end|>", "\u0120"]
    assert len(pieces) == 96
    tiny.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3, 3, *[1] * 92, 4, 1],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "<turn>{{ messages[0].content }}<turn>",
        "general.sampling.temp": 0.2,
        "general.sampling.top_k": 7,
    }
    path = tiny.write(tmp_path / "tiny.gguf")
    with LLM.load(path, chat_format="template") as llm:
        assert llm.loaded.eos_ids == {0, 94}
        assert llm.name == "tiny.gguf" and llm.defaults == {"temperature": 0.2, "top_k": 7}
        ids = llm.encode_chat([{"role": "user", "content": "Hi 12"}])
        assert [pieces[token_id] for token_id in ids] == ["<turn>", "H", "i", "\u0120", "1", "2", "<turn>"]
        answer = llm.chat([{"role": "user", "content": "Hi"}], max_tokens=3)
        assert answer.reason in ("length", "stop")
    assert cli.main(["chat", str(path), "-m", "Hi", "--chat-format", "template", "--max-tokens", "2"]) == 0
    assert cli.main(["chat", str(tmp_path / "none.gguf"), "-m", "Hi"]) != 0
    assert "no such folder or file" in capsys.readouterr().err


def test_a_packed_file_keeps_its_vocabulary(with_vocabulary, tmp_path):
    _, path = with_vocabulary
    packed.pack(path, tmp_path / "packed", "q8", requantize=True)
    assert load_model(tmp_path / "packed").layout == "packed"
    assert Tokenizer.open(tmp_path / "packed").encode("ab") == [263]
    assert template.load(tmp_path / "packed") == "{{ messages[0].content }}"


def test_a_layout_without_a_writer_is_only_read(with_vocabulary, tmp_path, monkeypatch):
    monkeypatch.delattr("moesaic.checkpoints.mistral.write")
    with pytest.raises(InvalidParameter, match="mistral, a layout that is only read"):
        convert(with_vocabulary[1], tmp_path / "out", "mistral")
    assert not (tmp_path / "out").exists()


def test_metadata_alone_is_no_checkpoint(tmp_path):
    path = TinyFile("F16").write(tmp_path / "tiny.gguf")
    tiny = TinyFile("F16")
    tiny.tensors = {}
    tiny.write(path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoints.open_checkpoint(path)
