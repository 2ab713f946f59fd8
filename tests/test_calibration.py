"""Calibrated quantization: error feedback equals a naive computation, and loses less than rounding to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic import calibration, checkpoints, cli, formats, ops, packed
from moesaic.calibration import _drift, _hessians
from moesaic.calibration._drift import Correction, Inputs, Moments
from moesaic.calibration._layers import Routed
from moesaic.calibration._plain import PlainPass
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed, _feedback
from tests.support.loading import load_model

FORMATS = ("int4", "int3", "int2")
IDS = [[1, *range(3 + i, 35 + i)] for i in range(0, 40, 5)]


def correlated(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns) @ torch.randn(columns, columns) / columns**0.5


def quantized(name: str, weight: Tensor, hessian: Tensor) -> Packed:
    packed_weight = formats.load(name).empty(tuple(weight.shape))
    ops.quantize_with_feedback(packed_weight, weight, ops.feedback_factor(hessian))
    return packed_weight


def loss(found: Packed, weight: Tensor, hessian: Tensor) -> float:
    difference = (found.dequantize() - weight).double()
    return float(((difference @ hessian.double()) * difference).sum())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(40, 320), (33, 72)])
def test_feedback_loses_less_than_rounding_to_nearest(name, shape):
    weight, x = torch.randn(shape), correlated(2000, shape[1])
    hessian = x.T @ x
    nearest = formats.load(name).pack(weight)
    assert loss(quantized(name, weight, hessian), weight, hessian) < 0.7 * loss(nearest, weight, hessian)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(40, 320), (33, 72)])
def test_backends_choose_the_same_bytes(name, shape):
    weight, x = torch.randn(shape), correlated(2000, shape[1])
    factor = ops.feedback_factor(x.T @ x)
    found = quantized(name, weight, x.T @ x)
    expected = _feedback.quantize(found.format, weight, factor)["tiles"]
    assert (found.tiles == expected).float().mean() > 0.999  # sums in another order may round another way


@pytest.mark.parametrize("name", FORMATS)
def test_codes_equal_those_of_explicit_updates_of_the_inverse_hessian(name):
    """Optimal brain quantization (arXiv:2208.11580), which GPTQ computes faster."""
    kind, x = formats.load(name), correlated(500, 64)
    rotated, hessian = _feedback.rotate_padded(torch.randn(32, 64)), x.T @ x
    [(step, scale, codes)] = _feedback.feed_back(kind, rotated.clone(), ops.feedback_factor(hessian))
    factor = ops.feedback_factor(hessian).double()
    inverse, left = factor.T @ factor, rotated.double()
    levels = torch.tensor(kind.levels).double()
    for column in range(64):
        unit = (step * scale[:, column // 16]).double()
        code = (left[:, column, None] / unit[:, None] - levels).abs().argmin(1)
        assert (code == codes[:, column]).float().mean() > 0.9
        error = left[:, column] - levels[codes[:, column]] * unit
        left = left - error[:, None] * inverse[column] / inverse[column, column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # the column is done


def test_inputs_that_are_zero_round_to_nearest():
    weight = torch.randn(32, 64)
    found = quantized("int4", weight, torch.zeros(64, 64))
    assert (found.dequantize() - weight).norm() < 0.1 * weight.norm()


def test_wrong_formats_and_shapes_are_refused():
    weight, factor = torch.randn(32, 64), torch.eye(64)
    with pytest.raises(InvalidParameter, match="without error feedback"):
        ops.quantize_with_feedback(formats.load("int8").empty((32, 64)), weight, factor)
    with pytest.raises(InvalidParameter, match="factor"):
        ops.quantize_with_feedback(formats.load("int4").empty((32, 64)), weight, torch.eye(32))


def test_experts_are_weighted_by_probability_and_get_a_floor():
    x, ids = torch.randn(6, 4), torch.tensor([[0, 1]] * 5 + [[1, 0]])
    scores = torch.tensor([[0.75, 0.25]] * 6)
    tokens = Routed(ids, scores)
    own = _hessians.hessian([tokens.weighted(1, tokens.of(1, x))])
    p = torch.tensor([0.25] * 5 + [0.75])
    torch.testing.assert_close(own, sum(p[t] ** 2 * torch.outer(x[t], x[t]) for t in range(6)))
    unused = _hessians.hessian([tokens.weighted(2, tokens.of(2, x))])
    assert not unused.any() and tokens.weight(2) == 0
    shared = own + _hessians.hessian([tokens.weighted(0, tokens.of(0, x))])
    floored = _hessians.with_floor(unused, 0.0, lambda: shared, tokens.total, tokens.mean)
    torch.testing.assert_close(floored, shared * 4 / 12)  # as if it had as many tokens as columns
    assert _hessians.with_floor(own, 99.0, lambda: shared, tokens.total, tokens.mean) is own


def drifted(tokens: int, columns: int, rows: int) -> Inputs:
    """Inputs whose drift and missing hidden states are partly linear functions of them."""
    x, noise = correlated(tokens, columns), 0.1 * torch.randn(tokens, columns)
    expected = x + noise + 0.2 * x @ torch.randn(columns, columns) / columns**0.5
    return Inputs(x, expected, x @ torch.randn(columns, rows) / columns**0.5)


def correction(parts: Sequence[Inputs]) -> Correction:
    moments = Moments.of(parts)
    return Correction(moments, moments.hessian)


def test_correction_solves_damped_normal_equations():
    parts, weight = [drifted(300, 24, 8), drifted(200, 24, 8)], torch.randn(8, 24)
    change = (correction(parts).apply(weight) - weight).double() / _drift.SHARE
    tokens = [t for part in parts for t in zip(part.found, part.expected, part.missing, strict=True)]
    hessian = sum(torch.outer(x, x) for x, _, _ in tokens).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    lost = sum(torch.outer(weight @ (expected - x) + missing, x) for x, expected, missing in tokens)
    torch.testing.assert_close((change @ hessian).float(), lost, rtol=1e-3, atol=1e-2)


def test_inputs_without_drift_change_no_weight():
    x, weight = correlated(100, 32), torch.randn(16, 32)
    assert torch.equal(correction([Inputs(x, x, torch.zeros(100, 16))]).apply(weight), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_correction_lowers_the_error_of_a_layer_on_drifted_inputs(name):
    part, weight = drifted(2000, 64, 40), torch.randn(40, 64) / 8
    factor = ops.feedback_factor(part.found.T @ part.found)
    wanted = part.expected @ weight.T + part.missing

    def error(plain: Tensor) -> float:
        found = formats.load(name).empty((40, 64))
        ops.quantize_with_feedback(found, plain, factor)
        return float((part.found @ found.dequantize().T - wanted).norm())

    inputs_alone = correction([Inputs(part.found, part.expected)]).apply(weight)
    assert error(correction([part]).apply(weight)) < 0.8 * error(inputs_alone)
    assert error(inputs_alone) < 0.99 * error(weight)


def test_correction_brings_the_hidden_states_closer(talker, tmp_path, monkeypatch):
    errors = {}
    with torch.inference_mode():
        expected = load_model(talker, dtype="float32").model(ops.Batch.whole(IDS)).float()
        for share in (0.0, _drift.SHARE):
            monkeypatch.setattr(_drift, "SHARE", share)
            calibration.quantize(talker, tmp_path / str(share), calibration.Settings("experts=int2"), lambda: IDS)
            found = load_model(tmp_path / str(share)).model(ops.Batch.whole(IDS)).float()
            errors[share] = float((found - expected).norm())
    assert errors[_drift.SHARE] < errors[0.0]


def test_plain_pass_computes_the_unquantized_model(talker):
    with torch.inference_mode(), checkpoints.open_checkpoint(talker) as checkpoint:
        plain = PlainPass(checkpoint, IDS)
        first, second = plain.layer(0), plain.layer(1)
        expected = load_model(talker, dtype="float32").model(ops.Batch.whole(IDS))
        torch.testing.assert_close(torch.cat(plain.head()), expected)
    tokens = sum(map(len, IDS))
    for layer, found in enumerate((first, second)):
        name = f"model.layers.{layer}"
        names = [f"{name}.self_attn.q_proj", f"{name}.self_attn.o_proj", f"{name}.block_sparse_moe.experts"]
        assert list(found.inputs) == list(found.hidden) == names
        assert all(sum(map(len, parts)) == tokens for parts in (*found.inputs.values(), *found.hidden.values()))


def test_calibrated_model_is_closer_than_a_packed_one(talker, tmp_path):
    settings = calibration.Settings("int2")
    usage = calibration.quantize(talker, tmp_path / "calibrated", settings, lambda: IDS).usage
    packed.pack(talker, tmp_path / "nearest", "int2")
    batch = ops.Batch.whole(IDS)
    with torch.inference_mode():
        expected = load_model(talker, dtype="float32").model(batch).float()
        found = {name: load_model(tmp_path / name).model(batch).float() for name in ("calibrated", "nearest")}
    errors = {name: float((hidden - expected).norm()) for name, hidden in found.items()}
    assert errors["calibrated"] < errors["nearest"]
    assert all(sum(counts) % sum(map(len, IDS)) == 0 for counts in usage if counts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibrated", "nearest"]


class Stopped(Exception):
    pass


def stop_at(count: int):
    def progress(done: int, total: int) -> None:
        if done == count:
            raise Stopped

    return progress


@pytest.mark.parametrize("count", [2, 1000])
def test_stopped_run_continues_and_gives_the_same_bytes(talker, tmp_path, count):
    settings, folder = calibration.Settings("int3"), tmp_path / "resumed"
    totals: list[int] = []
    calibration.quantize(talker, tmp_path / "whole", settings, lambda: IDS, lambda _, total: totals.append(total))
    with pytest.raises(Stopped):
        calibration.quantize(talker, folder, settings, lambda: IDS, stop_at(min(count, totals[0] - 1)))
    assert not folder.exists()
    with pytest.raises(InvalidParameter, match="begun with other settings"):
        calibration.quantize(talker, folder, calibration.Settings("int2"), lambda: IDS)
    calibration.quantize(talker, folder, settings, lambda: pytest.fail("the text is known"))
    for file in (packed.WEIGHTS, packed.MANIFEST):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]


def test_few_tokens_leave_no_expert_without_weights(talker, tmp_path):
    usage = calibration.quantize(talker, tmp_path / "model", calibration.Settings("int2"), lambda: [[1, 5]]).usage
    assert any(0 in counts for counts in usage)
    with torch.inference_mode():
        assert torch.isfinite(load_model(tmp_path / "model").model(ops.Batch.whole(IDS))).all()


def test_refused_runs_leave_nothing(talker, tmp_path):
    with pytest.raises(InvalidParameter, match="has no text"):
        calibration.quantize(talker, tmp_path / "model", calibration.Settings("int2"), list)
    with pytest.raises(InvalidParameter, match="'q5' is unknown"):
        calibration.Settings("q5")
    assert not any(tmp_path.iterdir())


def test_command_quantizes_with_a_file_and_draws_the_experts(talker, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little rabbit who lived in the woods. " * 4)
    files = ["--calibrate", str(text), "--heat-map", str(tmp_path / "experts.png")]
    assert cli.main(["quantize", str(talker), str(tmp_path / "model"), "--format", "q2", "--tokens", "64", *files]) == 0
    assert packed.is_packed(tmp_path / "model") and (tmp_path / "experts.png").read_bytes()[1:4] == b"PNG"


def test_model_writes_its_own_text(talker):
    from moesaic.calibration import texts

    sequences = texts.self_written(Path(talker), 100)
    assert sum(map(len, sequences)) == 100 and all(len(ids) <= texts.LENGTH for ids in sequences)
    assert sequences == texts.self_written(Path(talker), 100)
