"""Keys of config.json that programs write: those that change nothing load, and every other is refused by name."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import config_keys, formats, models
from moesaic.checkpoints._decoder import parse_config
from moesaic.errors import ConfigError
from moesaic.ops import Batch
from tests.support import checkpoints

READ = {"model_type", "architectures"}
"""Keys that the readers of a configuration take themselves."""
KINDS = ("llama", "mistral", "mixtral")
HARMLESS = sorted(config_keys.HARMLESS - READ)

any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def logits(keys: dict[str, Any]) -> torch.Tensor:
    """Return the logits of the model that a configuration describes, with the same weights each time."""
    model = models.build(keys, Path("config.json"), formats.load("float32"), dtype=torch.float32)
    tensors = checkpoints.weights(checkpoints.config(keys["model_type"]))
    for slot in model.slots():
        slot.store(tensors[slot.name])
    with torch.no_grad():
        return model.logits(model(Batch.whole([range(1, 20)])))


@functools.cache
def plain(kind: str = "llama") -> torch.Tensor:
    return logits(checkpoints.config(kind))


def described(keys: dict[str, Any]) -> tuple[object, ...]:
    """Return all that a model takes from its configuration."""
    module = models.build(keys, Path("config.json"), formats.load("float32"), dtype=torch.float32, device="meta")
    return module.shape, str(module), [slot.name for slot in module.slots()]


@pytest.mark.parametrize("value", [True, 7, -1, 0.5, "text", ["a", 1], {"0": "b"}])
@pytest.mark.parametrize("kind", KINDS)
def test_all_harmless_keys_together_change_nothing(kind, value):
    keys = checkpoints.config(kind) | dict.fromkeys(HARMLESS, value)
    assert torch.equal(logits(keys), plain(kind))
    assert parse_config(keys, Path("config.json")) == parse_config(checkpoints.config(kind), Path("config.json"))


@settings(max_examples=100)
@given(kind=st.sampled_from(KINDS), added=st.dictionaries(st.sampled_from(HARMLESS), any_json, min_size=1, max_size=8))
def test_harmless_keys_with_any_values_change_nothing(kind, added):
    assert described(checkpoints.config(kind) | added) == described(checkpoints.config(kind))


def test_every_setting_for_generation_of_transformers_is_harmless():
    settings = transformers.GenerationConfig().to_dict()
    assert {name for name, value in settings.items() if value not in (None, False)} <= config_keys.HARMLESS
    assert {name for name in settings if not name.startswith("_")} <= config_keys.HARMLESS


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_writes_for_a_plain_model_loads(kind):
    theirs = getattr(transformers, f"{kind.capitalize()}Config")(sliding_window=None).to_dict()
    models.build(theirs, Path("config.json"), formats.load("float32"), dtype=torch.float32, device="meta")
    parse_config({"sliding_window": None, **theirs}, Path("config.json"))


@pytest.mark.parametrize("name", sorted(config_keys.NEUTRAL))
def test_a_neutral_key_is_accepted_with_its_neutral_values_only(name):
    for value in (None, *config_keys.NEUTRAL[name]):
        assert torch.equal(logits(checkpoints.config() | {name: value}), plain())
        parse_config(checkpoints.config() | {name: value}, Path("config.json"))
    for value in (False, 0.5, "gelu", [1]):
        for read in (logits, lambda keys: parse_config(keys, Path("config.json"))):
            with pytest.raises(ConfigError, match=f"'{name}' is .* changes the computation"):
                read(checkpoints.config() | {name: value})


@pytest.mark.parametrize(
    "name",
    [
        "quantization_config",
        "final_logit_softcapping",
        "attention_bias",
        "mlp_bias",
        "n_shared_experts",
        "per_layer_config",
        "some_new_trick",
        "is_encoder_decoder",
        "add_cross_attention",
        "pruned_heads",
        "transformers_weights",
    ],
)
@pytest.mark.parametrize("value", [True, 3, {"a": 1}])
def test_a_key_that_may_change_the_computation_is_refused_by_name(name, value):
    for read in (logits, lambda keys: parse_config(keys, Path("config.json"))):
        with pytest.raises(ConfigError, match=name):
            read(checkpoints.config() | {name: value})


INTEGERS = [name for name, value in checkpoints.SIZES.items() if type(value) is int]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_number_may_be_written_with_a_point(kind):
    floats = {name: float(checkpoints.SIZES[name]) for name in INTEGERS}
    assert torch.equal(logits(checkpoints.config(kind, **floats, sliding_window=64.0)), plain(kind))
    decoder = parse_config(checkpoints.config(kind, **floats), Path("config.json"))
    assert decoder == parse_config(checkpoints.config(kind), Path("config.json"))
    assert type(decoder.hidden) is int


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [16.5, float("nan"), float("inf"), -16.0, True])
def test_a_number_with_a_fraction_is_refused(name, value):
    for read in (logits, lambda keys: parse_config(keys, Path("config.json"))):
        with pytest.raises(ConfigError, match=name):
            read(checkpoints.config(**{name: value}))


@pytest.mark.parametrize(
    ("window", "kinds", "accepted"),
    [
        (None, ["full_attention"] * 2, True),
        (None, ["sliding_attention"] * 2, False),
        (None, ["full_attention", "sliding_attention"], False),
        (8, ["sliding_attention"] * 2, True),
        (8, ["full_attention"] * 2, False),
        (8, ["full_attention", "sliding_attention"], False),
        (64, ["full_attention", "sliding_attention"], True),
        (None, ["full_attention"], False),
        (None, ["full_attention"] * 3, False),
        (None, ["chunked_attention"] * 2, False),
        (None, "full_attention", False),
        (None, 2, False),
        (None, [{}, []], False),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_types_load_if_they_say_what_sliding_window_says(kind, window, kinds, accepted):
    keys = checkpoints.config(kind, sliding_window=window, layer_types=kinds)
    for read in (logits, lambda keys: parse_config(keys, Path("config.json"))):
        if accepted:
            read(keys)
        else:
            with pytest.raises(ConfigError, match="layer_types"):
                read(keys)
    if accepted:
        assert torch.equal(logits(keys), logits(checkpoints.config(kind, sliding_window=window)))


def test_layer_types_of_mistral_count_with_its_default_window():
    long = {"max_position_embeddings": 8192, "layer_types": ["full_attention"] * 2, "sliding_window": ...}
    with pytest.raises(ConfigError, match="layer_types has 'full_attention', but with a sliding_window of 4096"):
        logits(checkpoints.config("mistral", **long))
    logits(checkpoints.config("llama", **long))


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {},
        {"rope_type": "default"},
        {"type": "default", "factor": 1.0},
        {"rope_type": "default", "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 1.0, "original_max_position_embeddings": 32},
        {"rope_type": "default", "partial_rotary_factor": 1.0, "attention_factor": None},
    ],
)
def test_rope_scaling_that_scales_nothing_loads(rope):
    assert torch.equal(logits(checkpoints.config(rope_scaling=rope)), plain())
    parse_config(checkpoints.config(rope_scaling=rope), Path("config.json"))


def test_names_of_the_same_thing_load():
    assert torch.equal(logits(checkpoints.config(hidden_act="swish")), plain())
    parse_config(checkpoints.config(hidden_act="swish"), Path("config.json"))
    for architectures in (None, [], "LlamaForCausalLM", ["UnslothLlamaForCausalLM"], ...):
        assert torch.equal(logits(checkpoints.config(architectures=architectures)), plain())
