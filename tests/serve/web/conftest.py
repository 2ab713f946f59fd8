"""Fixtures: a server, and browser pages that record what they load and run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import WATCH, Chat, Open, allowed
from tests.support.web_server import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext


@pytest.fixture
def server() -> Iterator[Server]:
    """The server of the page. Test modules override it with other servers."""
    with serving() as running:
        yield running


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US", reduced_motion="reduce")
    made.set_default_timeout(20_000)
    made.add_init_script(WATCH)
    yield made
    made.close()


@pytest.fixture
def open_chat(context: BrowserContext, server: Server) -> Iterator[Open]:
    """Open the chat in new tabs; at the end, check that they loaded only the page's URLs and had no errors."""
    opened: list[Chat] = []

    def open_tab(path: str = "/", *, ready: bool = True) -> Chat:
        chat = Chat(context.new_page(), server)
        opened.append(chat)
        chat.page.on("request", lambda request: chat.loaded.append(request.url))
        chat.page.on("pageerror", lambda error: chat.errors.append(str(error)))
        chat.page.on("dialog", lambda dialog: chat.errors.append(f"dialog: {dialog.message}"))
        chat.page.goto(server.url + path)
        if ready:
            chat.ready()
        return chat

    yield open_tab
    for chat in opened:
        assert [address for address in chat.loaded if not allowed(address, server)] == []
        assert chat.errors == []
        violations: Any = chat.page.evaluate("window.violations")
        assert violations == []


@pytest.fixture
def chat(open_chat: Open) -> Chat:
    return open_chat()
