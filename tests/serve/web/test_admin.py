"""The admin page with a real gateway and worker processes, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import allowed
from tests.support.managed_cluster import ManagedCluster, running_cluster
from tests.support.wait import eventually

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

Open = Callable[..., "Page"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ManagedCluster]:
    with running_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def open_page(context: BrowserContext, cluster: ManagedCluster) -> Iterator[Open]:
    """Open the page and enter a key; at the end, check what the page loaded and that it had no errors."""
    opened: list[tuple[Page, list[str], list[str]]] = []

    def open_tab(key: str = "ops", **size: int) -> Page:
        page: Page = context.new_page()
        loaded: list[str] = []
        errors: list[str] = []
        opened.append((page, loaded, errors))
        page.on("request", lambda request: loaded.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        if size:
            page.set_viewport_size(size)  # type: ignore[arg-type]
        page.goto(f"{cluster.url}/web/admin.html")
        if key:
            page.get_by_label("Administrator's key", exact=True).last.fill(cluster.key_texts[key])
            page.get_by_role("button", name="Use this key").click()
        return page

    yield open_tab
    for page, loaded, errors in opened:
        assert [address for address in loaded if not allowed(address, cluster.server)] == []  # type: ignore[arg-type]
        assert errors == []
        violations: Any = page.evaluate("window.violations")
        assert violations == []


def state(page: Page, text: str) -> None:
    page.locator("#state", has_text=text).wait_for()


def row(page: Page, table: str, text: str) -> Any:
    return page.get_by_role("table", name=table).get_by_role("row").filter(has_text=text)


def test_workers_and_queues_are_refreshed(open_page: Open, cluster: ManagedCluster) -> None:
    page = open_page()
    state(page, "accepting requests")
    page.get_by_text("No workers are connected.").wait_for()
    cluster.spawn("w0")
    row(page, "Workers", "rack/w0").get_by_text("working").wait_for()
    asked = [cluster.ask_in_background(f"job {number}", 300) for number in range(4)]
    row(page, "Workers", "rack/w0").get_by_text("2 of 2").wait_for()
    row(page, "Queues", "fake22012").wait_for()  # queued, running, suspects, workers, slots
    for each in cluster.get("jobs?state=leased")["jobs"] + cluster.get("jobs?state=queued")["jobs"]:
        cluster.ok("DELETE", f"jobs/{each['id']}")
    assert all(each() for each in asked)
    row(page, "Workers", "rack/w0").get_by_text("0 of 2").wait_for()


def test_worker_is_drained_and_banned(open_page: Open, cluster: ManagedCluster) -> None:
    worker = cluster.spawn("w0")
    page = open_page()
    page.get_by_role("button", name="Drain rack/w0").click()
    row(page, "Workers", "rack/w0").get_by_text("drained").wait_for()
    assert cluster.gateway.workers.sessions["rack/w0"].drained
    page.get_by_role("button", name="Resume rack/w0").press("Enter")  # by keyboard
    row(page, "Workers", "rack/w0").get_by_text("working").wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Drain rack/w0"
    page.get_by_role("button", name="Ban rack/w0").click()
    page.get_by_role("button", name="Cancel").click()
    assert cluster.gateway.workers.banned == set()
    page.get_by_role("button", name="Ban rack/w0").click()
    page.locator("#sure-yes").click()
    row(page, "Workers", "rack/w0").get_by_text("banned").wait_for()
    # Otherwise the worker does not know that it was banned, and connects again.
    eventually(lambda: not Path(f"/proc/{worker}").exists())
    page.get_by_role("button", name="Resume rack/w0").click()
    page.get_by_text("No workers are connected.").wait_for()


def test_dead_letter_is_revived(open_page: Open, cluster: ManagedCluster) -> None:
    cluster.spawn("w0")
    assert cluster.ask("EXIT").status_code == 500
    page = open_page()
    [job] = cluster.get("jobs?state=dead")["jobs"]
    page.get_by_role("button", name=f"Revive {job['id']}").click()
    page.get_by_text("There are no dead letters.").wait_for()
    assert cluster.get(f"jobs/{job['id']}")["job"]["state"] == "queued"
    cluster.ok("DELETE", f"jobs/{job['id']}")


def test_gateway_is_drained(open_page: Open, cluster: ManagedCluster) -> None:
    page = open_page()
    page.get_by_role("button", name="Drain the gateway").click()
    page.get_by_role("button", name="Drain", exact=True).click()
    state(page, "no new requests")
    assert cluster.server.app.state.draining
    page.get_by_role("button", name="Accept requests again").click()
    state(page, "accepting requests")
    assert not cluster.server.app.state.draining


def test_admin_key_is_requested_and_separate_from_the_chat(open_page: Open, cluster: ManagedCluster) -> None:
    page = open_page("anna")
    page.get_by_text("This page needs an administrator's API key.").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("this needs an administrator's key").wait_for()
    page.get_by_role("button", name="Change the key").click()
    page.get_by_label("Administrator's key", exact=True).last.fill(cluster.key_texts["ops"])
    page.get_by_role("button", name="Use this key").click()
    state(page, "accepting requests")
    stored = page.evaluate("({...sessionStorage, ...localStorage})")
    assert stored == {"moesaic.admin-key": cluster.key_texts["ops"]}
    page.reload()
    state(page, "accepting requests")


def test_hostile_worker_loads_and_runs_nothing(open_page: Open, cluster: ManagedCluster) -> None:
    evil = "<img src=//evil.example/x onerror=window.ran=1><script>window.ran=2</script>"
    cards = [{"name": evil}]
    body = {"name": evil, "models": cards, "about": {evil: evil}}
    page = open_page()
    state(page, "accepting requests")
    assert cluster.call("POST", "/worker/register", body, key="rack").status_code == 200
    row(page, "Workers", evil).first.wait_for()
    row(page, "Queues", evil).wait_for()
    assert page.locator("main img, main script").count() == 0 and page.evaluate("window.ran") is None


def test_layout_on_a_phone(open_page: Open, cluster: ManagedCluster) -> None:
    cluster.spawn("w0")
    page = open_page(width=360, height=740)
    row(page, "Workers", "rack/w0").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for button in page.get_by_role("button").all():
        box = button.bounding_box() if button.is_visible() else None
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 360)


def test_lost_connection_is_shown_and_recovers(
    open_page: Open, cluster: ManagedCluster, context: BrowserContext
) -> None:
    page = open_page()
    state(page, "accepting requests")
    context.set_offline(True)
    page.get_by_text("The server cannot be reached.").wait_for()
    context.set_offline(False)
    state(page, "accepting requests")
    assert not page.locator("#trouble").is_visible()
