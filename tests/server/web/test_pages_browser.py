"""What operators do in a browser, in a real one."""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.processes.machine import find_chromium

pytest.importorskip("starlette", reason="the extra console is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, BrowserContext, Page, expect  # noqa: E402

from fedprune_server.web.state.order_queue import Order  # noqa: E402
from fedprune_server.web.state.records import AlertStatus, Rollouts, StatusRecord  # noqa: E402
from fedprune_server.web.state.status_writer import encode_status  # noqa: E402
from support.fakes.console_fleet import ConsoleFleet  # noqa: E402
from support.fakes.served_console import PASSWORD, Carried, ServedConsole  # noqa: E402
from support.waiting import PATIENCE_S  # noqa: E402

pytestmark = pytest.mark.browser

PLACES = {
    "overview": "/",
    "fleet": "/fleet?q=board-000",
    "device": "/devices/board-0004",
    "waiting": "/devices/board-0013",
    "rounds": "/rounds",
    "rollouts": "/rollouts",
    "alerts": "/alerts",
    "audit": "/audit",
}
Open = Callable[..., Page]


class Fleet(ConsoleFleet):
    """A trial fleet that does what it is ordered."""

    def __init__(self) -> None:
        super().__init__(240)
        self.rollout = dict(super().rollouts().rows[0])

    def rollouts(self) -> Rollouts:
        return Rollouts((self.rollout,), ("release-12",)) if hasattr(self, "rollout") else super().rollouts()

    def carry(self, order: Order) -> Carried:
        """Do what is ordered, and publish what follows."""
        records = list(self._status_records(order))
        rows = {order.device: encode_status(self.rows[order.device])} if order.device in self.rows else {}
        return records, rows, f"did {order.kind}"

    def _status_records(self, order: Order) -> Iterator[StatusRecord]:
        if order.kind in ("look", "coverage"):
            yield from self.answer(order)
        if order.kind in ("approve", "revoke"):
            member = {"approve": "member", "revoke": "revoked"}[order.kind]
            state = {"approve": "ready", "revoke": "revoked"}[order.kind]
            self.rows[order.device or ""].update(status=member, state=state, doing=state)
        elif order.kind.startswith("rollout"):
            if order.kind == "rollout_stop":
                self.rollout = {**self.rollout, "state": "stopped", "why": f"by {order.operator}"}
            else:
                number = self.rollout["number"] + 1
                self.rollout = {
                    **self.rollout,
                    "state": "running",
                    "number": number,
                    "release": order.release,
                    "why": "",
                }
            yield self.rollouts()


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedConsole]:
    fleet = Fleet()
    with ServedConsole(tmp_path_factory.mktemp("console"), fleet, fleet.carry, 0.05) as served:
        yield served


@pytest.fixture
def first_rollout(console: ServedConsole) -> Iterator[None]:
    """What a test does to the fleet's rollout, and what it starts after it, is undone after the test."""
    fleet = console.fleet
    assert isinstance(fleet, Fleet)
    before = fleet.rollout
    yield
    fleet.rollout = before
    console.write(fleet.rollouts())


PATIENCE_MS = 1000 * PATIENCE_S


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    expect.set_options(timeout=PATIENCE_MS)
    environment = {
        n: v for n, v in os.environ.items() if n != "LD_PRELOAD"
    }  # what spares tests the disk is none of its
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], env=environment)
        yield launched
        launched.close()


