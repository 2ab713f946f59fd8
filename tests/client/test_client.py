"""The Python client with our server: answers, errors, and cancellation."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from moesaic import errors
from moesaic.backend import ToolCall
from moesaic.client import AsyncClient, Client, Piece
from moesaic.client.events import EventParser
from moesaic.client.responses import response_error
from moesaic.errors import BadReply, InvalidParameter, InvalidRequest, NumericalError, StreamBroken, Unauthorized
from moesaic.serve import keys
from tests.support.backend import Script
from tests.support.client import AT_ONCE
from tests.support.server import Server, running

GREEDY = {"temperature": 0.0, "max_tokens": 12}
CALLS = (
    ToolCall(0, "call_a", "weather", '{"city":'),
    ToolCall(0, arguments=' "Oslo"}'),
    ToolCall(1, "call_b", "time", "{}"),
)
BUILT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "httpx", "numpy", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import moesaic.client
parts = {name.split(".")[1] for name in sys.modules if name.startswith("moesaic.")}
try:
    moesaic.client.Client()
except moesaic.errors.NotInstalled as error:
    print(sorted(parts), error)
"""


@pytest.fixture
def client(scripted):
    with Client(scripted.url, retries=AT_ONCE) as found:
        yield found


def test_import_needs_neither_torch_nor_httpx():
    done = subprocess.run([sys.executable, "-c", BUILT], capture_output=True, text=True, check=True)
    modules = ["client", "engine", "errors", "load_options"]
    assert done.stdout == f"{modules} moesaic.client needs httpx: pip install 'moesaic[client]'\n"


# Our server with the model tales


def test_a_real_model(served):
    ask = "Tell a story about a king."
    with Client(served + "/v1/", model="tales") as client:
        whole = client.chat(ask, **GREEDY, logprobs=2)
        assert whole.text and whole.reason == "length" and whole.model == "tales" and whole.request_id
        assert whole.usage.completion_tokens == 12 and whole.usage.total_tokens == 12 + whole.usage.prompt_tokens
        assert len(whole.logprobs) == 12 and all(len(each.top) == 2 for each in whole.logprobs)
        assert "".join(each.token for each in whole.logprobs).strip() == whole.text.strip()
        with client.chat(ask, **GREEDY, logprobs=2, stream=True) as stream:
            pieces = list(stream)
        told = stream.answer()
        assert pieces and "".join(piece.text for piece in pieces) == stream.text == told.text == whole.text
        assert (told.reason, told.logprobs) == (whole.reason, whole.logprobs)
        assert told.usage.total_tokens == whole.usage.total_tokens and told.usage.cached_tokens > 0
        several = client.chat(ask, max_tokens=8, n=3, seed=1)
        assert len({several.text, *(other.text for other in several.alternatives)}) > 1
        assert len(several.alternatives) == 2 and not several.alternatives[0].alternatives
        gone_on = client.complete("Once upon a", echo=True, logprobs=1, **GREEDY)
        assert gone_on.text.startswith("Once upon a") and gone_on.logprobs[0].logprob is None
        assert client.complete("Once upon a", stream=True, **GREEDY).answer().text == gone_on.text[11:]
        held = client.chat("A name?", response_format={"type": "json_object"}, max_tokens=200, seed=1)
        assert held.reason == "length" or isinstance(held.parsed(), dict)
        [model] = client.models()
        assert (model.id, model.task) == ("tales", "chat") and model.context > 100
        found = client.embed(["a king", "a queen"])
        assert len(found.vectors) == 2 and len(found.vectors[0]) > 10 and found.usage.prompt_tokens > 0
        assert len(client.embed("a king", dimensions=7).vectors[0]) == 7
        tokens = client.tokenize("a king")
        assert len(tokens) == len(tokens.ids) == len(tokens.texts) and tokens.context == model.context
        assert client.complete(list(tokens.ids), **GREEDY).text == client.complete("a king", **GREEDY).text
        assert len(client.tokenize([{"role": "user", "content": "a king"}])) > len(tokens)


def test_a_real_model_with_asyncio(served):
    async def main() -> None:
        async with AsyncClient(served) as client:
            ask = "Tell a story about a king."
            answers = await asyncio.gather(*(client.chat(ask, **GREEDY) for _ in range(3)))
            assert len({answer.text for answer in answers}) == 1
            async with client.chat(ask, **GREEDY, stream=True) as stream:
                assert "".join([piece.text async for piece in stream]) == answers[0].text
            assert (await stream.answer()).usage.completion_tokens == 12
            whole = await client.complete("Once", **GREEDY)
            assert (await client.complete("Once", **GREEDY, stream=True).answer()).text == whole.text
            assert [model.id for model in await client.models()] == ["tales"]
            assert len((await client.embed("a king")).vectors) == 1
            assert len(await client.tokenize("a king")) > 1
            with pytest.raises(errors.NotFound):
                await client.chat(ask, model="gpt-4")

    asyncio.run(main())


