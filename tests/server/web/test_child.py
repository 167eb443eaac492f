"""The console as a process of its own: it serves what it is told, and ends with its server."""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.core.errors import StorageError
from fedprune_server.web import child
from fedprune_server.web.auth.accounts import Accounts
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.process import SILENCE_LIMIT_S, ConsoleProcess, ConsoleStart
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter
from support.fakes.console_browser import PASSWORD, QUICK, trial
from support.fakes.console_fleet import ConsoleFleet
from support.waiting import until


def settings(folder: Path) -> ConsoleStart:
    return ConsoleStart("127.0.0.1", 0, str(folder), None, None, "all", (), False, os.getpid())


def fetch(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")


@pytest.mark.system
def test_a_console_serves_what_it_is_told_and_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "console.db"
    with ConsoleDatabase(path) as database:
        Accounts(database, QUICK).add("ann", "admin", PASSWORD)
    writer, process = StatusWriter(tmp_path / STATUS_FILE), ConsoleProcess(settings(tmp_path))
    try:
        until(lambda: process.turn(0.0) or process.url)
        url = process.url
        assert fetch(url + "readyz")[0] == 503
        ConsoleFleet(5, 1).publish(writer, at=time.time() + 3600)  # else, in a slow test, the server seems to be silent
        until(lambda: fetch(url + "readyz")[0] == 200)
        assert fetch(url + "healthz") == (200, {"ok": True})
        assert fetch(url + "api/v1/site")[0] == 401
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].strip("/")))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
            assert b" 421 " in raw.recv(4096)
        assert path.stat().st_mode & 0o777 == 0o600
        pid = process.pid
        assert pid is not None
        os.kill(pid, 9)
        until(lambda: (process.turn(1.0), not process.is_alive)[1])
        until(lambda: process.turn(2.0) or process.url)
        assert process.pid != pid
        assert fetch(process.url + "readyz")[0] == 200, "what was published is still there"
        pid = process.pid
        os.kill(pid, signal.SIGSTOP)
        until(lambda: (process.turn(2.0), list(process._child.receive_all(2.0)))[1] == [])
        process.turn(3.0 + SILENCE_LIMIT_S)
        assert not process.is_alive, "it hangs"
    finally:
        process.stop()
    assert not process.is_alive


@pytest.mark.system
def test_one_that_says_nonsense_is_ended_and_after_a_few_times_left_alone(tmp_path: Path) -> None:
    process = ConsoleProcess(settings(tmp_path), ["sh", "-c", "sleep 0.1; echo nonsense; sleep 60"])
    pids = set[int | None]()
    until(lambda: (process.turn(0.0), pids.add(process.pid), process._child._next_start_at)[2])
    assert len(pids - {None}) == 3
    process.turn(1.0)
    assert not process.is_alive
    process.turn(100.0)
    assert process.is_alive
    process.stop()


def test_it_gets_no_secret_of_the_servers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDPRUNE_SERVER_DATABASE", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "CREDENTIALS_DIRECTORY"):
        monkeypatch.setenv(name, "secret")
    out = tmp_path / "environment"
    draft = tmp_path / "part"
    program = (
        f"import os; open({str(draft)!r}, 'w').write(repr(dict(os.environ))); os.rename({str(draft)!r}, {str(out)!r})"
    )
    child = ConsoleProcess(settings(tmp_path), [sys.executable, "-c", program])
    child.turn(0.0)
    until(out.exists)
    child.stop()
    assert "'PATH'" in out.read_text()
    assert "secret" not in out.read_text()


def test_it_looks_again_and_again_for_orders_that_the_server_has_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, signs = list[float](), list[float]()
    monkeypatch.setattr(child, "SWEEP_INTERVAL_S", 0.001)
    here = trial(tmp_path)

    class Orders:
        def expire(self) -> None:
            looks.append(time.monotonic())
            raise StorageError("the audit log can't be written")

    async def serve() -> None:
        while len(looks) < 3:
            await asyncio.sleep(0.001)

    here.console.orders = Orders()  # type: ignore[assignment]
    server: Any = SimpleNamespace(serve=serve)
    asyncio.run(asyncio.wait_for(child._serve_until_end(server, here.console, lambda: signs.append(0.0)), 30))
    assert len(signs) >= 3


@pytest.mark.system
def test_half_requests_of_strangers_keep_nobody_out(tmp_path: Path) -> None:
    StatusWriter(tmp_path / STATUS_FILE).close()
    process = ConsoleProcess(settings(tmp_path))
    strangers: list[socket.socket] = []
    try:
        until(lambda: process.turn(0.0) or process.url)
        port = int(process.url.split(":")[2].strip("/"))
        for n in range(child.MAX_CONNECTIONS + 50):
            raw = socket.create_connection(("127.0.0.1", port))
            length = b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\na"
            start = b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            raw.sendall(start + length if n % 2 else start)
            strangers.append(raw)
        assert fetch(process.url + "healthz") == (200, {"ok": True})
    finally:
        for raw in strangers:
            raw.close()
        process.stop()


def test_nobody_waits_for_another_process_that_writes(tmp_path: Path) -> None:
    now = [1e9]
    browser = trial(tmp_path, clock=lambda: now[0]).browser("viewer")
    writer = sqlite3.connect(tmp_path / "console.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    now[0] += 600  # so that the session's last use would be written
    answers: list[int] = []
    threading.Thread(target=lambda: answers.append(browser.get("/").status), daemon=True).start()
    until(lambda: answers)  # the lock is held all the while
    writer.execute("ROLLBACK")
    writer.close()
    assert answers == [200]
