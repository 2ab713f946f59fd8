"""Presets: their file, what they mean in each API, and how they are reloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.backend import GenerationRequest, ModelInfo
from moesaic.errors import InvalidRequest
from moesaic.serve import presets
from moesaic.serve.presets import Preset, PresetBackend
from tests.support.backend import ScriptedBackend
from tests.support.event_loop import async_test
from tests.support.http import events
from tests.support.many_models import ANNA, OPS, ManyModels, body, many_models

FILE = """
[sailor]
base = "two"
description = "Tells of the sea."
system = "You tell of the sea."
sampling = {temperature = 0, max_tokens = 5}

[plain]
base = "two"
stop = ["the"]
"""
SYSTEM = {"role": "system", "content": "You tell of the sea."}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("presets") / "presets.toml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def many(file: Path) -> Iterator[ManyModels]:
    with many_models(file) as running:
        yield running


def asked(many: ManyModels, path: str, content: dict) -> dict:
    response = many.client.post(path, json=content, headers=ANNA)
    assert response.status_code == 200, response.text
    return response.json()


QUESTION = [{"role": "user", "content": "Tell of a fox."}]


def test_a_preset_is_listed_behind_its_model(many):
    data = many.client.get("/v1/models", headers=ANNA).json()["data"]
    assert [model["id"] for model in data] == ["one", "two", "sailor", "plain"]
    base, preset = data[1:3]
    assert (base["root"], base["parent"], base["description"]) == ("two", None, None)
    assert (preset["root"], preset["parent"], preset["description"]) == ("two", "two", "Tells of the sea.")
    assert preset["state"] == base["state"] and preset["max_model_len"] == base["max_model_len"]
    assert many.client.get("/v1/models/sailor", headers=ANNA).json()["parent"] == "two"
    assert many.admin("models", "GET")["models"][1]["presets"] == ["sailor", "plain"]


def test_a_preset_answers_with_its_system_prompt_and_sampling(many):
    path = "/v1/chat/completions"
    expected = asked(many, path, {"model": "two", "messages": [SYSTEM, *QUESTION], "temperature": 0, "max_tokens": 5})
    answer = asked(many, path, {"model": "sailor", "messages": QUESTION})
    assert answer["model"] == "sailor"
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
    assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 5


def test_the_values_of_a_request_come_first(many):
    path, own = "/v1/chat/completions", {"role": "system", "content": "You tell of a king and of his three sons."}
    expected = asked(many, path, {"model": "two", "messages": [own, *QUESTION], "temperature": 0, "max_tokens": 3})
    answer = asked(many, path, {"model": "sailor", "messages": [own, *QUESTION], "max_tokens": 3})
    assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]


def anthropic_tokens(out: dict) -> int:
    """Return the length of the prompt. Anthropic's count of input tokens leaves out those that were cached."""
    return out["usage"]["input_tokens"] + out["usage"]["cache_read_input_tokens"]


@pytest.mark.parametrize(
    ("path", "more", "prompt_tokens"),
    [
        ("/v1/responses", {"input": "Tell of a fox."}, lambda out: out["usage"]["input_tokens"]),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 4}, anthropic_tokens),
        ("/v1/messages/count_tokens", {"messages": QUESTION}, lambda out: out["input_tokens"]),
        ("/chat_tokenize", {"messages": QUESTION}, lambda out: len(out["tokenize_response"])),
    ],
)
def test_every_api_for_conversations_knows_presets(many, path, more, prompt_tokens):
    with_prompt = prompt_tokens(asked(many, path, {"model": "sailor", **more}))
    chat = {"model": "two", "messages": [SYSTEM, *QUESTION], "max_tokens": 1}
    assert with_prompt == asked(many, "/v1/chat/completions", chat)["usage"]["prompt_tokens"]


def test_plain_prompts_get_the_sampling_without_the_system_prompt(many):
    prompt = {"prompt": "Once upon a time"}
    base = asked(many, "/v1/completions", {"model": "two", "temperature": 0, "max_tokens": 5, **prompt})
    preset = asked(many, "/v1/completions", {"model": "sailor", **prompt, "max_tokens": 5})
    assert preset["usage"] == base["usage"] and preset["choices"][0]["text"] == base["choices"][0]["text"]


