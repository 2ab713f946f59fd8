"""Where torch computes, it uses the threads that the engine would give it: beside a busy core, more would be slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from moesaic import formats
from moesaic.bench import quality
from moesaic.classifier import Classifier
from moesaic.formats import _tiles
from moesaic.llm import LLM
from moesaic.loading import torch_threads
from tests.support.loading import load_model

THREADS = 3


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judge(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random classifier."""
    path = tmp_path_factory.mktemp("judge")
    config = transformers.MistralConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=2,
        dtype="float32",
    )
    transformers.MistralForSequenceClassification(config).save_pretrained(path)
    (path / "tokenizer.model").write_bytes((talker / "tokenizer.model").read_bytes())
    return path


def seen(model: torch.nn.Module, run: Callable[[], object]) -> set[int]:
    """Return the numbers of torch's threads while a model computes, and check that they are restored."""
    found: set[int] = set()
    handle = model.register_forward_pre_hook(lambda *_: found.add(torch.get_num_threads()))
    run()
    handle.remove()
    assert torch.get_num_threads() == THREADS
    return found


def test_perplexity(talker: Path) -> None:
    loaded = load_model(talker)
    assert torch_threads(loaded.model) == 1
    with LLM.load(talker) as llm:
        assert seen(loaded.model, lambda: quality.perplexity(loaded, llm.tokenizer, ["Once upon a time"])) == {1}


def test_embeddings(talker: Path) -> None:
    with LLM.load(talker) as llm:
        assert seen(llm.loaded.model, lambda: llm.embed(["a king"])) == {1}


def test_classifier(judge: Path) -> None:
    classifier = Classifier.load(judge)
    assert seen(classifier.loaded.model, lambda: classifier.classify(["a king"])) == {1}


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
@pytest.mark.parametrize("inference", [False, True])
def test_quantized_weights(name: str, inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads do not change the result, and none of them uses several threads of torch."""
    found: set[int] = set()
    weight_format = formats.load(name)
    tile = _tiles.Tiled._tile

    def noted(self: _tiles.Tiled, plain: Tensor) -> Tensor:
        found.add(torch.get_num_threads())
        return tile(self, plain)

    weight = torch.randn(2, 300, 520, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.inference_mode(inference), torch.no_grad():
        expected = weight_format.quantize(weight)["tiles"]
        monkeypatch.setattr(_tiles, "SLICE", 64 * 520)
        monkeypatch.setattr(_tiles.Tiled, "_tile", noted)
        tiles = weight_format.quantize(weight)["tiles"]
    assert torch.equal(tiles, expected) and not tiles.requires_grad
    assert found == {1} and torch.get_num_threads() == THREADS


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(_tiles, "SLICE", 64 * 520)
    monkeypatch.setattr(_tiles.Tiled, "_tile", broken)
    with pytest.raises(MemoryError):
        formats.load("int4").quantize(torch.randn(300, 520))
    assert torch.get_num_threads() == THREADS
