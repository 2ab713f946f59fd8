"""The report on what loading did with the weights of a model."""

from __future__ import annotations

import pytest

from moesaic.weight_report import WeightGroup
from tests.support.gguf_files import TinyFile
from tests.support.gptq import Gptq, case
from tests.support.loading import load_model


def by_role(weights: tuple[WeightGroup, ...]) -> dict[str, WeightGroup]:
    assert len({group.role for group in weights}) == len(weights)
    return {group.role: group for group in weights}


def test_kept_codes_are_exact(tmp_path):
    loaded = load_model(TinyFile("Q4_K", experts=3).write(tmp_path / "tiny.gguf"))
    groups = by_role(loaded.weights)
    assert set(groups) == {"embedding", "attention", "experts", "head"}
    for group in groups.values():
        assert (group.stored, group.error, group.kernel) == ("Q4_K", 0, "native")
        assert group.format == "grouped:scale=super:offset=value"
    assert str(groups["experts"]).startswith(
        "experts   Q4_K -> grouped:scale=super:offset=value, native kernel, exact,"
    )
    experts = [loaded.model.blocks[layer].mlp.experts for layer in range(2)]
    in_memory = sum(
        part.nbytes for each in experts for stack in (each.gate, each.up, each.down) for part in stack.parts().values()
    )
    assert groups["experts"].nbytes == in_memory


def test_rounded_weights_have_a_measured_error(tmp_path):
    path = TinyFile("Q4_0").write(tmp_path / "tiny.gguf")
    groups = by_role(load_model(path, format="mlp=int3,attention=float32", requantize=True).weights)
    assert groups["mlp"].format == "int3" and 0.05 < groups["mlp"].error < 0.3
    assert groups["attention"].format == "float32" and groups["attention"].error == 0
    plain = by_role(load_model(TinyFile("F32").write(tmp_path / "plain.gguf"), dtype="bfloat16").weights)
    assert plain["mlp"].stored == "float32" and 1e-4 < plain["mlp"].error < 4e-3


@pytest.mark.parametrize(
    ("method", "kind", "memory"),
    [
        (Gptq(), "4 bits", "grouped:offset=zero"),
        (Gptq(act_order=True), "4 bits, act-order", "grouped:offset=zero:order=act"),
    ],
)
def test_the_kind_and_the_format_of_kept_weights_are_named(method, kind, memory, tmp_path):
    groups = by_role(load_model(case(method).write(tmp_path)).weights)
    assert (groups["experts"].stored, groups["experts"].format, groups["experts"].error) == (kind, memory, 0)
