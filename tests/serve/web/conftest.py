"""Fixtures: a server, and browser pages that record what they load and run."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.web.stub import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.effectiveDirective} ${event.blockedURI} ${event.sample}`);
});
"""

# No sandbox, because containers do not allow it; all content comes from the tests.
ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP chat.test 127.0.0.1"]


@pytest.fixture
def server() -> Iterator[Server]:
    """The server of the page. Test modules override it with other servers."""
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("Playwright is not installed (pip install playwright)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@dataclass
class Chat:
    """The chat page in one tab, and the actions on it."""

    page: Page
    server: Server
    loaded: list[str] = field(default_factory=list)
    """Every URL that the page has requested."""
    errors: list[str] = field(default_factory=list)

    def send(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.get_by_role("button", name="Send", exact=True).click()

    def ask(self, text: str) -> None:
        """Send a message and wait for the complete answer."""
        self.send(text)
        self.finished()

    def finished(self) -> None:
        self.page.locator("#send:visible").wait_for()

    def wait_for(self, text: str) -> None:
        self.page.locator("#messages").get_by_text(text).first.wait_for()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def said(self) -> list[str]:
        """The texts of all messages."""
        return [text.strip() for text in self.page.locator("#messages article .body").all_inner_texts()]

    def listed(self, *titles: str) -> None:
        """Wait until the list has these conversations in this order."""
        from playwright.sync_api import expect

        expect(self.page.locator("#conversations a")).to_have_text(list(titles), timeout=20_000)

    def reload(self) -> None:
        self.page.reload()
        self.ready()

    def ready(self) -> None:
        self.page.locator("#model:enabled").wait_for()

    def stored(self, text: str) -> None:
        """Wait until a conversation that contains this text is stored."""
        self.page.evaluate(
            """async (text) => {
              const { Store } = await import("/web/store.js");
              const store = new Store(() => undefined);
              while (!JSON.stringify(await store.all()).includes(text)) await new Promise(requestAnimationFrame);
            }""",
            text,
        )


Open = Callable[..., Chat]


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


def allowed(address: str, server: Server) -> bool:
    """Return whether a URL belongs to the page, or to a file that the page created."""
    own = (f"{server.url}/web/", f"{server.url}/v1/", f"{server.url}/admin/", f"blob:{server.url}/")
    return address.startswith(own) or address.partition("#")[0] == f"{server.url}/"


@pytest.fixture
def chat(open_chat: Open) -> Chat:
    return open_chat()
