"""Stored conversations in a real browser: reloads, several tabs, export and import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.console import conversation_file
from tests.support.browser import Chat, Open
from tests.support.web_server import Server, says


def take(chat: Chat, path: Path) -> None:
    chat.page.locator("#file").set_input_files(path)


def test_reload_during_an_answer_keeps_the_text(chat: Chat, server: Server) -> None:
    server.will_say(says("A long ", "tale", hold=1), says("tale of foxes."))
    chat.send("Tell me")
    chat.wait_for("A long")
    chat.reload()
    chat.wait_for("A long")
    assert chat.said == ["Tell me", "A long"]
    chat.wait_for("Stopped before the end.")
    assert server.cancelled.acquire(timeout=20)
    chat.button("Continue").click()
    chat.wait_for("A long tale of foxes.")
    chat.finished()
    chat.stored("tale of foxes.")
    chat.reload()
    assert chat.said == ["Tell me", "A long tale of foxes."]


def test_list_and_search(chat: Chat, server: Server) -> None:
    chat.ask("About apples")
    chat.button("New conversation").click()
    chat.page.locator("#welcome:visible").wait_for()
    chat.ask("About pears")
    chat.listed("About pears", "About apples")
    chat.page.get_by_role("link", name="About apples").click()
    chat.wait_for("You said: About apples")
    chat.page.get_by_label("Search conversations").fill("SAID: about pe")
    chat.page.get_by_role("link", name="About apples").wait_for(state="detached")
    chat.listed("About pears")
    chat.page.get_by_label("Search conversations").fill("plums")
    chat.page.get_by_text("Nothing found").wait_for()


def test_rename_delete_and_undo(chat: Chat) -> None:
    chat.ask("Hello")
    row = chat.page.locator("#conversations li")
    row.hover()
    row.get_by_role("button", name="Rename Hello").click()
    chat.page.get_by_label("Title").fill("Greetings")
    chat.page.keyboard.press("Enter")
    chat.page.get_by_role("link", name="Greetings").wait_for()
    row.hover()
    row.get_by_role("button", name="Delete Greetings").click()
    row.wait_for(state="detached")
    assert chat.said == []
    chat.button("Undo").click()
    chat.page.get_by_role("link", name="Greetings").click()
    chat.wait_for("You said: Hello")


def test_answer_continues_in_a_conversation_that_is_not_open(chat: Chat, server: Server) -> None:
    server.will_say(says("Slow ", "but steady.", hold=1))
    chat.send("Tortoise")
    chat.wait_for("Slow")
    chat.button("New conversation").click()
    chat.ask("Hare")
    assert chat.said == ["Hare", "You said: Hare"]
    server.release()
    chat.page.get_by_role("link", name="Tortoise").click()
    chat.wait_for("Slow but steady.")
    chat.finished()
    assert not server.cancelled.acquire(blocking=False)


def test_two_tabs_do_not_overwrite_each_other(open_chat: Open, server: Server) -> None:
    one = open_chat()
    one.ask("Shared")
    one.stored("You said: Shared")
    other = open_chat("/" + one.page.evaluate("location.hash"))
    other.wait_for("You said: Shared")
    server.will_say(says("From the first", ", done", hold=1))
    one.send("First tab")
    one.wait_for("From the first")
    server.will_say(says("From the second"))
    other.page.get_by_text("First tab").first.wait_for()  # it follows the other tab
    other.ask("Second tab")
    other.stored("From the second")
    server.release()
    one.finished()
    one.stored("From the first, done")
    one.page.get_by_text("kept as a copy").wait_for()
    one.page.get_by_role("link", name="Shared (copy)").wait_for()
    assert one.said[-1] == "From the first, done"
    assert other.said[-1] == "From the second"
    one.reload()
    one.listed("Shared", "Shared (copy)")


def test_two_tabs_with_two_conversations(open_chat: Open, server: Server) -> None:
    one, other = open_chat(), open_chat()
    server.will_say(says("Part one", " and two", hold=1))
    one.send("First")
    one.wait_for("Part one")
    other.ask("Second")
    server.release()
    one.finished()
    one.stored("Part one and two")
    other.page.get_by_role("link", name="First").wait_for()
    for chat in (one, other):
        chat.reload()
        chat.listed("Second", "First")


def test_conversation_deleted_in_another_tab(open_chat: Open) -> None:
    one = open_chat()
    one.ask("Hello")
    one.stored("You said: Hello")
    other = open_chat()
    other.page.locator("#conversations li").hover()
    other.button("Delete Hello").click()
    one.page.get_by_text("This conversation was deleted in another tab.").wait_for()
    assert one.said == []


def test_export_and_import(chat: Chat, tmp_path: Path) -> None:
    chat.ask("Grüße 🐇")
    chat.button("New conversation").click()
    chat.ask("Zweite")
    with chat.page.expect_download() as waiting:
        chat.button("Export all").click()
    path = tmp_path / "all.json"
    waiting.value.save_as(path)
    for _ in range(2):
        chat.page.locator("#conversations li").first.hover()
        chat.page.locator("#conversations li").first.get_by_role("button", name="Delete").click()
        chat.page.get_by_text("was deleted.").first.wait_for()
    chat.page.get_by_text("Conversations are stored in this browser only.").wait_for()
    take(chat, path)
    chat.page.get_by_text("2 conversations were imported.").wait_for()
    chat.listed("Zweite", "Grüße 🐇")
    chat.page.get_by_role("link", name="Grüße").click()
    chat.wait_for("You said: Grüße 🐇")


def test_export_is_compatible_with_the_console(chat: Chat, server: Server, tmp_path: Path) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be kind.")
    chat.page.get_by_label("Temperature", exact=True).fill("0.3")
    chat.ask("Hello")
    with chat.page.expect_download() as waiting:
        chat.button("Export this conversation").click()
    path = tmp_path / "one.json"
    waiting.value.save_as(path)
    found = conversation_file.read(path)
    assert [message["content"] for message in found.messages] == ["Be kind.", "Hello", "You said: Hello"]
    assert found.settings == {"temperature": 0.3}
    conversation_file.write(
        path,
        conversation_file.SavedConversation([*found.messages, {"role": "user", "content": "Bye"}], {"stop": ["x"]}),
        "other",
    )
    chat.button("New conversation").click()
    take(chat, path)
    chat.page.get_by_text("1 conversation was imported.").wait_for()
    chat.page.locator("#conversations a").first.click()
    chat.page.locator("#messages").get_by_text("Bye").wait_for()
    assert chat.said == ["Hello", "You said: Hello", "Bye"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\xff", "not JSON"),
        (b"null", "no Moesaic conversations"),
        (b'{"moesaic": 1, "messages": [{"role": "wizard", "content": "x"}]}', "message 1"),
    ],
)
def test_invalid_file_is_refused_with_one_message(chat: Chat, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    take(chat, path)
    chat.page.locator(".notice").get_by_text(message).wait_for()
    assert chat.page.locator(".notice").count() == 1
    chat.listed()


def test_full_store_is_reported(chat: Chat, tmp_path: Path) -> None:
    said: Any = {"messages": [{"role": "user", "content": "x"}]}
    path = tmp_path / "many.json"
    path.write_text(json.dumps({"moesaic": 1, "conversations": [said] * 1001}))
    take(chat, path)
    chat.page.get_by_text("No room for more: the limit is 1000 conversations").wait_for()
    chat.listed()
