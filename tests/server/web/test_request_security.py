"""Attacks on the console: nothing is reached without a session, nothing is changed by another site."""

import json
from pathlib import Path

import pytest
from starlette.routing import Mount

from fedprune_server.web.app import make_app, make_routes
from fedprune_server.web.auth.middleware import OPEN_PATHS, SECURITY_HEADERS, STATIC_PREFIX, Exposure, safe_path
from support.fakes.console_browser import PASSWORD, Browser, trial

JSON = {"content-type": "application/json"}


def test_no_route_but_the_open_ones_is_reached_without_a_session(tmp_path: Path) -> None:
    here = trial(tmp_path)
    route_count = 0
    for route in make_routes(here.console).routes:
        if isinstance(route, Mount):
            assert route.path + "/" == STATIC_PREFIX
            continue
        path = str(getattr(route, "path", "")).replace("{name}", "board-0001").replace("{number}", "1")
        if path in OPEN_PATHS:
            continue
        for method in getattr(route, "methods", None) or {"GET"}:
            reply = here.browser().ask(method, path)
            assert reply.status in ((401,) if path.startswith("/api/") else (303,)), (method, path)
            assert b"board-" not in reply.body
            route_count += 1
    assert route_count >= 15
    for path in ("/", "/fleet", "/nowhere", "/api/v1/nowhere", "/docs", "/openapi.json", "/login/", "//login"):
        assert here.browser().get(path).status in (303, 401), path


def test_every_answer_has_the_headers_that_keep_strangers_out(tmp_path: Path) -> None:
    here = trial(tmp_path)
    for reply in (
        here.browser().get("/login"),
        here.browser().get("/api/v1/site"),
        here.browser("viewer").get("/api/v1/site"),
    ):
        assert {k: reply.header(k) for k in SECURITY_HEADERS} == SECURITY_HEADERS
        assert reply.header("cache-control") == "no-store"
    policy = SECURITY_HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


def test_cookies_are_kept_from_scripts_and_other_sites(tmp_path: Path) -> None:
    here = trial(tmp_path)
    plain = here.browser()
    assert all(
        "HttpOnly" in c and "samesite=strict" in c.lower() for c in plain.login(here.console, "viewer").cookies()
    )
    here.console.exposure = Exposure(has_tls=True)

    cookies = Browser(make_app(here.console), secure=True).login(here.console, "viewer").cookies()
    assert cookies
    assert all("Secure" in c and "HttpOnly" in c and "Path=/" in c and c.startswith("__Host-") for c in cookies)


def test_an_order_needs_the_token_and_this_site(tmp_path: Path) -> None:
    here = trial(tmp_path)
    browser = here.browser("operator")
    body = json.dumps({"order": "pause", "job": "trial"}).encode()
    good = {**JSON, "x-csrf-token": browser.csrf}
    for headers in (
        JSON,
        {**JSON, "x-csrf-token": "a" * 43},
        {**JSON, "x-csrf-token": here.browser("operator").csrf},
        {**good, "origin": "https://evil.example"},
        {**good, "origin": "null"},
        {**good, "sec-fetch-site": "cross-site"},
        {**good, "sec-fetch-site": "same-site"},
    ):
        assert browser.ask("POST", "/api/v1/orders", body, headers).status == 403, headers
    plain = {"content-type": "text/plain", "x-csrf-token": browser.csrf}
    assert browser.ask("POST", "/api/v1/orders", body, plain).status == 415
    assert here.orders == []
    assert browser.ask("POST", "/api/v1/orders", body, {**good, "origin": "http://127.0.0.1:8470"}).status == 202
    assert [(o.kind, o.operator) for o in here.orders] == [("pause", "operator")]


def test_nobody_is_logged_out_or_in_by_another_site(tmp_path: Path) -> None:
    here = trial(tmp_path)
    browser = here.browser("viewer")
    assert browser.form("/logout", csrf="guess").status == 403
    assert browser.get("/api/v1/me").status == 200
    stranger = here.browser()
    assert stranger.form("/login", name="viewer", password=PASSWORD).status == 403
    assert (
        stranger.form("/login", name="viewer", password=PASSWORD, csrf=here.console.sessions.login_token("x")).status
        == 403
    )
    assert browser.form("/logout", csrf=browser.csrf).status == 303
    assert browser.get("/api/v1/me").status == 401


def test_a_session_that_was_planted_before_the_login_is_worth_nothing(tmp_path: Path) -> None:
    here = trial(tmp_path)
    attacker, victim = here.browser("viewer"), here.browser()
    planted = attacker.cookies["fedprune"]
    victim.cookies["fedprune"] = planted
    here.console.sessions.end(planted)
    assert victim.login(here.console, "admin").status == 303
    assert victim.cookies["fedprune"] != planted
    assert attacker.get("/api/v1/me").status == 401


def test_a_login_ends_the_session_that_the_browser_had(tmp_path: Path) -> None:
    here = trial(tmp_path)
    browser = here.browser("viewer")
    before = browser.cookies["fedprune"]
    browser.form("/login", csrf="", name="x", password="y")
    nonce = "n"
    browser.cookies[here.console.exposure.login_cookie] = nonce
    reply = browser.form("/login", csrf=here.console.sessions.login_token(nonce), name="admin", password=PASSWORD)
    assert reply.status == 303
    assert here.console.sessions.find(before) is None
    assert browser.get("/api/v1/me").json["name"] == "admin"


