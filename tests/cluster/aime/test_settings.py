"""AIME's endpoint files: supported keys, warnings about others, and invalid files."""

from __future__ import annotations

import logging

import pytest

from moesaic.backend import ModelInfo
from moesaic.cluster.aime import settings
from moesaic.cluster.aime.parameters import check_parameters
from moesaic.errors import InvalidRequest, NotFound
from moesaic.serve.keys import digest

PUBLIC_WORKER = "5b07e305b50505ca" + "2b3284b4ae5f65d1"
PUBLIC_CLIENT = "6a17e2a5-b706-03cb" + "-1a32-94b4a1df67da"
FILE = """
[ENDPOINT]
title = "LLama 3.x Chat"
name = "llama3_chat"
description = "Llama 3.x Instruct Chat example API"
methods = ["GET", "POST"]
version = 3
category = "chat"
input_metering = ["token"]

[WORKER]
job_type = "llama3"
auth_key = "a workers key"

[CLIENTS]
authorization_keys = { anna = "annas key", public = "%s" }
result_lifetime = 900

[SESSION.VARS]
last = { type = "string", default = "" }

[INPUTS]
prompt_input = { type = "string", default = "", required = false }
chat_context = { type = "chat_context", colour = "red" }
top_k = { type = "integer", min = 0, max = 10, default = 4 }
temperature = { type = "float", minimum = 0.0, maximum = 1.0, default = 0.8, auto_convert = true }
name = { type = "str", max_length = 3 }
long = { type = "string", max_length = 3, auto_convert = true }
must = { type = "bool", required = true }
size = { type = "int", align = 8, auto_convert = true }
style = { type = "selection", supported = ["a", "b"], default = "a" }
face = { type = "image" }
more = { type = "json" }

[OUTPUTS]
text = { type = "string" }

[PROGRESS.OUTPUTS]
text = { type = "string" }

[STATIC]
'/llama3-chat/' = { path = 'frontend' }
"""


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "ep" / "llama3" / settings.ENDPOINT_FILE
    path.parent.mkdir(parents=True)
    path.write_text(FILE % PUBLIC_CLIENT)
    return path


def test_file_is_read_and_unsupported_keys_are_logged(llama, caplog):
    with caplog.at_level(logging.WARNING):
        definition = settings.read_file(llama)
    assert (definition.name, definition.version, definition.job_type, definition.category) == (
        "llama3_chat",
        3,
        "llama3",
        "chat",
    )
    assert (definition.request_timeout, definition.inactivity, definition.max_queue_length) == (60, 360, 1000)
    assert [key.name for key in definition.client_keys] == ["aime:llama3_chat:anna"]  # the published key is rejected
    assert definition.client_keys[0].sha256 == digest("annas key") and definition.worker_key == digest("a workers key")
    assert "annas key" not in repr(definition) and "a workers key" not in repr(definition)
    logged_keys = {getattr(record, "key", None) for record in caplog.records}
    assert {"[SESSION]", "[STATIC]", "[CLIENTS] result_lifetime", "[INPUTS] chat_context.colour"} <= logged_keys
    assert any("published" in record.message for record in caplog.records)


def test_server_file_gives_defaults(llama):
    llama.write_text(llama.read_text().replace('auth_key = "a workers key"', ""))
    top = llama.parent.parent.parent
    (top / settings.SERVER_FILE).write_text(
        f'[WORKERS]\ndefault_auth_key = "{PUBLIC_WORKER}"\ndefault_request_timeout = 20\n'
        "[ENDPOINTS]\ndefault_max_queue_length = 5\ndefault_job_inactivity_timeout = 30\n"
    )
    [definition] = settings.read(top)
    assert (definition.request_timeout, definition.inactivity, definition.max_queue_length) == (20, 30, 5)
    assert definition.worker_key == ""  # the published key is rejected


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[ENDPOINT]", "[ENDPOINT", "is not valid TOML"),
        ('name = "llama3_chat"', 'name = "v1"', "has a route of that name"),
        ('name = "llama3_chat"', 'name = "generate"', "has a route of that name"),
        ('name = "llama3_chat"', 'name = "api"', "has a route of that name"),
        ('name = "llama3_chat"', 'name = "a/b"', "is not a valid AIME endpoint"),
        ('job_type = "llama3"', "job_type = 5", "is not a valid AIME endpoint"),
        ("version = 3", "version = 3\nmax_queue_length = 0", "max_queue_length is 0"),
    ],
)
def test_invalid_endpoint_is_refused(llama, old, new, message):
    content = llama.read_text()
    assert old in content
    llama.write_text(content.replace(old, new, 1))
    with pytest.raises(InvalidRequest, match=message):
        settings.check_definitions(settings.read(llama.parent))


def test_duplicate_and_missing_endpoints_are_refused(llama, tmp_path):
    with pytest.raises(NotFound, match="name the folder of AIME"):
        settings.read(tmp_path / "nowhere")
    other = llama.parent.parent / "other" / settings.ENDPOINT_FILE
    other.parent.mkdir()
    other.write_text(llama.read_text())
    with pytest.raises(InvalidRequest, match="two endpoints"):
        settings.read(tmp_path)


def test_matching_model_is_selected():
    mixtral, llama = settings.shipped()
    cards = [
        ModelInfo("tales"),
        ModelInfo("Llama-3-8B"),
        ModelInfo("big", ("Mixtral-8x7B-Instruct",)),
        ModelInfo("judge", task="classify"),
    ]
    assert settings.model_of(mixtral, cards) == "big" and settings.model_of(llama, cards) == "Llama-3-8B"
    assert settings.model_of(mixtral, cards[:1]) == "tales"
    assert settings.model_of(mixtral, cards[3:]) == "mixtral"  # which workers of that type will offer


def test_parameter_rules(llama):
    definition = settings.read_file(llama)

    def value(**given):
        parameters, problems = check_parameters({"must": True, **given}, definition)
        return problems or parameters

    assert value() == {"must": True, "top_k": 4, "temperature": 0.8, "style": "a"}
    assert value(top_k=0)["top_k"] == 0 and value(top_k=3.0)["top_k"] == 3
    assert "too low" in value(top_k=-1)[0]  # "min" has the same effect as "minimum"
    assert value(temperature=7)["temperature"] == 1 and value(temperature=-1)["temperature"] == 0
    assert value(name="abc")["name"] == "abc"  # "str" is an alias of "string"
    assert "Length of parameter name is 4" in value(name="abcd")[0]
    assert value(long="abcd")["long"] == "abc"
    assert value(size=21)["size"] == 16
    assert value(style="b")["style"] == "b" and "not supported" in value(style="c")[0]
    assert "is not served here" in value(face="data:")[0]
    assert value(more='{"a": 1}')["more"] == {"a": 1} and "more" not in value(more="")
    assert value(more="null") == value() and value(more=None, key=None, wait_for_result=None) == value()
    assert check_parameters({}, definition)[1] == ["Missing required argument: must"]
    assert "Expected: <class 'float'>" in value(temperature=10**400)[0]
    assert "Expected: <class 'bool'>" in value(must=1)[0]
