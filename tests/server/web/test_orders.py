"""Orders: who may give which, and what is passed on of them."""

from pathlib import Path
from typing import Any

import pytest

from fedprune.jobs.state import Progress
from fedprune_server.web.auth.roles import ORDER_KINDS, ROLES
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.state.order_queue import EXPIRED, ORDER_LIFETIME_S, OrderQueue
from fedprune_server.web.state.records import DEVICE_STATES, MEMBER_STATUSES
from fedprune_server.web.views.formatting import action_text
from support.fakes.console_browser import trial

FIELDS = {
    "pause": {"job": "trial"}, "resume": {"job": "trial"}, "coverage": {"job": "trial"},
    "look": {"device": "board-0001"},
    "approve": {"device": "board-0001", "key": "ab12"}, "deny": {"device": "board-0001"},
    "revoke": {"device": "board-0001"}, "release_quarantine": {"device": "board-0001"},
    "rollout_start": {"release": "release-5"}, "rollout_stop": {}, "rollout_pause": {}, "rollout_resume": {},
    "rollout_back": {"release": "5"},
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_each_role_gives_its_orders_and_no_others(tmp_path: Path, role: str) -> None:
    here = trial(tmp_path)
    browser = here.browser(role)
    for kind, order in ORDER_KINDS.items():
        may = ROLES.index(role) >= ROLES.index(order.role)
        assert browser.order(order=kind, **FIELDS[kind]).status == (202 if may else 403), kind
        assert (kind in [o.kind for o in here.orders]) is may
    assert browser.get("/api/v1/audit").status == (200 if role == "admin" else 403)


def test_the_audit_log_has_the_target_of_an_order_that_was_refused(tmp_path: Path) -> None:
    here = trial(tmp_path)
    assert here.browser("viewer").order(order="revoke", device="board-0001", reason="x" * 400).status == 403
    entry = here.browser("admin").get("/api/v1/audit").json["items"][1]
    assert (entry["action"], entry["what"]["device"]) == ("revoke", "board-0001")
    assert len(entry["what"]["reason"]) < 200


@pytest.mark.parametrize(("allowed", "status"), [("none", (403, 403)), ("look", (202, 403)), ("all", (202, 202))])
def test_a_server_that_takes_no_orders_gets_none(tmp_path: Path, allowed: str, status: tuple[int, int]) -> None:
    browser = trial(tmp_path, allowed=allowed).browser("admin")
    assert (
        browser.order(order="look", device="board-0001").status,
        browser.order(order="pause", job="trial").status,
    ) == status


@pytest.mark.parametrize(
    "body",
    [
        {}, {"order": "shutdown"}, {"order": ["pause"]}, {"order": "pause"}, {"order": "pause", "job": "a/b"},
        {"order": "pause", "job": 7}, {"order": "look", "device": "../etc"}, {"order": "look", "device": "a\nb"},
        {"order": "pause", "job": "trial", "operator": "root"}, {"order": "pause", "job": "trial", "number": 9},
        {"order": "rollout_start", "release": "../../x"}, {"order": "rollout_start", "release": "r", "groups": "all"},
        {"order": "rollout_start", "release": "r", "devices": ["a"] * 101},
        {"order": "rollout_stop", "reason": "\x1b[2J"}, {"order": "rollout_back"},
        {"order": "look", "device": "a", "devices": ["d" * 64] * 100, "reason": "\u00e9" * 500},  # too long a line
    ],
)  # fmt: skip
def test_an_order_that_is_none_goes_nowhere(tmp_path: Path, body: dict[str, Any]) -> None:
    here = trial(tmp_path)
    assert here.browser("admin").order(**body).status == 422
    assert here.orders == []


def test_a_filter_with_a_value_that_it_cant_have_is_refused_with_those_that_it_can(tmp_path: Path) -> None:
    browser = trial(tmp_path).browser("viewer")
    for path in (
        "/devices?state=nonsense", "/devices?online=maybe", "/devices?sort=colour", "/alerts?gone=1",
        "/logs?level=loud", "/rounds?page=first", "/devices?size=0",
    ):  # fmt: skip
        reply = browser.get(f"/api/v1{path}")
        subject = path.partition("?")[2].partition("=")[0]
        assert (reply.status, reply.json["error"].partition(":")[0]) == (422, subject)
    for row in browser.get("/api/v1/devices?state=&size=500").json["items"]:
        assert row["state"] in DEVICE_STATES
        assert row["status"] in MEMBER_STATUSES
    assert {p.value for p in Progress} < set(DEVICE_STATES)


@pytest.mark.parametrize("number", ["x", "1.5", "9" * 23, "9" * 500, str(2**63)])
def test_a_number_in_an_address_that_is_none_is_refused(tmp_path: Path, number: str) -> None:
    browser = trial(tmp_path).browser("admin")
    for path in (f"orders/{number}", f"devices?page={number}", f"devices?size={number}", f"audit?page={number}"):
        reply = browser.get(f"/api/v1/{path}")
        assert (reply.status, set(reply.json)) == (422, {"error"}), path
        assert len(reply.json["error"]) < 300
    assert browser.get(f"/fleet?page={number}").status == 422
    last = 2**63 - 1
    assert browser.get(f"/api/v1/orders/{last}").status == 404
    assert browser.get(f"/api/v1/devices?page={last}").json["page"] == 1  # the last one that there is
    assert browser.order(order="look", device="a", until=1).status == 422
    body = b'{"order": "rollout_start", "release": "one", "groups": [%s]}' % number.encode()
    headers = {"content-type": "application/json", "x-csrf-token": browser.csrf}
    assert browser.ask("POST", "/api/v1/orders", body, headers).status == 422


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"order": "pause", "job": "trail"}, "no job trail"),
        ({"order": "look", "device": "board-001"}, "no device board-001"),
        ({"order": "rollout_start", "release": "release-5", "devices": ["board-0001", "nobody"]}, "no device nobody"),
    ],
)
def test_an_order_about_what_is_not_there_is_refused_by_name(
    tmp_path: Path, body: dict[str, Any], message: str
) -> None:
    here = trial(tmp_path)
    reply = here.browser("admin").order(**body)
    assert (reply.status, here.orders) == (404, [])
    assert reply.json["error"].startswith(message)


