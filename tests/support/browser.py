"""The chat page in a real browser; it records what it loads and runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.web_server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.effectiveDirective} ${event.blockedURI} ${event.sample}`);
});
"""

# No sandbox, because containers do not allow it; all content comes from the tests.
ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP chat.test 127.0.0.1"]


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


def allowed(address: str, server: Server) -> bool:
    """Return whether a URL belongs to the page, or to a file that the page created."""
    own = (f"{server.url}/web/", f"{server.url}/v1/", f"{server.url}/admin/", f"blob:{server.url}/")
    return address.startswith(own) or address.partition("#")[0] == f"{server.url}/"
