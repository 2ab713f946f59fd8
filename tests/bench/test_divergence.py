"""Divergence between two models against its definition, computed from the logits of transformers."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from moesaic import cli
from moesaic.bench import divergence, quality, windows
from moesaic.bench.divergence import Reference
from moesaic.errors import InvalidRequest, NumericalError
from moesaic.loading import Loaded
from moesaic.text.tokenizer import Tokenizer
from tests.support.loading import load_model

TEXT = "Once upon a time there was a rabbit, and it had seven brothers. " * 4
LENGTH = 16


@pytest.fixture(scope="module")
def other(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with the weights of ``talker``, a little changed."""
    path = tmp_path_factory.mktemp("other") / "model"
    model = transformers.MixtralForCausalLM.from_pretrained(talker)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
        model.lm_head.weight *= 20  # probabilities that differ, as those of a trained model do
    model.save_pretrained(path)
    (path / "tokenizer.model").write_bytes((talker / "tokenizer.model").read_bytes())
    return path


def logprobs(path: Path) -> NDArray[np.float64]:
    """Return all log-probabilities [N, V] that count in the convention llama.cpp."""
    model = transformers.MixtralForCausalLM.from_pretrained(path)
    rows = []
    with torch.no_grad():
        for read, targets in prepared(path)[1].windows:
            rows.append(model(torch.tensor([read])).logits[0, -len(targets) :].double().log_softmax(-1).numpy())
    return np.concatenate(rows)


def prepared(path: Path, **options: Any) -> tuple[Loaded, windows.Corpus]:
    loaded = load_model(path, **options)
    return loaded, quality.prepare(loaded, Tokenizer.open(path), [TEXT], LENGTH, "llama.cpp")


