"""Tests of TGI's API: replies, streams, the wording of its errors, and its other routes."""

from __future__ import annotations

import json

import httpx
import pytest

from moesaic.backend import Delta, Finished, ModelStats, TokenInfo, TokenLimits
from moesaic.errors import EngineStopped, KeyExhausted, NumericalError, Overloaded, PromptTooLong, TimedOut
from moesaic.serve.dialects._tgi import Parameters, check_parameters
from moesaic.serve.dialects.tgi_info import token_spans
from moesaic.serve.keys import Key, Keys, digest
from moesaic.serve.settings import Settings, TgiBounds
from tests.support.backend import Script, ScriptedBackend, ScriptedStream
from tests.support.http import events, post
from tests.support.server import running

JSON = {"content-type": "application/json"}
BODY = {"inputs": "Hi you"}
GREEDY = {"do_sample": False, "details": True}


def asks(parameters, **more):
    return BODY | {"parameters": parameters} | more


def token(position, text, special=False):
    return {"id": 10 + position, "text": text, "logprob": -0.25, "special": special}


def test_a_reply_has_tgis_shape(server):
    response = post(server, "/generate", asks(GREEDY))
    assert response.json() == {
        "generated_text": "Hello, world!",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 4,
            "seed": None,
            "prefill": [],
            "tokens": [token(position, text) for position, text in enumerate(("Hello", ", ", "world", "!"))],
        },
    }
    assert post(server, "/generate", BODY).json() == {"generated_text": "Hello, world!"}
    assert response.headers["x-compute-characters"] == "6"
    assert (response.headers["x-prompt-tokens"], response.headers["x-generated-tokens"]) == ("2", "4")
    for name in ("compute-type", "compute-time", "total-time", "validation-time", "queue-time", "inference-time"):
        assert f"x-{name}" in response.headers


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_request_is_one_generate_call(server, path):
    for parameters in ({}, {"max_new_tokens": 3}, {"max_new_tokens": 3, "truncate": 50}, GREEDY):
        server.backend.calls.clear()
        assert post(server, path, asks(parameters)).status_code == 200
        assert server.backend.calls == ["generate"], "the backend counts the prompt tokens itself"


def test_the_compatible_route_repeats_the_prompt(server):
    for path in ("/", "/v1", "/v1/"):
        assert post(server, path, BODY).json() == [{"generated_text": "Hi youHello, world!"}]
    [reply] = post(server, "/", asks({"return_full_text": False})).json()
    assert reply["generated_text"] == "Hello, world!"
    assert post(server, "/generate", asks({"return_full_text": True})).json()["generated_text"].startswith("Hi you")
    *_, last = events(post(server, "/", BODY | {"stream": True}).text)
    assert json.loads(last)["generated_text"] == "Hi youHello, world!"