def test_sessions_end_with_time_password_and_account(tmp_path: Path) -> None:
    now = [1e9]
    here = trial(tmp_path, clock=lambda: now[0])
    browsers = [here.browser("viewer") for _ in range(3)]
    here.console.accounts.set_password("viewer", "another long password")
    assert browsers[0].get("/api/v1/me").status == 401
    admin = here.browser("admin")
    now[0] += 7 * 3600
    assert admin.get("/api/v1/me").status == 200
    now[0] += 7 * 3600
    assert admin.get("/api/v1/me").status == 200
    now[0] += 11 * 3600
    assert admin.get("/api/v1/me").status == 401
    operator = here.browser("operator")
    here.console.accounts.remove("operator")
    assert operator.get("/api/v1/me").status == 401


def test_guessing_passwords_is_slowed_and_noted(tmp_path: Path) -> None:
    here = trial(tmp_path)
    attacker = here.browser(address="203.0.113.5")
    statuses = [attacker.login(here.console, "admin", f"guess number {i}").status for i in range(12)]
    assert statuses[:4] == [401] * 4
    assert 429 in statuses[4:6]
    assert attacker.login(here.console, "admin").status == 429  # the right one, too
    assert here.browser(address="198.51.100.7").login(here.console, "admin").status == 303
    failed = [r for r in here.console.audit.page().items if r["outcome"] == "failed"]
    assert {r["address"] for r in failed} == {"203.0.113.5"}


def test_unknown_names_and_wrong_passwords_look_alike(tmp_path: Path) -> None:
    here = trial(tmp_path)
    wrong = here.browser(address="203.0.113.5").login(here.console, "admin", "not the password")
    unknown = here.browser(address="203.0.113.6").login(here.console, "nobody", "not the password")
    assert wrong.status == unknown.status == 401
    assert b"nobody" not in unknown.body
    assert here.browser(address="203.0.113.7").login(here.console, "nobody", "nobody's password").status == 401


def test_what_is_given_as_a_name_is_one_plain_line_of_the_audit_log(tmp_path: Path) -> None:
    here = trial(tmp_path)
    here.browser().login(here.console, "eve\n2026 admin login done\x1b[2J" + "x" * 500, "not the password")
    (row,) = here.console.audit.page().items
    assert row["operator"].isprintable()
    assert len(row["operator"]) < 80


def test_bodies_and_addresses_are_bounded(tmp_path: Path) -> None:
    here = trial(tmp_path)
    browser = here.browser("admin")
    headers = {**JSON, "x-csrf-token": browser.csrf}
    large = b"{" + b" " * 70_000 + b"}"
    assert browser.ask("POST", "/api/v1/orders", large, {**headers, "content-length": str(len(large))}).status == 413
    assert browser.ask("POST", "/api/v1/orders", headers=headers, pieces=[b" " * 20_000] * 5).status == 413
    assert browser.ask("POST", "/api/v1/orders", b"[" * 30_000, headers).status == 422
    assert browser.ask("POST", "/api/v1/orders", b"{}", {**headers, "content-length": "-1"}).status == 413
    assert browser.get("/" + "a" * 5000).status == 414
    assert here.browser().ask("POST", "/login", pieces=[b"a" * 40_000] * 2).status == 413


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/..%2fapp.py", "/static//etc/passwd", "/static/../../../../etc/passwd"]
)
def test_no_path_leads_out_of_the_static_files(tmp_path: Path, path: str) -> None:
    reply = trial(tmp_path).browser().get(path)
    assert reply.status in (404, 405)
    assert b"root:" not in reply.body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8470", "127.0.0.1.evil.example", "", "a b", "[::1", "x" * 3000]
)
def test_a_name_that_was_made_to_point_here_is_refused(tmp_path: Path, host: str) -> None:
    here = trial(tmp_path, around=Exposure(hosts=("fleet.example",)))
    assert here.browser(host=host).get("/login").status == 421
    for own_host in ("fleet.example:8470", "localhost:8470", "192.0.2.7", "[::1]:8470"):
        assert here.browser(host=own_host).get("/login").status == 200


def test_a_proxy_is_believed_only_where_there_is_one(tmp_path: Path) -> None:
    here = trial(tmp_path, around=Exposure(has_proxy=True))
    headers = {"x-forwarded-for": "10.0.0.1, 203.0.113.9", "x-forwarded-proto": "https"}
    here.browser().ask("GET", "/login", headers=headers)
    assert all("Secure" in c for c in here.browser().ask("GET", "/login", headers=headers).cookies())
    assert all(
        "Secure" not in c for c in here.browser(address="192.0.2.1").ask("GET", "/login", headers=headers).cookies()
    )
    (tmp_path / "direct").mkdir()
    direct = trial(tmp_path / "direct")
    assert all("Secure" not in c for c in direct.browser().ask("GET", "/login", headers=headers).cookies())


@pytest.mark.parametrize(
    ("next_path", "expected"),
    [("/fleet", "/fleet"), ("//evil.example", "/"), ("https://evil.example", "/"), ("/\\evil.example", "/"),
     ("/a\nb", "/"), ("", "/"), (None, "/"), ("javascript:alert(1)", "/"), ("/devices/a?q=1", "/devices/a?q=1")],
)  # fmt: skip
def test_after_the_login_nobody_is_sent_elsewhere(next_path: str | None, expected: str) -> None:
    assert safe_path(next_path) == expected
