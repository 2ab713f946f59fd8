"""The states of models in the chat and on the admin page, with a real server of two real models, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import Open
from tests.support.http import Raw
from tests.support.many_models import ManyModels, body, many_models
from tests.support.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator, Page

PRESETS = '[sailor]\nbase = "two"\ndescription = "Tells of the sea."\nsampling = {temperature = 0, max_tokens = 12}\n'


@pytest.fixture
def many(tmp_path: Path) -> Iterator[ManyModels]:
    (tmp_path / "presets.toml").write_text(PRESETS)
    with many_models(tmp_path / "presets.toml") as running:
        yield running
        while Raw.opened:
            Raw.opened.pop().socket.close()


@pytest.fixture
def server(many: ManyModels, context: BrowserContext) -> Server:
    """The server of the page, and keys that the pages have already."""
    context.add_init_script('sessionStorage["moesaic.key"] = "anna"; sessionStorage["moesaic.admin-key"] = "ops";')
    return many.server


def options(page: Page) -> list[str]:
    return page.locator("#model option").all_inner_texts()


def row(page: Page, model: str) -> Locator:
    return page.get_by_role("table", name="Models").get_by_role("row").filter(has_text=model)


def test_models_and_presets_are_grouped_with_their_states(open_chat: Open) -> None:
    page = open_chat().page
    assert options(page) == ["one", "two (loads on first use)", "sailor (loads on first use)"]
    assert page.locator("#model optgroup").evaluate_all("groups => groups.map(({label}) => label)") == [
        "Models",
        "Presets",
    ]
    page.get_by_label("Model").select_option("sailor")
    assert page.get_by_label("Model").get_attribute("title") == "Tells of the sea."


def test_the_page_says_that_a_model_is_loaded_until_it_answers(open_chat: Open, many: ManyModels) -> None:
    chat = open_chat()
    chat.page.get_by_label("Model").select_option("sailor")
    many.gate.clear()
    chat.send("Tell of a fox.")
    chat.wait_for("Loading two …")
    chat.page.locator("#model option", has_text="two (loading …)").wait_for(state="attached")
    many.gate.set()
    chat.finished()
    assert len(chat.said) == 2 and chat.said[1]
    assert (
        chat.page.get_by_text("Loading two").count() == chat.page.locator("#spoken").get_by_text("Loading two").count()
    )
    chat.page.locator("#model option", has_text="loads").wait_for(state="detached")
    assert options(chat.page) == ["one", "two", "sailor"]


def test_a_model_that_fell_asleep_unnoticed_is_shown_too(open_chat: Open, many: ManyModels) -> None:
    chat = open_chat()
    many.admin("models/one/unload")  # the page still shows it as loaded
    many.gate.clear()
    chat.send("Tell of a fox.")
    chat.wait_for("Loading one …")
    many.gate.set()
    chat.finished()


@pytest.fixture
def open_admin(open_chat: Open) -> Callable[[], Page]:
    return lambda: open_chat("/web/admin.html", ready=False).page


def test_an_administrator_loads_and_unloads_models(open_admin: Callable[[], Page], many: ManyModels) -> None:
    page = open_admin()
    page.get_by_role("heading", name="Server").wait_for()
    assert page.get_by_role("heading", name="Workers").count() == 0
    row(page, "one").get_by_text("loaded", exact=True).wait_for()
    many.gate.clear()
    page.get_by_role("button", name="Load two").click()
    row(page, "two").get_by_text("loading").wait_for()
    assert row(page, "two").get_by_role("button").count() == 0
    many.gate.set()
    row(page, "two").get_by_text("loaded", exact=True).wait_for()
    page.get_by_role("button", name="Unload two").click()
    row(page, "two").get_by_text("unloaded").wait_for()
    assert many.states()["two"] == "unloaded"


def test_an_administrator_ends_answers_only_after_a_question(open_admin: Callable[[], Page], many: ManyModels) -> None:
    endless = body("one", stream=True, max_tokens=900, ignore_eos=True, n=64)
    raw = Raw(many.server).post(endless, "Authorization: Bearer anna")
    raw.until(b"data: ")
    page = open_admin()
    page.get_by_role("button", name="Unload one").click()
    page.get_by_role("button", name="Unload now one").click()
    page.get_by_text("Its running answers end with an error.").wait_for()
    assert many.manager.entry("one").loaded is not None
    page.locator("#sure-yes").click()
    row(page, "one").get_by_text("unloaded").wait_for()
    assert b'"error"' in raw.until(b'"error"')


def test_the_chat_has_no_buttons_for_administrators(open_chat: Open, many: ManyModels) -> None:
    chat = open_chat()
    assert chat.page.get_by_role("button", name="Unload").count() == 0
    assert not [url for url in chat.loaded if "/admin/" in url]