@pytest.mark.parametrize("path", ["/generate_stream", "/", "/v1/", "/invocations"])
def test_a_stream_has_one_event_for_each_token(server, path):
    response = post(
        server, path, asks({"details": True, "seed": 7, "temperature": 0.5, "top_n_tokens": 1}, stream=True)
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no" and response.headers["x-compute-characters"] == "6"
    tokens = [json.loads(event) for event in events(response.text)]
    assert [token["index"] for token in tokens] == [1, 2, 3, 4]
    assert tokens[0] == {
        "index": 1,
        "token": token(0, "Hello"),
        "top_tokens": [token(0, "Hello")],
        "generated_text": None,
        "details": None,
    }
    assert [token["generated_text"] is None for token in tokens] == [True, True, True, False]
    whole = "Hello, world!" if path == "/generate_stream" else "Hi youHello, world!"
    assert tokens[-1]["generated_text"] == whole and whole.endswith("".join(token["token"]["text"] for token in tokens))
    assert tokens[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 4,
        "seed": 7,
        "input_length": 2,
    }
    assert "[DONE]" not in response.text


def test_stream_details_are_optional(server):
    *_, last = events(post(server, "/generate_stream", BODY).text)
    assert json.loads(last)["details"] is None and "top_tokens" not in json.loads(last)


class UnevenStream(ScriptedStream):
    """Stream with held-back text, two tokens in one event, a stop string, and a separate last event."""

    async def __aiter__(self):
        yield Delta(0, "", (TokenInfo(1, "\ufffd"),))
        yield Delta(0, "é", (TokenInfo(2, "\ufffd"),))
        yield Delta(0, " we", (TokenInfo(3, " w"), TokenInfo(4, "e")))
        yield Delta(0, "", (TokenInfo(5, "ST"),))
        yield Delta(0, "!")
        yield Finished(0, "stop", 2, 5, stop="STOP")


def test_stream_texts_join_to_the_reply(monkeypatch):
    class UnevenBackend(ScriptedBackend):
        async def generate(self, request):
            return UnevenStream(self, request, self.script)

    with running(UnevenBackend) as server:
        tokens = [json.loads(event) for event in events(post(server, "/generate_stream", asks(GREEDY)).text)]
        whole = post(server, "/generate", asks(GREEDY)).json()
    assert [token["token"]["text"] for token in tokens] == ["", "é", "", " we", "", "!STOP"]
    assert tokens[-1]["generated_text"] == whole["generated_text"] == "é we!STOP"
    assert tokens[-1]["details"]["finish_reason"] == whole["details"]["finish_reason"] == "stop_sequence"
    assert [token["token"] for token in tokens] == whole["details"]["tokens"]


def test_best_of(monkeypatch):
    class BestOfBackend(ScriptedBackend):
        async def generate(self, request):
            self.script = Script(pieces=(("Good", "Better")[len(self.requests)],))
            stream = await super().generate(request)
            stream.scale = len(self.requests)
            return stream

    class ScaledStream(ScriptedStream):
        async def _steps(self):
            async for step in super()._steps():
                yield [
                    Delta(e.index, e.text, tuple(TokenInfo(m.id, m.text, False, -1 / self.scale) for m in e.tokens))
                    if isinstance(e, Delta)
                    else e
                    for e in step
                ] + [Finished(0, "length", 2, 1)] * isinstance(step[0], Delta) * (not isinstance(step[-1], Finished))

    monkeypatch.setattr("tests.support.backend.ScriptedStream", ScaledStream)
    with running(BestOfBackend) as server:
        reply = post(server, "/generate", asks({"best_of": 2, "do_sample": True, "details": True})).json()
        seeds = [request.sampling["seed"] for request in server.backend.requests]
    assert reply["generated_text"] == "Better"
    [other] = reply["details"]["best_of_sequences"]
    assert other["generated_text"] == "Good" and other["tokens"][0]["logprob"] == -1
    assert [other["seed"], reply["details"]["seed"]] == seeds and len(set(seeds)) == 2


def test_the_backend_receives_all_parameters(server):
    parameters = {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "frequency_penalty": -1,
        "max_new_tokens": 9,
        "stop": ["END"],
        "seed": 2**64 - 1,
        "top_n_tokens": 2,
        "decoder_input_details": True,
        "truncate": 50,
        "grammar": {"type": "regex", "value": "a+"},
        "unknown": {"is": "ignored"},
    }
    reply = post(server, "/generate", asks(parameters)).json()
    assert reply["details"]["prefill"] == [
        {"id": 1, "text": "<s>", "logprob": None},
        {"id": 5, "text": "Hi", "logprob": -0.5},
    ]
    [request] = server.backend.requests
    assert request.sampling == {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.0,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "frequency_penalty": -1.0,
        "max_tokens": 9,
        "stop": ("END",),
        "logprobs": 2,
        "prompt_logprobs": 0,
        "seed": 2**64 - 1,
    }
    assert (request.model, request.prompt, request.grammar) == ("scripted", "Hi you", ("regex", "a+"))
    assert (request.truncate, request.parse_special, request.limits) == (50, True, TokenLimits())


@pytest.mark.parametrize(
    ("parameters", "greedy"),
    [
        ({}, True),
        (None, False),
        ({"temperature": 1.0}, True),
        ({"temperature": 0.7}, False),
        ({"top_p": 1.0}, True),
        ({"top_p": 0.9}, False),
        ({"typical_p": 0.9}, False),
        ({"top_k": 3}, False),
        ({"do_sample": True}, False),
        ({"do_sample": False, "temperature": 0.5}, False),
    ],
)
def test_when_tokens_are_sampled(server, parameters, greedy):
    body = BODY if parameters is None else asks(parameters)
    assert post(server, "/generate", body).status_code == 200
    [request] = server.backend.requests
    assert (request.sampling["temperature"] == 0) == greedy
    assert 0 <= request.sampling["seed"] < 2**53
    assert request.sampling["max_tokens"] == 100 - 3  # the rest of the context


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"temperature": -1.5}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1.1}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 99. Given: 0"),
        ({"truncate": 100}, "`truncate` must be strictly positive and less than 99. Given: 100"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        (
            {"max_new_tokens": 98},
            "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 3 `inputs` tokens and 98 `max_new_tokens`",
        ),
        ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"grammar": {"type": "poem", "value": "x"}}, "grammar is not supported"),
        ({"grammar": {"type": "json", "value": 3}}, "grammar is not supported"),
        ({"grammar": {"type": "json", "value": "{"}}, "grammar is not valid: "),
        ({"watermark": True}, "`watermark` is not supported"),
        ({"adapter_id": "x"}, "`adapter_id` is not supported"),
        ({"seed": -1}, "`seed` must be >= 0 and < 2^64. Given: -1"),
        ({"temperature": "hot"}, "parameters.temperature: Expected"),
    ],
)
def test_validation_errors_have_tgis_wording(server, parameters, text):
    response = post(server, "/generate", asks(parameters))
    reply = response.json()
    assert response.status_code == 422 and reply["error_type"] == "validation"
    assert reply["error"].startswith(f"Input validation error: {text}")
    if text[-1] not in ": " and text.startswith("`") and "supported" not in text:
        assert reply["error"] == f"Input validation error: {text}"
    assert not server.backend.requests


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ],
)
def test_an_invalid_stream_request_is_422(server, parameters, text):
    response = post(server, "/generate_stream", asks(parameters))
    assert response.status_code == 422
    assert response.json() == {"error": f"Input validation error: {text}", "error_type": "validation"}


