"""What fits on a machine, what is recommended, and what is advised when nothing fits."""

from __future__ import annotations

import json

import pytest

from moesaic import models
from moesaic.errors import InvalidParameter
from moesaic.hardware import parse
from moesaic.load_options import LoadOptions
from moesaic.model_sizes import ModelSizes
from moesaic.plan import make_plan
from moesaic.planner import STORED, Report, Wish, plan_model, published_spec, text
from moesaic.published import CONFIGURATIONS
from tests.support.gguf_files import TinyFile


def report(model: str, hardware: str, **wish) -> Report:
    return plan_model(ModelSizes.count(published_spec(model)), parse(hardware), Wish(**wish))


def fitting(found: Report) -> list[str]:
    return [row.format for row in found.rows if row.fits]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_sizes_are_those_of_the_real_module(name: str) -> None:
    spec = published_spec(name)
    sizes, model = ModelSizes.count(spec), spec.build("meta")
    assert sizes.weights().nbytes == sum(part.nbytes for part in model.parameters())
    assert sizes.parameters == models.parameters(model)
    assert sizes.shards() == (1, 2, 4, 8)
    for preset in models.PRESETS:
        packed = spec.in_formats(preset).build("meta")
        assert sizes.weights(preset).nbytes == sum(part.nbytes for part in packed.parameters())


def test_sizes_of_a_file_are_those_of_its_codes(tmp_path) -> None:
    plan = make_plan(TinyFile("Q4_K", experts=4).write(tmp_path / "tiny.gguf"), LoadOptions())
    sizes = ModelSizes.count(plan.spec)
    assert sizes.weights().nbytes == plan.weight_bytes
    assert (sizes.experts, sizes.experts_per_token) == (4, 2)
    assert [row.format for row in plan_model(sizes, parse("cpu:1GB"), Wish()).rows] == [STORED]


def test_formats_fit_one_after_the_other() -> None:
    assert fitting(report("mixtral-8x7b", "1xT4")) == ["q2"]
    assert fitting(report("mixtral-8x7b", "1xRTX-5090")) == ["q4", "q3", "q2"]
    assert fitting(report("mixtral-8x7b", "cpu:64GB")) == ["q8", "q4", "q3", "q2"]
    assert fitting(report("mixtral-8x7b", "2xA6000")) == [STORED, *models.PRESETS]


def test_cache_of_all_answers_must_fit() -> None:
    row = report("mixtral-8x7b", "2xA6000", formats=(STORED,)).rows[0]
    most = row.batches[8192]
    assert most > row.batches[32768] >= 1 and 65536 not in row.batches
    assert report("mixtral-8x7b", "2xA6000", formats=(STORED,), batch=most).rows[0].fits
    found = report("mixtral-8x7b", "2xA6000", formats=(STORED,), batch=most + 1)
    assert not found.rows[0].fits and found.chosen is None
    assert f"{most} answers of this context fit at the same time." in found.advice
    assert "4 cards of this kind fit." in found.advice
    assert "An int8 key/value cache fits: --kv-cache-dtype int8." in found.advice


def test_experts_may_stay_in_main_memory_beside_a_card() -> None:
    rows = {row.format: row for row in report("mixtral-8x7b", "1xRTX4090+64GB").rows}
    assert rows["q8"].experts_on_host and rows["q8"].fits and not rows["q3"].experts_on_host
    assert not rows[STORED].fits
    assert rows["q8"].one.per_answer < rows["q3"].one.per_answer / 5
    assert not any(row.experts_on_host for row in report("llama-3-8b", "1xRTX4090+64GB").rows)


def test_only_legal_numbers_of_cards_are_used() -> None:
    found = report("mixtral-8x7b", "6xA6000")
    assert found.rows[0].cards == 4 and found.advice[0].startswith("4 of the 6 cards are used")


def test_readable_formats_with_enough_bits_are_recommended() -> None:
    assert report("mixtral-8x7b", "4xA6000").chosen == STORED
    assert report("mixtral-8x7b", "cpu:64GB@200GB/s").chosen == "q8"
    assert report("mixtral-8x7b", "cpu:64GB@51GB/s").chosen == "q4"  # slower than reading: not with two bits
    assert report("mixtral-8x7b", "1xT4").chosen == "q2"  # nothing else fits
    nothing = report("mixtral-8x22b", "1xT4")
    assert nothing.chosen is None and "4 cards of this kind fit." in nothing.advice


def test_wishes_are_checked() -> None:
    for values in ({"batch": 0}, {"formats": ("q5",)}, {"cache_dtype": "int4"}):
        with pytest.raises(InvalidParameter):
            Wish(**values)
    with pytest.raises(InvalidParameter, match="context: is 9000, but the model supports 2 to 8192"):
        report("llama-3-8b", "H100", context=9000)


def test_reports_are_text_and_json() -> None:
    found = report("mixtral-8x7b", "1xT4+64GB", context=4096)
    lines = "\n".join(text.lines(found))
    assert "mixtral-8x7b: 46.70 billion parameters, 12.75 for each token; at most 32,768 tokens" in lines
    assert "1 x T4-16GB" in lines and "data sheet" in lines and "Recommended: " in lines
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["weight_bytes"] == found.rows[0].weight_bytes
