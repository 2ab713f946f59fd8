"""Configurations are read strictly: an unknown key that may change the computation is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic import formats, models
from moesaic.errors import ConfigError, InvalidParameter
from tests.support.models import LLAMA31, SIZES

GOOD = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **SIZES}


def build(**changes: object) -> models.Decoder:
    raw = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return models.build(raw, Path("here"), formats.load("float32"), dtype=torch.float32, device="meta")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        ({"model_type": ...}, "model_type None"),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0, "beta": 2}}, "'beta' is not known"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' is not known"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is not known"),
        ({"architectures": ["MixtralForTokenClassification"]}, "MixtralForTokenClassification"),
        ({"architectures": ["MixtralForSequenceClassification"], "id2label": {"a": 1}}, "id2label"),
    ],
)
def test_unknown_values_are_errors_that_name_the_key(changes, named):
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    assert named in str(caught.value)
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_empty_key_is_ignored(value):
    build(some_new_switch=value)


def test_defaults_depend_on_the_family():
    assert build(model_type="mistral").window == 4096
    assert build(model_type="mistral", sliding_window=None).window is None
    assert build(model_type="mixtral").window is None
    assert build(model_type="mixtral").shape.rope.theta == 1e6
    assert build(model_type="llama").shape.rope.theta == 1e4
    assert build(model_type="llama", num_key_value_heads=...).shape.num_kv_heads == 4
    assert build(model_type="mixtral", num_attention_heads=16, num_key_value_heads=...).shape.num_kv_heads == 8


def test_old_and_new_rope_keys_are_equivalent():
    old = {key: value for key, value in LLAMA31.items() if key not in ("rope_type", "rope_theta")}
    new = build(rope_parameters=LLAMA31).shape.rope
    assert new.kind == "llama3"
    assert build(rope_theta=5e5, rope_scaling={"type": "llama3", **old}).shape.rope == new


def test_mixtral_8x7b_has_its_published_size():
    """46.7 billion parameters (arXiv:2401.04088 §1 rounds to 47), counted on the meta device."""
    model = build(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 46_702_792_704


def test_choose_accepts_formats_roles_and_presets():
    def chosen(text):
        return {role: each.name for role, each in models.choose(text, "bfloat16").items()}

    plain = dict.fromkeys(models.ROLES, "bfloat16")
    assert chosen("bfloat16") == plain
    assert chosen("int4") == dict.fromkeys(models.ROLES, "int4") | {"embedding": "bfloat16"}
    assert chosen("experts=int2,attention=int8") == plain | {"experts": "int2", "attention": "int8"}
    assert chosen("q2, attention=int8") == chosen("q2") | {"attention": "int8"}
    assert chosen("q2")["experts"] == "int2" and chosen("q2")["embedding"] == "bfloat16"


@pytest.mark.parametrize("text", ["", "q5", "experts=q4", "experts=", "norms=int8", "embedding=int8", "int4,,"])
def test_an_unknown_format_is_an_error(text):
    with pytest.raises(InvalidParameter, match="format"):
        models.choose(text, "bfloat16")
