"""A format for each weight: measured sensitivities predict the divergence, and the bits go where they help most."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import calibration, checkpoints, cli, ops, packed
from moesaic.bench.divergence import kl_divergence
from moesaic.calibration import _choice, _sensitivity
from moesaic.calibration._choice import Sensitivity
from moesaic.calibration._sensitivity import Measurement
from moesaic.errors import InvalidParameter
from moesaic.formats._tiles import Tiled
from tests.support.loading import load_model
from tests.support.models import CASES, transformers_model

IDS = [[1, *range(3 + i, 67 + i)] for i in range(0, 320, 20)]
EXPERT = re.compile(r"\.experts\.\d+\.")


def total(weights, chosen):
    return sum(weight.divergence(chosen[name]) for name, weight in weights.items())


def test_chosen_formats_lose_as_little_as_any_others_of_their_size():
    weights = {str(i): Sensitivity((64, 256), growth) for i, growth in enumerate((3.0, 1.0, 0.2, 0.05, 0.01))}
    for bits in (2.3, 2.6, 3.1, 4.0, 5.3):
        chosen = _choice.choose(weights, bits)
        size = sum(weight.nbytes(chosen[name]) for name, weight in weights.items())
        assert 8 * size <= bits * 5 * 64 * 256
        for other in itertools.product(_choice.FORMATS, repeat=5):
            rival = dict(zip(weights, other, strict=True))
            if sum(weight.nbytes(rival[name]) for name, weight in weights.items()) <= size:
                assert total(weights, chosen) <= total(weights, rival) * 1.0001


def test_bits_beyond_the_largest_format_are_left():
    weights = {"a": Sensitivity((64, 256), 1.0), "b": Sensitivity((2, 32, 256), 1.0)}
    assert set(_choice.choose(weights, 16).values()) == {"int8"}


def logits(model, ids):
    return model.logits(model(ops.Batch.whole(ids))).double().log_softmax(1)


class Recorded(Measurement):
    """A measurement that keeps the change of each weight."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.changes: dict[str, Tensor] = {}

    def _change(self, name: str, hessian: Tensor) -> Tensor:
        self.changes[name] = super()._change(name, hessian)
        return self.changes[name]


@pytest.mark.parametrize("case", [("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}), CASES["llama-tied"]])
def test_measured_growth_predicts_the_divergence_of_each_weight(tmp_path, case):
    transformers_model(*case).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (32, 64), generator=generator).tolist()
    with checkpoints.open_checkpoint(tmp_path) as checkpoint:
        measurement = Recorded(checkpoint, ids, tmp_path / "gradients")
        measurement.run(None)
    growths = dict.fromkeys(measurement.found, 0.0)
    with torch.inference_mode():
        model = load_model(tmp_path, dtype="float32").model
        expected = logits(model, ids)
        for name, stacked in itertools.groupby(model.slots(), lambda slot: EXPERT.sub(".experts.0.", slot.name)):
            slots = [slot for slot in stacked if slot.name in measurement.changes]
            if not slots:
                continue
            for slot in slots:
                kept = slot.weight.dequantize(index=slot.entry).clone()
                slot.weight.store(kept + measurement.changes[slot.name], slot.entry)
                growths[name] += float(kl_divergence(expected, logits(model, ids)).mean())
                slot.weight.store(kept, slot.entry)
    for name, growth in growths.items():
        least = 0.45 if "v_proj" in name else 0.75  # attention adds up the changes of values at many tokens
        assert least * growth < measurement.found[name].growth < 1.2 * growth, name


def test_each_weight_has_the_chosen_format(talker, tmp_path):
    outcome = calibration.quantize(talker, tmp_path / "model", calibration.Settings(None, bits=7.0), lambda: IDS)
    assert len({choice.format for choice in outcome.choices.values()}) > 1
    loaded = load_model(tmp_path / "model")
    slots = [slot for slot in loaded.model.slots() if isinstance(slot.format, Tiled)]
    attention = {c.format for name, c in outcome.choices.items() if "self_attn" in name}
    assert {group.format for group in loaded.plan.weights if group.role == "attention"} == attention
    nbytes, count = sum(s.format.nbytes(s.shape) for s in slots), sum(torch.Size(s.shape).numel() for s in slots)
    assert 8 * nbytes / count == pytest.approx(_choice.mean_bits(outcome.choices)) and 8 * nbytes <= 7.0 * count
    assert {s.name: str(s.format) for s in slots if not s.entry} == {n: c.format for n, c in outcome.choices.items()}
    written = json.loads((tmp_path / "model/choices.json").read_bytes())
    assert written["weights"]["lm_head.weight"]["format"] == outcome.choices["lm_head.weight"].format
    assert not list((tmp_path / "model").glob("*gradients*"))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("phase", ["measuring", "progress"])
def test_stopped_run_continues_and_gives_the_same_bytes(talker, tmp_path, monkeypatch, phase):
    settings, folder = calibration.Settings(None, bits=7.0), tmp_path / "resumed"
    calibration.quantize(talker, tmp_path / "whole", settings, lambda: IDS)

    def stop(done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        calibration.quantize(talker, folder, settings, lambda: IDS, **{phase: stop})
    blocks = []
    measure = Measurement._block
    monkeypatch.setattr(
        Measurement, "_block", lambda self, block, *rest: (blocks.append(block), measure(self, block, *rest))[1]
    )
    calibration.quantize(talker, folder, settings, lambda: pytest.fail("the text is known"))
    assert len(blocks) == (1 if phase == "measuring" else 0)
    for file in (packed.WEIGHTS, packed.MANIFEST, calibration.CHOICES):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]


def test_impossible_bits_are_refused_before_anything_is_measured(talker, tmp_path):
    with pytest.raises(InvalidParameter, match=r"is 2, but the smallest format of this model takes \d\.\d"):
        calibration.quantize(talker, tmp_path / "model", calibration.Settings(None, bits=2.0), lambda: pytest.fail())
    with pytest.raises(InvalidParameter, match="expected a number"):
        calibration.Settings(None, bits=float("nan"))
    with pytest.raises(InvalidParameter, match="and not both"):
        calibration.Settings("int4", bits=3.0)
    assert not any(tmp_path.iterdir())


def test_first_sequences_fit_but_one_is_always_measured():
    assert _sensitivity._first([[1] * 9, [2] * 3], 10) == [[1] * 9]
    assert _sensitivity._first([[1] * 9, [2] * 3], 4) == [[1] * 9]
    assert _sensitivity._first([[1] * 2, [2] * 3], 5) == [[1] * 2, [2] * 3]


def test_command_prints_the_formats_as_a_table_or_json(talker, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little rabbit who lived in the woods. " * 4)
    options = ["--bits", "7.0", "--tokens", "64", "--calibrate", str(text)]
    assert cli.main(["quantize", str(talker), str(tmp_path / "table"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "weight", "q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3", "w2"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "lm_head"]
    assert cli.main(["quantize", str(talker), str(tmp_path / "json"), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["quantize", str(talker), str(tmp_path / "none"), "--format", "q4", "--json"]) == 2
    assert found["model.layers.1.block_sparse_moe.experts.0.w2.weight"]["format"].startswith("int")