def mean(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return mean and standard error as llama.cpp computes them: from the sums of the values and of their squares."""
    count = len(values)
    average = values.sum() / count
    error = math.sqrt((np.square(values).sum() / count - average**2) / (count - 1))
    return {"value": pytest.approx(average, rel=1e-3), "standard_error": pytest.approx(error, rel=1e-3)}


@pytest.mark.parametrize("rows", [5, 64])
def test_figures_equal_their_definition(talker: Path, other: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "ROWS", rows)
    monkeypatch.setattr(windows, "STEP_TOKENS", 40)
    p, q = logprobs(other), logprobs(talker)
    ids = [token_id for window in prepared(talker)[1].windows for token_id in window.targets]
    kl = (np.exp(p) * (p - q)).sum(1)
    p_loss, q_loss = (-x[range(len(ids)), ids] for x in (p, q))
    difference = np.exp(-q_loss) - np.exp(-p_loss)

    with Reference(*prepared(other), "other", None) as reference:
        measured, found = reference.compare(*prepared(talker))
    figures = found.figures("other", "float32")
    assert measured.perplexity == pytest.approx(math.exp(q_loss.mean()), rel=1e-4)
    assert figures["reference"]["perplexity"] == pytest.approx(math.exp(p_loss.mean()), rel=1e-4)
    assert figures["mean"] == mean(kl) and kl.mean() > 0.1
    assert figures["maximum"] == pytest.approx(kl.max(), rel=1e-4)
    assert figures["quantiles"]["99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert figures["quantiles"]["50"] == pytest.approx(np.median(kl), rel=1e-4)
    same = (p.argmax(1) == q.argmax(1)).astype(float)
    assert figures["same_top"] == mean(same)
    assert figures["mean_difference"] == mean(difference)
    squares = mean(difference**2)
    root = math.sqrt((difference**2).mean())
    assert figures["rms_difference"]["value"] == pytest.approx(root, rel=1e-3)
    assert figures["rms_difference"]["standard_error"] == pytest.approx(
        0.5 / root * squares["standard_error"].expected, rel=1e-3
    )
    assert figures["log_ratio"] == mean(q_loss - p_loss)


def test_a_model_does_not_differ_from_itself(talker: Path) -> None:
    with Reference(*prepared(talker), "talker", None) as reference:
        _, found = reference.compare(*prepared(talker))
    assert abs(found.mean.value) < 1e-12 and found.maximum < 1e-12
    assert (found.same_top.value, found.mean_difference.value, found.log_ratio.value) == (1.0, 0.0, 0.0)


def test_bfloat16_states_are_kept_exactly(talker: Path) -> None:
    options = {"dtype": "bfloat16", "format": "bfloat16"}
    with Reference(*prepared(talker, **options), "talker", None) as reference:
        _, found = reference.compare(*prepared(talker, **options))
    assert abs(found.mean.value) < 1e-12


def test_other_vocabularies_and_other_tokens_are_refused(talker: Path, mistral3: Path) -> None:
    loaded, text = prepared(talker)
    shorter = quality.prepare(loaded, Tokenizer.open(talker), [TEXT[5:]], LENGTH, "llama.cpp")
    with Reference(loaded, text, "talker", None) as reference:
        with pytest.raises(InvalidRequest, match="another vocabulary"):
            reference.compare(*prepared(mistral3))
        with pytest.raises(InvalidRequest, match="other tokens"):
            reference.compare(loaded, shorter)


def test_nan_in_the_reference_is_reported(talker: Path) -> None:
    loaded, text = prepared(talker)
    with torch.no_grad():
        next(iter(loaded.model.norm.parameters())).fill_(torch.nan)
    with pytest.raises(NumericalError):
        Reference(loaded, text, "talker", None)


def test_command_compares_formats_with_the_reference(
    talker: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out.json"
    file.write_text(TEXT)
    call = ["perplexity", str(file), str(talker), "--convention", "llama.cpp", "--length", str(LENGTH)]
    formats = ["--format", "float32", "--format", "int8", "--format", "int2"]
    assert cli.main([*call, *formats, "--kl-divergence", "--json", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text())["figures"]["formats"] == rows
    means = [row["kl_divergence"]["mean"]["value"] for row in rows]
    assert abs(means[0]) < 1e-9 < means[1] < means[2]
    assert rows[1]["kl_divergence"]["reference"]["format"] == "float32"
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["kl_divergence"]["reference"]["perplexity"], rel=1e-6)
    assert cli.main([*call, *formats, "--kl-divergence"]) == 0
    *_, title, names, first, second, third = capsys.readouterr().out.splitlines()
    assert title.startswith(f"KL divergence from {talker.name} in float32, perplexity ")
    assert names.split()[:3] == ["mean", "99", "%"]
    assert [line.split()[0] for line in (first, second, third)] == ["float32", "int8", "int2"]
    assert cli.main([*call, "--reference", str(other), "--reference-format", "int8", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["kl_divergence"]["reference"]["model"] == other.name
    assert row["kl_divergence"]["mean"]["value"] > 0.1


def test_packed_weights_are_compared_with_the_model_that_they_were_made_from(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, packed = tmp_path / "text.txt", tmp_path / "packed"
    file.write_text(TEXT)
    assert cli.main(["pack", str(talker), str(packed), "--format", "int8"]) == 0
    call = ["perplexity", str(file), str(packed), "--convention", "llama.cpp", "--length", str(LENGTH), "--json"]
    assert cli.main([*call, "--kl-divergence"]) == 2
    assert "--reference" in capsys.readouterr().err
    assert cli.main([*call, "--reference", str(talker)]) == 0
    found = json.loads(capsys.readouterr().out)["kl_divergence"]["mean"]["value"]
    assert cli.main([*call[:2], str(talker), *call[3:], "--format", "int8", "--kl-divergence"]) == 0
    assert json.loads(capsys.readouterr().out)["kl_divergence"]["mean"]["value"] == pytest.approx(found, rel=1e-6)
    assert cli.main([*call, "--reference", str(packed)]) == 0
    assert abs(json.loads(capsys.readouterr().out)["kl_divergence"]["mean"]["value"]) < 1e-9


def test_a_full_folder_for_temporary_files_is_reported(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("the system has no /dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: full.open("r+b", buffering=0))
    with pytest.raises(InvalidRequest, match="TMPDIR"):
        Reference(*prepared(talker), "talker", None)
