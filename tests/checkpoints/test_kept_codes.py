"""Models keep the codes and scales of quantized checkpoints, whichever program wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic import ops
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed
from moesaic.loading import load_model
from tests.support.gptq import Awq, Gptq, case
from tests.support.quantized import Bitsandbytes, Compressed, files

KEPT = {
    "GPTQ, 4 bits": Gptq(),
    "GPTQ, 3 bits, one group": Gptq(3, -1),
    "GPTQ, 8 bits, version 2": Gptq(8, 64, version="gptq_v2"),
    "GPTQ, act-order": Gptq(act_order=True),
    "GPTQ, 3 bits, act-order, groups of 128": Gptq(3, 128, act_order=True),
    "AWQ": Awq(32),
    "compressed-tensors, 4 bits": Compressed(group=32),
    "compressed-tensors, 4 bits, asymmetric rows": Compressed(strategy="channel", symmetric=False),
    "compressed-tensors, act-order": Compressed(group=32, order=True),
    "compressed-tensors, act-order, asymmetric": Compressed(bits=8, group=32, order=True, symmetric=False),
    "compressed-tensors, int8": Compressed("int-quantized", 8, strategy="channel"),
    "bitsandbytes, NF4": Bitsandbytes("nf4"),
    "bitsandbytes, FP4 with quantized scales": Bitsandbytes("fp4", nested=True),
}
DECODED = {
    "compressed-tensors, float8": Compressed("float-quantized", 8, strategy="channel"),
}


def folders(method: object, kind: str, path: Path) -> tuple[Path, Path]:
    """Return a quantized model, and the same model with plain weights."""
    model = case(method, kind) if isinstance(method, Gptq | Awq) else files(method, kind)
    return model.write(path / "quantized"), model.write_plain(path / "plain")


def weights(path: Path) -> dict[str, Packed]:
    return {name: part for name, part in load_model(path).model.named_modules() if isinstance(part, Packed)}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", KEPT)
def test_codes_and_scales_are_kept(name, kind, tmp_path):
    quantized, plain = folders(KEPT[name], kind, tmp_path)
    kept, expected = weights(quantized), weights(plain)
    assert kept.keys() == expected.keys()
    for key, weight in kept.items():
        assert torch.equal(weight.dequantize(), expected[key].dequantize()), key
    grouped = {key for key, weight in kept.items() if weight.name.startswith("grouped")}
    assert grouped == {key for key in kept if not key.startswith(("embed", "head"))}


@pytest.mark.parametrize("name", DECODED)
def test_weights_that_no_format_keeps_are_decoded(name, tmp_path):
    quantized, plain = folders(DECODED[name], "mixtral", tmp_path)
    for key, weight in weights(quantized).items():
        assert weight.name == "float32"
        assert torch.equal(weight.dequantize(), weights(plain)[key].dequantize()), key


def test_a_format_may_be_chosen_for_weights_that_the_file_does_not_quantize(tmp_path):
    quantized, _ = folders(KEPT["AWQ"], "mixtral", tmp_path)
    assert load_model(quantized, weight_format="head=int8").model.head.weight.name == "int8"
    with pytest.raises(InvalidParameter, match="int8 would round the experts weights of"):
        load_model(quantized, weight_format="experts=int8")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", ["GPTQ, 4 bits", "GPTQ, act-order", "compressed-tensors, act-order"])
def test_a_model_with_codes_answers_as_the_plain_one(name, kind, tmp_path):
    folder, plain = folders(KEPT[name], kind, tmp_path)
    with torch.inference_mode():
        kept, exact = (
            model.logits(model(ops.Batch.whole([[1, 5, 9, 3, 2, 7]])))
            for model in (load_model(folder).model, load_model(plain, weight_format="float32").model)
        )
    assert (kept - exact).norm() <= 0.05 * exact.norm()  # activations are rounded to eight bits