@pytest.fixture
def open_console(console: ServedConsole, browser: Browser) -> Iterator[Open]:
    """Opens a page as somebody who is logged in; at the end no script has failed, and no policy was broken."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_page(path: str, role: str | None = "admin", *, live: bool = True, **options: Any) -> Page:
        options = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options
        context = browser.new_context(base_url=console.url, **options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        if role is not None:
            operator = console.console.accounts.get(role)
            assert operator is not None
            token = console.console.sessions.begin(operator, "127.0.0.1")
            context.add_cookies([{"name": console.console.exposure.cookie, "value": token, "url": console.url}])
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
        console.write()
        page.goto(path)
        if role is not None and live:
            page.wait_for_selector("#live[data-state=open]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def orders(console: ServedConsole, kind: str) -> list[Order]:
    return [o for o in console.orders if o.kind == kind]


def test_logging_in_and_out(open_console: Open) -> None:
    page = open_console("/rounds", None)
    expect(page).to_have_title(re.compile("Log in"))
    page.get_by_label("Name").fill("operator")
    page.get_by_label("Password").fill("not that one at all")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("wrong")
    page.get_by_label("Name").fill("operator")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Rounds")
    expect(page.locator(".who")).to_have_text("operator, operator")
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_title(re.compile("Log in"))
    page.goto("/fleet")
    expect(page).to_have_title(re.compile("Log in"))


def test_finding_a_device_and_reading_its_plan(open_console: Open, console: ServedConsole) -> None:
    page = open_console("/fleet")
    page.get_by_label("Name").fill("BOARD-000")
    expect(page.locator("#found")).to_have_text("10 devices of 240")
    assert page.evaluate("location.search") == "?q=BOARD-000"
    page.get_by_role("link", name="board-0001").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("board-0001")
    limits = page.get_by_role("table", name="Limits of the plan")
    expect(limits.get_by_role("row").filter(has_text="binds")).to_contain_text("memory")
    expect(limits.get_by_role("row").filter(has_text="binds")).to_contain_text("88.6 MB")
    expect(
        page.locator("section", has_text="Predicted and measured").get_by_role("row", name="An update")
    ).to_contain_text("42.0 s")
    expect(page.get_by_role("row", name="Peak memory in training")).to_contain_text("84.1 MB")
    expect(page.locator(".facts", has_text="Runs")).to_contain_text("release 6 in slot b")
    expect(page.locator("svg.strip")).to_have_count(8)
    expect(page.get_by_role("row", name="layer7.conv").first).to_contain_text("128 of 512")
    page.get_by_text("Channels as numbers").click()
    expect(page.get_by_role("region", name="Channels as numbers")).to_contain_text("layer7.conv")


def test_the_table_is_sorted_filtered_and_paged_by_the_server(open_console: Open, console: ServedConsole) -> None:
    def device_names() -> list[str]:
        return page.locator("#devices tbody th").all_inner_texts()

    def names(**asked: Any) -> list[str]:
        return [r["name"] for r in console.console.view.devices(size=100, **asked).items]

    page = open_console("/fleet")
    assert device_names() == names()
    page.get_by_role("link", name="Density").click()
    expect(page.get_by_role("columnheader", name="Density")).to_have_attribute("aria-sort", "ascending")
    page.get_by_role("link", name="Density").click()
    expect(page.get_by_role("columnheader", name="Density")).to_have_attribute("aria-sort", "descending")
    assert device_names() == names(sort="-density")
    page.get_by_role("link", name="Next").click()
    expect(page.locator(".pages")).to_contain_text("page 2 of 3")
    assert device_names() == names(sort="-density", page=2)
    page.get_by_label("State").select_option("excluded")
    expect(page.locator("#found")).to_contain_text("of 240")
    expected = names(sort="-density", only={"state": "excluded"})
    expect(page.locator("#devices tbody tr")).to_have_count(len(expected))
    assert device_names() == expected
    page.go_back()
    expect(page.locator("#found")).to_have_text("240 devices")
    page.goto("/fleet?q=nobody-has-this")
    expect(page.locator("main")).to_contain_text("No device matches")


def test_the_table_stays_live_and_keeps_what_people_do(open_console: Open, console: ServedConsole) -> None:
    page = open_console("/fleet?q=board-0002")
    link = page.get_by_role("link", name="board-0002")
    link.focus()
    row = {**console.fleet.rows["board-0002"], "temperature_c": 99.5, "profile": "<img src=x onerror=alert(1)>"}
    console.write(rows={row["name"]: encode_status(row)})
    expect(page.get_by_role("row", name="board-0002")).to_contain_text("99.5")
    expect(page.get_by_role("row", name="board-0002")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(link).to_be_focused()


def test_who_turns_a_page_is_not_held_up_by_news(open_console: Open) -> None:
    page = open_console("/fleet")
    script = """async () => {
      const { go, show } = await import("/static/swap.js");
      const going = go("/fleet?page=2");
      await show(location.href, { keep: true });
      await going;
      return location.search;
    }"""
    assert page.evaluate(script) == "?page=2"
    expect(page.locator(".pages")).to_contain_text("page 2 of 3")


def test_approving_a_board_that_waits(open_console: Open, console: ServedConsole) -> None:
    page = open_console("/", "operator")
    page.get_by_role("region", name="Waiting for approval").get_by_role("link", name="board-0013").click()
    expect(page.locator(".notice")).to_contain_text("ab12-cd34-ef56-7890")
    page.get_by_role("button", name="Approve").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("ab12-cd34-ef56-7890")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert orders(console, "approve") == []
    page.get_by_role("button", name="Approve").click()
    dialog.get_by_role("button", name="Approve").click()
    expect(page.locator("#said")).to_contain_text("did approve")
    expect(page.locator(".facts", has_text="Member")).to_contain_text("member")
    expect(page.get_by_role("button", name="Approve")).to_have_count(0)
    (order,) = orders(console, "approve")
    assert (order.device, order.key, order.operator) == ("board-0013", "ab12-cd34-ef56-7890", "operator")


def test_revoking_a_board_needs_its_name_and_an_admin(open_console: Open, console: ServedConsole) -> None:
    page = open_console("/devices/board-0008")
    page.get_by_role("button", name="Revoke").click()
    dialog = page.get_by_role("dialog")
    yes = dialog.get_by_role("button", name="Revoke")
    expect(yes).to_be_disabled()
    dialog.get_by_label("Write board-0008 to confirm").fill("board-0009")
    expect(yes).to_be_disabled()
    dialog.get_by_label("Write board-0008 to confirm").fill("board-0008")
    yes.click()
    expect(page.locator("#said")).to_contain_text("did revoke")
    expect(page.locator(".notice.bad")).to_contain_text("This board was revoked")
    assert [o.device for o in orders(console, "revoke")] == ["board-0008"]
    for role, paths in (("operator", ["/devices/board-0009"]), ("viewer", ["/rollouts"])):
        for place in paths:
            page = open_console(place, role)
            expect(page.locator("[data-order*=revoke]")).to_have_count(0)
            if role == "viewer":
                expect(page.locator("[data-order], #start-open")).to_have_count(0)


@pytest.mark.usefixtures("first_rollout")
def test_a_rollout_is_stopped_and_another_one_started(open_console: Open, console: ServedConsole) -> None:
    page = open_console("/rollouts")
    page.get_by_role("button", name="Stop rollout 2").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Boards that have it keep it")
    dialog.get_by_role("button", name="Stop").click()
    expect(page.locator("#said")).to_contain_text("did rollout_stop")
    expect(page.locator("main .mark").first).to_have_text("stopped")
    expect(page.locator(".notice")).to_contain_text("by admin")
    page.get_by_role("button", name="Start a rollout").click()
    page.get_by_label("Release", exact=True).select_option("release-12")
    page.get_by_label("Stages, shares").fill("5, 25, 100%")
    page.get_by_label("These boards alone").fill("board-0001, board-0002")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#said")).to_contain_text("did rollout_start")
    expect(page.get_by_role("heading", level=2)).to_have_text("release-12")
    (order,) = orders(console, "rollout_start")
    assert (order.release, order.groups, order.devices) == (
        "release-12", (0.05, 0.25, 1.0), ("board-0001", "board-0002"),
    )  # fmt: skip


def test_an_alert_is_seen_at_once(open_console: Open, console: ServedConsole) -> None:
    page = open_console("/alerts", "viewer")
    before = console.console.view.alerts(size=1, gone=False).total
    expect(page.locator("#nav .count")).to_have_text(f"{before} open")
    text = "the disk is full <script>alert(1)</script>"
    console.write(AlertStatus("new", time.time(), "disk", "critical", "board-0001", None, text))
    expect(page.get_by_role("region", name="Open").get_by_role("listitem").first).to_contain_text(text)
    expect(page.locator("#nav .count")).to_have_text(f"{before + 1} open")
    console.write(AlertStatus("new", time.time(), "disk", "critical", "board-0001", None, text, time.time()))
    expect(page.get_by_role("region", name="Resolved")).to_contain_text(text)
    page.get_by_label("Text").fill("line 119")
    expect(page.locator("#found")).to_have_text("1 line")


def test_a_round_under_way_and_its_curves(open_console: Open, console: ServedConsole) -> None:
    page = open_console("/rounds", "viewer")
    expect(page.get_by_role("img", name=re.compile("Global accuracy by round"))).to_be_visible()
    expect(page.get_by_role("row", name="layer0.conv").locator("svg rect").first).to_have_class("h10")
    numbers = page.locator("details", has_text="Global loss as numbers")
    numbers.locator("summary").click()
    ended = len(page.locator("section", has_text="Finished rounds").locator("tbody tr").all())
    box = page.locator(".plot").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 2, box["y"] + 20)
    expect(page.locator("figure output").first).to_contain_text("round 1:")
    console.write(console.fleet.round("trial", 26), console.fleet.job("trial"))
    rows = page.locator("section", has_text="Finished rounds").locator("tbody tr")
    expect(rows.first).to_contain_text("26")
    assert len(rows.all()) == min(ended + 1, 25)
    expect(page.locator("figure output").first).to_contain_text("round 1:")  # the pointer still rests there
    expect(numbers.get_by_role("row").nth(1)).to_contain_text("26")
    assert numbers.evaluate("d => d.open")


def test_a_lost_connection_is_said_and_mended(open_console: Open) -> None:
    page = open_console("/fleet")
    page.context.set_offline(True)
    expect(page.get_by_role("alert")).to_contain_text("Connection lost")
    expect(page.locator("#live")).to_have_text("not live")
    page.context.set_offline(False)
    expect(page.locator("#lost")).to_be_hidden()
    expect(page.locator("#live")).to_have_text("live")


def test_pages_can_be_read_without_scripts(open_console: Open) -> None:
    page = open_console("/fleet", live=False, java_script_enabled=False)
    page.get_by_role("link", name="Density").click()
    expect(page.get_by_role("columnheader", name="Density")).to_have_attribute("aria-sort", "ascending")
    page.get_by_label("Name").fill("board-0004")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#found")).to_have_text("1 device of 240")


@pytest.mark.parametrize("place", ["login", *PLACES])
def test_everybody_can_use_the_page(open_console: Open, place: str) -> None:
    """axe finds nothing in light or dark, and a phone's width shows all of it."""
    reason = "axe-playwright-python is not installed"
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=reason).Axe()
    page = open_console(PLACES.get(place, "/login"), None if place == "login" else "admin", color_scheme="light")
    page.evaluate("document.querySelector('details')?.setAttribute('open', '')")
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()
    page.emulate_media(color_scheme="dark")
    results = axe.run(page, options={"runOnly": {"type": "rule", "values": ["color-contrast"]}})
    assert results.violations_count == 0, results.generate_report()
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