def test_a_preset_wakes_its_model(many):
    many.admin("models/two/unload")
    assert many.states()["sailor"] == "unloaded"
    many.chat("sailor")
    assert many.states()["sailor"] == many.states()["two"] == "loaded"


def test_embeddings_and_detokenization_know_presets(many):
    vectors = [asked(many, "/v1/embeddings", {"model": model, "input": "a fox"})["data"] for model in ("two", "plain")]
    assert vectors[0] == vectors[1]
    assert asked(many, "/detokenize", {"model": "plain", "tokens": [5]})["prompt"]


def test_a_reload_changes_presets_while_answers_run(many, file):
    endless = body("sailor", stream=True, max_tokens=400, ignore_eos=True)
    with many.client.stream("POST", "/v1/chat/completions", json=endless, headers=ANNA) as response:
        pieces = response.iter_text()
        first = next(pieces)
        try:
            file.write_text('[cook]\nbase = "one"\n')
            assert [preset["name"] for preset in many.admin("presets/reload")["presets"]] == ["cook"]
            assert many.client.post("/v1/chat/completions", json=body("sailor"), headers=ANNA).status_code == 404
            file.write_text('[cook]\nbase = "three"\n')
            refused = many.client.post("/admin/presets/reload", headers=OPS)
            assert refused.status_code == 400 and "unknown base 'three'" in refused.text
            assert many.chat("cook")["model"] == "cook"  # the old presets stay
        finally:
            file.write_text(FILE)
            many.admin("presets/reload")
        rest = first + "".join(pieces)
    assert "[DONE]" in rest and '"error"' not in rest and len(events(rest)) > 5


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[a]\nbase = 'scripted'\ntempo = 1", "preset 'a': Object contains unknown field `tempo`"),
        ("[a]\nbase = 'scripted'\nsampling = {heat = 1}", "unknown field `heat` - at `$.sampling`"),
        ("[a]\nbase = 'scripted'\nsampling = {top_p = 2}", "`float` <= 1"),
        ("[a]\nsystem = 'x'", "missing required field `base`"),
        ("[a]\nbase = 'none'", "preset 'a': unknown base 'none'; models: scripted, other"),
        ("[alias]\nbase = 'scripted'", "preset 'alias': a model has this name already"),
        ("[a]\nbase = 'scripted'\n[a]\nbase = 'other'", "Cannot declare ('a',) twice"),
        ("a = 1", "preset 'a': Expected `object`, got `int`"),
        ("[''] \nbase = 'scripted'", "'' is no name of a preset"),
        ("[a", "not a file of presets (TOML)"),
    ],
)
def test_each_problem_of_a_file_is_named(tmp_path, content, problem):
    path = tmp_path / "presets.toml"
    path.write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        PresetBackend(ScriptedBackend(), lambda: presets.read(path))
    assert problem in str(caught.value)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        presets.read(tmp_path / "none.toml")


@async_test
async def test_all_values_of_a_preset_reach_the_request():
    backend = ScriptedBackend()
    preset = Preset("p", "alias", "", "Be kind.", {"temperature": 0.5, "stop": ("x",)}, {"a": 1, "b": 1})
    front = PresetBackend(backend, lambda: (preset,))
    message = {"role": "user", "content": "Hi"}
    await front.generate(GenerationRequest("p", (message,), sampling={"stop": ("y",)}, chat_template_kwargs={"b": 2}))
    [request] = backend.requests
    assert request.model == "alias" and request.messages == ({"role": "system", "content": "Be kind."}, message)
    assert request.sampling == {"temperature": 0.5, "stop": ("y",)}
    assert request.chat_template_kwargs == {"a": 1, "b": 2}
    assert front.models()[2] == ModelInfo("p", context=100, parent="scripted")


def test_dates_in_template_variables_become_text(tmp_path):
    path = tmp_path / "presets.toml"
    path.write_text("[a]\nbase = 'm'\nchat_template_kwargs = {date = 2026-12-03}")
    assert presets.read(path)[0].chat_template_kwargs == {"date": "2026-12-03"}
