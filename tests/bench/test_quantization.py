"""The models of the benchmark of quantization compute the function of their source; rows count bits and divergence."""

from __future__ import annotations

import json

import numpy
import pytest
import torch

from benchmarks import quantization, quantization_plot
from benchmarks.quantization_models import pad, upcycle
from moesaic import ops, packed
from moesaic.bench import provenance
from moesaic.bench.windows import Corpus, Window
from tests.support.loading import load_model
from tests.support.models import CASES, transformers_model

IDS = [[1, *range(3, 60)], [1, *range(40, 90)]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    transformers_model(*CASES["llama-gqa"]).save_pretrained(folder)
    return folder


def logits(folder):
    model = load_model(folder, dtype="float32").model
    with torch.inference_mode():
        return model.logits(model(ops.Batch.whole(IDS)))


def test_upcycled_model_has_the_logits_of_the_dense_one(dense, tmp_path):
    upcycle(dense, tmp_path / "mixtral", experts=4, chosen=2, seed=1)
    assert json.loads((tmp_path / "mixtral/config.json").read_bytes())["model_type"] == "mixtral"
    torch.testing.assert_close(logits(tmp_path / "mixtral"), logits(dense), atol=1e-4, rtol=1e-4)


def test_padded_model_has_the_logits_of_its_source(dense, tmp_path):
    pad(dense, tmp_path / "padded")
    shapes = {slot.name: slot.shape for slot in load_model(tmp_path / "padded").model.slots()}
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (256, 256)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (128, 256)
    torch.testing.assert_close(logits(tmp_path / "padded"), logits(dense), atol=1e-4, rtol=1e-4)


def test_bits_count_scales_and_padding_of_the_quantized_weights(dense, tmp_path):
    packed.pack(dense, tmp_path / "packed", "attention=int2,mlp=int8,head=float32")
    bits, shares = quantization.bits_and_types(load_model(tmp_path / "packed"))
    attention, mlp = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 48
    assert list(shares) == ["int2", "int8"] and shares["int2"] == pytest.approx(attention / (attention + mlp))
    assert bits > (2.19 * attention + 8.06 * mlp) / (attention + mlp)


def test_finished_rows_are_not_measured_again(tmp_path):
    row = quantization.Row("tales", "moesaic", "int4", "to nearest", 4.2, {"int4": 1.0}, 9, (20.0, 1.0))
    quantization.Results(tmp_path / "rows.json").add(row.key, lambda: row)
    again = quantization.Results(tmp_path / "rows.json")
    again.add(row.key, lambda: pytest.fail("it is finished"))
    assert [(found.key, found.commit) for found in again.rows] == [(row.key, provenance.commit())]


def test_plot_draws_the_rows_with_few_bits(tmp_path):
    places = [("int4", "calibrated", 4.2), ("int4", "to nearest", 4.2), ("Q4_0", "importance matrix", 4.5)]
    rows = [
        {"model": model, "name": name, "method": method, "bits": bits, "kl_divergence": (0.1, 0.01)}
        for model in quantization_plot.PANELS
        for name, method, bits in (*places, ("Q8_0", "importance matrix", 8.5))
    ]
    quantization_plot.draw(rows, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()  # each text is a comment beside its outlines
    assert [text.count(f"<!-- {name} -->") for name in ("int4", "Q4_0", "Q8_0")] == [4, 2, 0]


def test_importances_are_mean_squares_of_the_inputs(dense):
    found = quantization.importances(dense, IDS)
    assert len(found) == 14 and found["blk.1.ffn_down.weight"].shape == (48,)
    model, inputs = load_model(dense, dtype="float32").model, []
    model.blocks[1].attention.wo.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.inference_mode():
        for ids in IDS:
            model(ops.Batch.whole([ids]))
    expected = torch.cat(inputs).square().mean(0)
    torch.testing.assert_close(torch.from_numpy(found["blk.1.attn_output.weight"]), expected)


def test_rows_of_llama_cpp_compare_the_logits_of_two_files(dense, tmp_path):
    from moesaic.convert import convert

    convert(dense, tmp_path / "model.gguf", "gguf")
    p, q = torch.randn(2, 57, 97).float()
    for name, values in (("p", p), ("q", q)):
        numpy.save(tmp_path / f"{name}.npy", values.numpy())
    text = Corpus((Window(IDS[0][:-1], IDS[0][1:]),), 1, 200, "documents", 512)
    files = (tmp_path / "model.gguf", text, tmp_path / "p.npy", tmp_path / "q.npy")
    row = quantization.llama_cpp_row(("stored", "llama.cpp", "F32", ""), *files)
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    assert row.kl_divergence[0] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()))
    assert row.bits == 32 and row.tokens == 57