def test_tools(scripted, client):
    scripted.backend.script = Script(pieces=("Let me see.",), calls=CALLS)
    question = [{"role": "user", "content": "Weather?"}]
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]
    answer = client.chat(question, tools=tools)
    assert [(call.id, call.name, call.parsed()) for call in answer.calls] == [
        ("call_a", "weather", {"city": "Oslo"}),
        ("call_b", "time", {}),
    ]
    assert (answer.text, answer.reason) == ("Let me see.", "tool_calls")
    with client.chat(question, tools=tools, stream=True) as stream:
        assert [part.arguments for piece in stream for part in piece.calls] == ['{"city":', ' "Oslo"}', "{}"]
    assert stream.answer().calls == answer.calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in answer.calls]
    client.chat([*question, answer.message, *results], tools=tools)
    assert [turn["role"] for turn in scripted.backend.requests[-1].messages] == ["user", "assistant", "tool", "tool"]


# Errors


def test_server_errors_are_raised(scripted, client):
    with pytest.raises(errors.NotFound, match="unknown model") as caught:
        client.chat("Hi", model="gpt-4")
    assert caught.value.status == 404 and caught.value.request_id
    with pytest.raises(InvalidParameter) as caught:
        client.chat("Hi", temperature=-1)
    assert caught.value.param == "temperature" and str(caught.value).count("temperature") == 1
    with pytest.raises(InvalidRequest):
        client.chat([])
    with pytest.raises(errors.TooLarge):
        client.chat("Hi " * 2**20)
    scripted.backend.script = Script(refusal=errors.KeyExhausted("spent", 300))
    with pytest.raises(errors.Overloaded, match="spent") as caught:
        client.chat("Hi")
    assert caught.value.retry_after == 300 and len(scripted.backend.requests) == 1
    scripted.backend.script = Script(error=NumericalError("the model computed NaN"))
    with client.chat("Hi", stream=True) as stream, pytest.raises(errors.MoesaicError, match="NaN"):
        list(stream)
    assert stream.text == "Hello, world!"


def test_invalid_arguments_are_refused_before_sending(scripted, client):
    with pytest.raises(InvalidParameter, match="temprature"):
        client.chat("Hi", temprature=0)
    for wrong in (float("nan"), {1, 2}, "\ud800"):
        with pytest.raises(InvalidRequest):
            client.chat("Hi", extra={"user": wrong})
    for url in ("localhost:8000", "ftp://host", "http://"):
        with pytest.raises(InvalidParameter, match="base_url"):
            Client(url)
    with pytest.raises(InvalidParameter) as caught:
        Client(key="secret\n")
    assert "secret" not in str(caught.value)
    assert not scripted.backend.requests
    client.chat("Hi", extra={"unheard_of": 1})


@pytest.mark.parametrize("status", range(400, 600))
def test_errors_keep_the_status_of_the_response(status):
    for body in (b"", b"[]", b'{"error": "no"}', b'{"error": {"message": "no", "param": null, "type": 3}}'):
        error = response_error(status, {"retry-after": "2"}, body)
        assert isinstance(error, errors.MoesaicError) and str(error)
        assert (error.status, error.retry_after, error.request_id) == (status, 2.0, None)


def test_events_are_complete_wherever_the_chunks_are_cut():
    source = ': hi\r\n\r\ndata: {"a": 1}\n\nevent: x\ndata:two\ndata: lines\n\n:\n\nid: 3\r\rdata\n\n'
    source += "data:  spaced\r\n\r\ndatabase: no\n\ndata: ü🐇\n\ndata: cut"
    data = source.encode()
    for size in range(1, len(data) + 1):
        parser = EventParser()
        events = [event for start in range(0, len(data), size) for event in parser.feed(data[start : start + size])]
        assert events == ['{"a": 1}', "two\nlines", "", " spaced", "ü🐇"]
    with pytest.raises(BadReply):
        EventParser().feed(b"data: " + b"x" * (17 << 20))
    with pytest.raises(BadReply):
        EventParser().feed(b"data: \xff\n\n")


# Environment and cancellation


def test_environment_sets_the_url_and_the_key(monkeypatch):
    anna = keys.Key("anna", keys.digest("right"))
    with running(keys=keys.Keys((anna,))) as server:
        monkeypatch.setenv("MOESAIC_BASE_URL", server.url + "/v1")
        monkeypatch.setenv("MOESAIC_API_KEY", "right")
        with Client() as client:
            assert client.chat("Hi").text == "Hello, world!"
        with Client(key="wrong") as client, pytest.raises(Unauthorized):
            client.models()
        assert "right" not in repr(vars(Client()))


def cancelled(server: Server) -> bool:
    for _ in range(400):
        if server.backend.cancelled:
            return True
        time.sleep(0.02)
    return False


def test_leaving_a_stream_cancels_the_request(scripted, client):
    scripted.backend.script = Script(held=True)
    with client.chat("Hi", stream=True) as stream:
        assert next(stream) == Piece("Hello")
    assert cancelled(scripted) and scripted.backend.cancelled == 1
    assert list(stream) == []
    with pytest.raises(StreamBroken):
        stream.answer()


def test_cancelling_a_task_cancels_its_request(scripted):
    scripted.backend.script = Script(held=True)

    async def main() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in client.chat("Hi", stream=True):
                begun.set()

        async with AsyncClient(scripted.url) as client:
            task = asyncio.create_task(read())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert cancelled(scripted)


def test_connection_is_reused_for_streams(scripted, client):
    for _ in range(3):
        with client.chat("Hi", stream=True) as stream:
            list(stream)
    assert scripted.call_sync(lambda: len(scripted.http.server_state.connections)) == 1
