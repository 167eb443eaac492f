"""The console's event loop runs no query, so that nobody waits for another one's; its limits hold for all at once."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprune_server.web import events
from fedprune_server.web.events import LiveStream, PendingTopics, Streams
from support.fakes.console_browser import Browser, Trial, trial

PATHS = (
    *(f"/api/v1/{name}" for name in ("me", "site", "jobs", "rounds", "devices", "coverage", "rollouts", "alerts")),
    *("/api/v1/logs", "/api/v1/audit", "/api/v1/orders", "/api/v1/devices/board-0001", "/devices/board-0001"),
    *("/", "/fleet", "/rounds", "/rollouts", "/alerts", "/audit", "/readyz"),
)


@pytest.fixture
def console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trial, set[int]]:
    """A console, and the threads on which something was executed in its databases."""
    threads = set[int]()
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            threads.add(threading.get_ident())
            return super().execute(*arguments)

    monkeypatch.setattr(sqlite3, "connect", lambda *given, **options: connect(*given, factory=Connection, **options))
    return trial(tmp_path), threads


def check_paths(browser: Browser, *paths: str) -> None:
    for path in paths:
        assert browser.get(path).status == 200, path


def test_no_request_runs_a_query_on_the_event_loop(console: tuple[Trial, set[int]]) -> None:
    here, threads = console
    browser = here.browser("admin")
    job = here.console.view.job_names[0]
    threads.clear()
    check_paths(browser, *PATHS)
    check_paths(browser, "/api/v1/devices?q=7&sort=-samples", "/fleet?q=7", "/api/v1/audit?operator=admin")
    assert browser.get("/nowhere").status == 404
    check_paths(browser, f"/api/v1/orders/{browser.order(order='pause', job=job).json['order']}")
    assert browser.form("/login", name="viewer", password="x" * 12, csrf="y").status == 403
    token = here.console.sessions.login_token(browser.cookies[here.console.exposure.login_cookie])
    assert browser.form("/login", name="viewer", password="x" * 12, csrf=token).status == 401
    assert browser.form("/logout", csrf=browser.csrf).status == 303
    assert threads
    assert threading.get_ident() not in threads


class Stand:
    """Requests for streams that are under way at the same time."""

    def __init__(self, streams: Streams, operators: list[str], allowed: Callable[[], bool] = lambda: True) -> None:
        self._streams, self._operators, self._allowed = streams, operators, allowed
        self.statuses: list[int] = []
        self.gone = asyncio.Event()

    async def one(self, operator: str) -> None:
        answer = LiveStream(self._streams, operator, ready=True, is_logged_in=self._allowed)

        async def receive() -> dict[str, Any]:
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])

        await answer({"type": "http"}, receive, send)  # type: ignore[arg-type]

    async def run(self) -> int:
        """Begin all at once; returns how many are open before their readers go away."""
        tasks = [asyncio.create_task(self.one(operator)) for operator in self._operators]
        while len(self.statuses) < len(tasks):
            await asyncio.sleep(0)
        count = len(self._streams)
        self.gone.set()
        await asyncio.gather(*tasks)
        return count


@pytest.mark.parametrize(
    ("operators", "expected"),
    [(["ann"] * 40, events.MAX_STREAMS_OF_OPERATOR), ([f"operator-{i % 30}" for i in range(300)], events.MAX_STREAMS)],
)
def test_the_limit_of_streams_holds_for_requests_at_the_same_time(operators: list[str], expected: int) -> None:
    async def run() -> None:
        streams = Streams()
        stand = Stand(streams, operators)
        assert await stand.run() == expected
        assert sorted(set(stand.statuses)) == [200, 429]
        assert stand.statuses.count(200) == expected
        assert len(streams) == 0, "each leaves as its reader goes away"
        with streams.enter(operators[0]) as pending:
            assert isinstance(pending, PendingTopics)

    asyncio.run(run())