def test_null_means_unset(server):
    assert post(server, "/generate", asks(dict.fromkeys(Parameters.__struct_fields__))).status_code == 200
    assert server.backend.requests[0].sampling["temperature"] == 0


def test_empty_and_too_long_inputs_are_refused():
    with running(settings=Settings(tgi=TgiBounds(max_best_of=1, max_input_tokens=4, max_total_tokens=10))) as server:
        cases = {
            "`inputs` cannot be empty": {"inputs": ""},
            "`inputs` must have less than 4 tokens. Given: 5": {"inputs": "a b c d"},
            "`best_of` != 1 is not allowed for this endpoint": asks({"best_of": 2, "do_sample": True}),
            "`inputs` tokens + `max_new_tokens` must be <= 10. Given: 3 `inputs` tokens and 8 `max_new_tokens`": asks(
                {"max_new_tokens": 8}
            ),
        }
        for text, body in cases.items():
            assert post(server, "/generate", body).json()["error"] == f"Input validation error: {text}"
        assert post(server, "/generate", asks({"max_new_tokens": 7})).status_code == 200


def test_invalid_bodies_are_refused(server):
    response = post(server, "/generate", {"prompt": "x"})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "inputs" in response.json()["error"]
    broken = httpx.post(server.url + "/generate", content=b"{", headers=JSON)
    assert (broken.status_code, broken.json()["error_type"]) == (422, "validation")
    plain = httpx.post(server.url + "/generate", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415 and plain.json().keys() == {"error"}


def test_unknown_routes_below_v1_have_openais_errors(server):
    assert post(server, "/v1/nothing", BODY).json()["error"]["type"] == "not_found_error"
    assert post(server, "/generate/nothing", BODY).json().keys() == {"error"}


@pytest.mark.parametrize(
    ("error", "status", "text", "kind"),
    [
        (Overloaded("full"), 429, "Model is overloaded", "overloaded"),
        (KeyExhausted("used up", 3), 429, "used up", "overloaded"),
        (
            PromptTooLong(9, 3),
            422,
            "Input validation error: `inputs` must have less than 3 tokens. Given: 9",
            "validation",
        ),
        (NumericalError("NaN"), 424, "Request failed during generation: NaN", "generation"),
        (EngineStopped("gone"), 503, "gone", "unhealthy"),
        (TimedOut("late"), 504, "late", "incomplete_generation"),
        (RuntimeError("secret"), 500, "Request failed during generation: ", "generation"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_backend_refusals_become_http_errors(server, path, error, status, text, kind):
    server.backend.script = Script(refusal=error)
    response = post(server, path, BODY)
    assert response.status_code == status and response.json()["error_type"] == kind
    assert response.json()["error"].startswith(text) and "secret" not in response.text
    assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NumericalError("NaN"), "generation"),
        (EngineStopped("gone"), "generation"),
        (TimedOut("late"), "incomplete_generation"),
        (Overloaded("slow"), "overloaded"),
    ],
)
def test_an_error_event_ends_a_stream(server, error, kind):
    server.backend.script = Script(error=error)
    response = post(server, "/generate_stream", asks(GREEDY))
    *tokens, last = [json.loads(line[5:]) for line in response.text.split("\n") if line.startswith("data:")]
    assert response.status_code == 200 and last["error_type"] == kind
    assert len(tokens) == 4 and all(token["generated_text"] is token["details"] is None for token in tokens)


def test_the_error_of_one_choice_fails_the_request(server):
    server.backend.script = Script(error=NumericalError("NaN"))
    best = asks({"best_of": 2, "do_sample": True})
    assert post(server, "/generate", best).status_code == 424
    both = {"prompt": ["a", "b"], "max_tokens": 4}
    assert post(server, "/v1/completions", both).json()["error"]["message"] == "NaN"


def test_concurrent_requests_are_limited():
    with running(lambda: ScriptedBackend(Script(held=True)), Settings(concurrent_requests=1)) as server:
        with httpx.stream("POST", server.url + "/generate_stream", json=BODY) as first:
            lines = first.iter_lines()
            assert "Hello" in next(lines)
            assert post(server, "/generate", BODY).json()["error"] == "Model is overloaded"
            server.call(server.backend.go.set)
            assert "world" in "".join(lines)
        assert post(server, "/generate", BODY).status_code == 200


def test_health(server):
    assert (httpx.get(server.url).status_code, httpx.get(server.url).content) == (200, b"")
    assert httpx.get(server.url + "/health").status_code == 200
    server.backend.model_stats = {"scripted": ModelStats(alive=False)}
    for path in ("/", "/health", "/ping"):
        response = httpx.get(server.url + path)
        assert response.status_code == 503
        assert (response.json()["error"], response.json()["error_type"]) == ("unhealthy", "healthcheck")


def test_which_routes_require_a_key():
    key = Keys((Key("anna", digest("secret")),))
    with running(keys=key) as server:
        for response in (post(server, "/generate", BODY), post(server, "/", BODY), httpx.get(server.url + "/info")):
            assert response.status_code == 401 and response.json().keys() == {"error"}
        assert httpx.get(server.url).status_code == 200
        named = {"authorization": "Bearer secret"}
        assert post(server, "/", BODY, headers=named).status_code == 200
        assert httpx.get(server.url + "/nothing", headers=named).status_code == 404


def test_info():
    settings = Settings(
        concurrent_requests=9, prompts=3, tgi=TgiBounds(max_total_tokens=50, launcher_info={"validation_workers": 7})
    )
    with running(settings=settings) as server:
        reply = httpx.get(server.url + "/info").json()
    assert (reply["model_id"], reply["model_pipeline_tag"], reply["router"]) == ("alias", "text-generation", "moesaic")
    assert (reply["max_total_tokens"], reply["max_input_tokens"], reply["max_input_length"]) == (50, 49, 49)
    assert (reply["max_concurrent_requests"], reply["max_client_batch_size"], reply["max_best_of"]) == (9, 3, 2)
    assert (reply["validation_workers"], reply["max_stop_sequences"], reply["docker_label"]) == (7, 4, None)
    for name in ("model_sha", "model_dtype", "model_device_type", "waiting_served_ratio", "max_batch_total_tokens"):
        assert name in reply
    for name in ("max_waiting_tokens", "version", "sha"):
        assert name in reply


def test_tokenize_in_both_dialects(server):
    assert post(server, "/tokenize", {"inputs": "one two"}).json() == [
        {"id": 1, "text": "", "start": 0, "stop": 0},
        {"id": 20, "text": "one", "start": 0, "stop": 3},
        {"id": 21, "text": "two", "start": 4, "stop": 7},
    ]
    assert post(server, "/tokenize", {"prompt": "one", "add_special_tokens": False}).json() == {
        "count": 1,
        "max_model_len": 100,
        "tokens": [20],
        "token_strs": ["one"],
    }
    assert post(server, "/tokenize", {}).status_code == 422


@pytest.mark.parametrize(
    ("texts", "text", "spans"),
    [
        ([" Hello", " you"], "Hello you", [(0, 5), (5, 9)]),
        (["Gr", "\ufffd", "\ufffd", "n"], "Grün", [(0, 2), (2, 3), (2, 3), (3, 4)]),
        (["\ufffd", "\ufffd"], "é", [(0, 1), (0, 1)]),
        (["<s>", "a", "</s>"], "a</s>", [(0, 0), (0, 1), (1, 5)]),
        ([" you", " and", " you"], "you and you", [(0, 3), (3, 7), (7, 11)]),
        (["a", "b"], "a\tb", [(0, 1), (2, 3)]),
        (["a", "\ufffd", "\ufffd", "a", "a"], "aéaa", [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_token_spans(texts, text, spans):
    tokens = token_spans([TokenInfo(9, token_text, token_text[0] == "<") for token_text in texts], text)
    assert [(token["start"], token["stop"]) for token in tokens] == spans
    assert all(token["text"] == text[token["start"] : token["stop"]] for token in tokens)


def test_sagemaker_and_vertex_routes(server):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert post(server, "/invocations", chat).json()["choices"][0]["message"]["content"] == "Hello, world!"
    assert post(server, "/invocations", {"prompt": "Hi"}).json()["choices"][0]["text"] == "Hello, world!"
    assert post(server, "/invocations", BODY).json() == [{"generated_text": "Hi youHello, world!"}]
    assert post(server, "/invocations", {"messages": 3}).json()["error_type"] == "validation"
    assert post(server, "/invocations", {"x": 3}).status_code == 422
    assert post(server, "/vertex", {"instances": [BODY, BODY]}).json() == {"predictions": ["Hello, world!"] * 2}
    assert post(server, "/vertex", {"instances": []}).status_code == 422


def test_json_grammars():
    def of(grammar):
        return check_parameters(Parameters(grammar=grammar), TgiBounds(), stream=False).grammar

    schema = {"type": "object", "properties": {}}
    assert of({"type": "json", "value": schema}) == of({"type": "json_object", "value": schema})
    assert of({"type": "json", "value": json.dumps(schema)}) == ("json_schema", schema)
    assert of({"type": "json_schema", "value": {"name": "x", "schema": schema}}) == ("json_schema", schema)
    assert of({"type": "json_schema", "value": schema}) == ("json_schema", schema)
    assert of({"type": "json_object"}) == ("json_object", {})


# The model tales

STORY = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 30, "details": True}}


@pytest.mark.parametrize(
    "more",
    [{}, {"temperature": 0.8, "seed": 5, "top_p": 0.9}, {"stop": ["the"]}, {"top_n_tokens": 2}, {"max_new_tokens": 1}],
)
def test_streamed_and_whole_replies_are_equal(tales, more):
    body = STORY | {"parameters": STORY["parameters"] | more}
    whole = post(tales, "/generate", body).json()
    tokens = [json.loads(event) for event in events(post(tales, "/generate_stream", body).text)]
    assert (
        tokens[-1]["generated_text"] == whole["generated_text"] == "".join(token["token"]["text"] for token in tokens)
    )
    whole_tokens = whole["details"]["tokens"]
    assert [token["token"]["id"] for token in tokens] == [token["id"] for token in whole_tokens]
    assert [token["token"]["text"] for token in tokens] == [token["text"] for token in whole_tokens]
    assert all(token["token"]["logprob"] <= 0 for token in tokens)
    assert [token["index"] for token in tokens] == list(range(1, whole["details"]["generated_tokens"] + 1))
    end = tokens[-1]["details"]
    assert (
        end["finish_reason"] == whole["details"]["finish_reason"] == ("stop_sequence" if "stop" in more else "length")
    )
    assert end["seed"] == whole["details"]["seed"] == more.get("seed")
    if "stop" in more:
        assert whole["generated_text"].endswith("the") and whole["generated_text"].count("the") == 1
    if "top_n_tokens" in more:
        assert all(len(token["top_tokens"]) == 2 for token in tokens)
        assert [token["top_tokens"] for token in tokens] == whole["details"]["top_tokens"]


def test_a_returned_seed_repeats_the_reply(tales):
    body = STORY | {"parameters": STORY["parameters"] | {"do_sample": True}}
    first = post(tales, "/generate", body).json()
    again = body | {"parameters": body["parameters"] | {"seed": first["details"]["seed"]}}
    assert post(tales, "/generate", again).json()["generated_text"] == first["generated_text"]


def test_special_tokens_in_the_text_are_parsed(tales):
    info = httpx.get(tales.url + "/tokenizer_info").json()
    bos, eos = info["bos_token"], info["eos_token"]

    def ids(text):
        return [token["id"] for token in post(tales, "/tokenize", {"inputs": text}).json()]

    plain = ids("Hello")
    assert ids(f"{bos}Hello") == plain
    assert len(ids(f"Hello{eos}")) == len(plain) + 1
    for text in (f"{bos}Hello", f"Hello{eos}"):
        body = {"inputs": text, "parameters": {"decoder_input_details": True, "max_new_tokens": 1}}
        reply = post(tales, "/generate", body).json()
        assert [token["id"] for token in reply["details"]["prefill"]] == ids(text)
    assert reply["details"]["prefill"][0]["logprob"] is None and reply["details"]["prefill"][1]["logprob"] < 0


def test_tokenize_passes_the_variables_of_the_chat_format_on(tales):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert post(tales, "/tokenize", {**body, "chat_template_kwargs": None}).status_code == 200
    for path in ("/tokenize", "/chat_tokenize"):
        refused = post(tales, path, {**body, "chat_template_kwargs": {"messages": []}})
        assert refused.status_code in (400, 422)
        assert "chat_template_kwargs: must not set messages" in refused.text


def test_chat_tokenize(tales):
    body = {"messages": [{"role": "user", "content": "Tell a story about Zoë."}]}
    reply = post(tales, "/chat_tokenize", body).json()
    assert "Tell a story about Zoë." in reply["templated_text"]
    tokens = reply["tokenize_response"]
    assert all(reply["templated_text"][token["start"] : token["stop"]] == token["text"] for token in tokens)
    assert [token["id"] for token in tokens] == post(tales, "/tokenize", body).json()["tokens"]
    stops = [token["stop"] for token in tokens]
    assert stops == sorted(stops) and stops[-1] == len(reply["templated_text"])