def test_the_server_answers_for_boards_that_may_not_be_published_yet(tmp_path: Path) -> None:
    here = trial(tmp_path)
    admin = here.browser("admin")
    for kind in ("approve", "deny"):  # a board that has just asked is published a moment later
        assert admin.order(order=kind, device="nobody", key="ab12").status == 202
    here.writer.clear()  # the server has started again, and is about to publish its devices
    here.write(*list(here.fleet.begin())[:4])
    assert admin.order(order="look", device="nobody").status == 202
    assert admin.order(order="pause", job="nobodys").status == 404
    here.write(whole=True)
    assert admin.order(order="look", device="nobody").status == 404


def test_the_answer_to_an_order_is_shown_and_noted(tmp_path: Path) -> None:
    here = trial(tmp_path)
    browser = here.browser("operator", address="192.0.2.8")
    number = browser.order(order="pause", job="trial").json["order"]
    assert browser.get(f"/api/v1/orders/{number}").json["state"] == "waiting"
    assert here.console.audit.changes() == {"audit"}
    here.answer(number, True, "job trial is paused")
    here.answer(number, False, "answered twice")
    here.answer(999, True, "of no order")
    answer = browser.get(f"/api/v1/orders/{number}").json
    assert (answer["state"], answer["ok"], answer["text"]) == ("done", True, "job trial is paused")
    assert (here.console.audit.changes(), here.console.audit.changes()) == ({"audit"}, set())
    page = here.console.audit.page(operator="operator")
    rows = [(r["address"], action_text(r), r["outcome"]) for r in page.items if r["action"] != "login"]
    assert rows == [("192.0.2.8", "pause job trial", "done: job trial is paused")]
    assert page.total == len(page.items)


def test_an_order_that_was_answered_as_the_server_looked_is_not_carried_out(tmp_path: Path) -> None:
    now = [1e9]
    here = trial(tmp_path, clock=lambda: now[0])
    number = here.browser("operator", address="192.0.2.8").order(order="pause", job="trial").json["order"]

    class Late(ConsoleDatabase):
        """Its first answer comes after the orders in it have expired."""

        def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
            rows = super().rows(query, *values)
            if "'waiting'" in query:
                now[0] += ORDER_LIFETIME_S + 60
                here.console.orders.expire()
            return rows

    with Late(here.database.path) as late:
        assert OrderQueue(late, lambda: 1e9).take(9) == []
    order = here.console.orders.get(number)
    assert order is not None
    assert (order["state"], order["ok"], order["text"]) == ("done", False, EXPIRED)


def test_an_order_that_the_server_does_not_take_expires(tmp_path: Path) -> None:
    now = [1e9]
    here = trial(tmp_path, clock=lambda: now[0])
    browser, desk = here.browser("operator", address="192.0.2.8"), here.console.orders
    numbers = [browser.order(order=kind, job="trial").json["order"] for kind in ("pause", "resume", "coverage")]
    assert {o.until for o in here.orders} == {1e9 + ORDER_LIFETIME_S}
    assert [o.number for o in OrderQueue(here.database, lambda: now[0]).take(1)] == numbers[:1]
    now[0] += ORDER_LIFETIME_S + 1
    assert OrderQueue(here.database, lambda: now[0]).take(9) == []
    desk.expire()
    assert {orders["state"] for n in numbers if (orders := desk.get(n))} == {"waiting"}, "the server may be taking them"
    now[0] += 60
    desk.expire()
    desk.expire()
    here.answer(numbers[0], True, "job trial is paused")  # was taken in time, and took long
    here.answer(numbers[1], True, "too late")
    orders = [(o["state"], o["ok"], o["text"]) for n in numbers if (o := desk.get(n)) is not None]
    assert orders == [("done", True, "job trial is paused"), ("done", False, EXPIRED), ("done", False, EXPIRED)]
    entries = [(r["action"], r["outcome"]) for r in here.console.audit.page().items[:2]]
    assert entries == [("resume", EXPIRED), ("pause", "done: job trial is paused")]


def test_orders_are_rationed(tmp_path: Path) -> None:
    browser = trial(tmp_path).browser("viewer")
    assert [browser.order(order="look", device="board-0001").status for _ in range(62)] == [202] * 60 + [429] * 2


def test_a_server_that_says_nothing_gets_no_orders(tmp_path: Path) -> None:
    now = [1e9]
    browser = trial(tmp_path, clock=lambda: now[0]).browser("admin")
    now[0] += 60
    assert browser.order(order="pause", job="trial").status == 503
    assert browser.get("/readyz").status == 503
    assert browser.get("/healthz").status == 200
