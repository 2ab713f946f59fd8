"""The chat page with the real server, with the model tales and with a scripted one."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.backend import Script, ScriptedBackend
from tests.support.browser import Open
from tests.support.server import Server as Real
from tests.support.server import running


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Real]:
    if getattr(request, "param", "") == "tales":
        yield request.getfixturevalue("tales")
    else:
        with running() as found:
            yield found


@pytest.mark.parametrize("server", ["tales"], indirect=True)
def test_a_real_model_answers_and_a_reload_keeps_it(open_chat: Open, server: Real) -> None:
    chat = open_chat()
    chat.ask("Tell me a story about a rabbit.")
    asked, told = chat.said
    assert asked == "Tell me a story about a rabbit." and len(told) > 40
    chat.stored(max(re.findall(r"[a-z ]+", told), key=len))  # nothing that JSON would escape
    chat.reload()
    assert chat.said[0] == asked and len(chat.said[1]) > 40


def test_stop_cancels_the_request(open_chat: Open, server: Real) -> None:
    server.backend.script = Script(pieces=("Once ", "upon"), held=True)
    chat = open_chat()
    chat.send("Go on")
    chat.wait_for("Once")
    chat.button("Stop").click()
    chat.finished()
    assert isinstance(server.backend, ScriptedBackend)
    chat.wait_for("Stopped before the end.")
    for _ in range(200):
        if server.backend.cancelled:
            break
        chat.page.wait_for_timeout(50)
    assert server.backend.cancelled == 1


def test_selected_model_is_used(open_chat: Open, server: Real) -> None:
    chat = open_chat()
    chat.page.get_by_label("Model").select_option("other")
    chat.ask("Hi")
    assert [ask.model for ask in server.backend.requests] == ["other"]
    assert chat.said[1] == "Hello, world!"


def test_hostile_answer_loads_and_runs_nothing(open_chat: Open, server: Real) -> None:
    evil = "<script>document.title='x'</script> ![a](https://example.org/x.png) [b](javascript:alert(1)) <img src=//x>"
    server.backend.script = Script(pieces=(evil,))
    chat = open_chat()  # the fixture checks what the page loaded, and violations of its policy
    chat.ask("Be evil")
    assert chat.page.locator("#messages img, #messages script").count() == 0
    assert chat.page.title() != "x"
