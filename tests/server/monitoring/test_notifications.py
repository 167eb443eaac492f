"""Notifications: what is due and when, and that they arrive, are signed, retried, and block nothing."""

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ConfigError, ExitCode
from fedprune_server.app import monitoring
from fedprune_server.cli.main import main
from fedprune_server.config.alert_settings import AlertSettings, shown_url
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.setting import read_table
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.monitor_record import read_monitor_record
from fedprune_server.monitoring.notification_channels import (
    MAX_ALERTS_LISTED,
    AppriseService,
    Message,
    NotificationError,
    Webhook,
    notification_channels,
)
from fedprune_server.monitoring.notifications import (
    MAX_TRIES,
    MAX_WAITING_MESSAGES,
    NotificationQueue,
    NotificationSchedule,
    Notifier,
)
from support.fakes.tiny_job import JOB
from support.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # which Apprise imports

NOON = datetime(2026, 3, 4, 12, 0).timestamp()
HOUR = 3600.0


def alert(kind: str = "no-devices", severity: str = "critical", **values: Any) -> Alert:
    return Alert(**{"kind": kind, "severity": severity, "since": NOON, "what": kind, "why": "y", "todo": "t"} | values)


def message(event: str = "opened") -> Message:
    return Message(event, NOON, "lab", (alert(job="leaves"),))


class Recorder(BaseHTTPRequestHandler):
    """Answers with the codes that it is given, then with 204, and keeps what it was sent."""

    got: list[tuple[str, dict[str, str], bytes]]
    codes: list[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.got.append((f"{self.command} {self.path}", dict(self.headers), body))
        code = self.codes.pop(0) if self.codes else 204
        self.send_response(code)
        if code == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
        self.end_headers()

    do_GET = do_POST  # noqa: N815 - the base's name

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass


@contextmanager
def web(*codes: int) -> Iterator[tuple[str, list[tuple[str, dict[str, str], bytes]]]]:
    handler = type("Handler", (Recorder,), {"got": [], "codes": list(codes)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/hook/s3cret", handler.got  # type: ignore[attr-defined]
        finally:
            server.shutdown()


# What is due.


def test_an_alert_is_sent_once_and_its_end_is_sent() -> None:
    due, sent = NotificationSchedule(AlertSettings(), "lab"), []
    for minute in range(150):
        opened = [alert()] if minute < 140 else []
        sent += [(minute, m.event) for m in due.due_messages(opened, 60.0 * minute, NOON)]
    assert sent == [(0, "opened"), (140, "resolved")]


def test_what_is_not_severe_enough_is_not_told_and_its_end_neither() -> None:
    due = NotificationSchedule(AlertSettings(severity="critical", resolved=False), "lab")
    assert due.due_messages([alert(severity="warning")], 0.0, NOON) == []
    assert due.due_messages([], 100.0, NOON) == []
    assert len(due.due_messages([alert()], 200.0, NOON)) == 1
    assert due.due_messages([], 300.0, NOON) == [], "ends are not wanted"


def test_many_alerts_are_one_message_and_the_critical_one_waits_for_nothing() -> None:
    due = NotificationSchedule(AlertSettings(), "lab")
    waiting = [alert("devices-wait", "warning", what=f"d{i} waits", device=f"d{i}") for i in range(60)]
    ends = [alert("certificate", "warning", subject=f"{i}.pem") for i in range(30)]
    (first,) = due.due_messages(waiting[:1], 0.0, NOON)
    assert [due.due_messages(waiting[:n], float(n), NOON) for n in range(2, 29)] == [[]] * 27
    (urgent,) = due.due_messages([*waiting, *ends, alert()], 29.0, NOON)
    (boards,) = [a for a in urgent.alerts if a.kind == "devices-wait"]
    assert (first.alerts[0].what, first.alerts[0].device) == ("d0 waits", "d0")
    assert (boards.what, boards.device) == ("59 boards (d1, d2, d3, d4, d5 and 54 more): d1 waits", None)
    assert urgent.alerts[0].severity == "critical"
    body = json.loads(urgent.to_bytes())
    assert (body["count"], len(body["alerts"])) == (32, MAX_ALERTS_LISTED)
    assert "and 12 more" in urgent.text
    (ended,) = due.due_messages([], 60.0, NOON)
    assert "60 boards" in next(a.what for a in ended.alerts if a.kind == "devices-wait")


def test_a_restarted_server_does_not_tell_again_but_tells_the_end() -> None:
    due = NotificationSchedule(AlertSettings(), "lab", notified=[alert()])
    assert due.due_messages([alert()], 0.0, NOON) == []
    assert [m.event for m in due.due_messages([], 62.0, NOON)] == ["resolved"]


def test_an_alert_that_changes_its_severity_is_sent_again_if_it_got_worse_and_resolved_once() -> None:
    due, sent = NotificationSchedule(AlertSettings(), "lab"), []
    for second, severity in enumerate(["warning"] * 60 + ["critical"] * 60 + ["warning"] * 60 + [""] * 60):
        opened = [alert("disk", severity)] if severity else []
        sent += [(second, m.event, m.alerts[0].severity) for m in due.due_messages(opened, float(second), NOON)]
    assert sent == [(0, "opened", "warning"), (60, "opened", "critical"), (180, "resolved", "critical")]


def test_a_new_text_is_not_sent_again_and_the_end_is_told_in_the_latest() -> None:
    due, sent = NotificationSchedule(AlertSettings(), "lab"), []
    texts = ["a is away", "a and b are away", "b is away"]
    for second, text in enumerate([*texts, ""]):
        opened = [alert("rollout", "warning", what=text)] if text else []
        sent += [(m.event, m.alerts[0].what) for m in due.due_messages(opened, 60.0 * second, NOON)]
    assert sent == [("opened", texts[0]), ("resolved", texts[-1])]


def test_nothing_that_is_due_waits_beyond_the_end_of_the_server() -> None:
    due = NotificationSchedule(AlertSettings(), "lab")
    first, second = alert("disk", "warning"), alert("parent", "warning")
    assert due.due_messages([first], 0.0, NOON)
    assert due.due_messages([first, second], 1.0, NOON) == []
    assert [m.alerts for m in due.due_messages([first, second], 2.0, NOON, last=True)] == [(second,)]
    assert due.notified_alerts == [first, second]


# How it is sent.


def test_a_webhook_gets_documented_json_with_a_signature() -> None:
    with web() as (url, got):
        assert Webhook(url, b"key").send(message()) == "HTTP 204"
    ((request, headers, raw),) = got
    body = json.loads(raw)
    assert request == "POST /hook/s3cret"
    assert headers["X-Fedprune-Signature"] == "sha256=" + hmac.new(b"key", raw, hashlib.sha256).hexdigest()
    assert (body["version"], body["event"], body["site"], body["count"]) == (1, "opened", "lab", 1)
    assert set(body["alerts"][0]) == {"id", "kind", "severity", "since", "what", "why", "todo", "job", "device"}


def test_a_redirect_is_not_followed_and_the_path_is_in_no_error() -> None:
    with web(302) as (url, got):
        with pytest.raises(NotificationError) as raised:
            Webhook(url).send(message())
        assert len(got) == 1
    assert "s3cret" not in str(raised.value)


def test_what_fails_is_tried_again_until_it_arrives_and_in_order() -> None:
    with web(503, 404) as (url, got), closing_outbox(Webhook(url)) as outbox:
        outbox.put(message())
        outbox.put(message("resolved"))
        until(lambda: len(got) == 4)
    assert [json.loads(raw)["event"] for _, _, raw in got] == ["opened", "opened", "opened", "resolved"]


def test_what_is_refused_for_good_keeps_the_next_message_back_for_its_tries_alone() -> None:
    with web(*[404] * MAX_TRIES) as (url, got), closing_outbox(Webhook(url)) as outbox:
        outbox.put(message())
        outbox.put(message("resolved"))
        until(lambda: len(got) == MAX_TRIES + 1)
    assert [json.loads(raw)["event"] for _, _, raw in got] == ["opened"] * MAX_TRIES + ["resolved"]


@contextmanager
def closing_outbox(channel: Any) -> Iterator[NotificationQueue]:
    outbox = NotificationQueue(channel, 0.0)
    try:
        yield outbox
    finally:
        outbox.close(30.0)


def test_nobody_waits_for_a_channel_that_hangs_and_its_queue_is_bounded() -> None:
    class Hangs:
        name, free, has_begun, sent = "webhook", threading.Event(), threading.Event(), 0

        def send(self, message: Message) -> str:
            self.has_begun.set()
            self.free.wait(30)
            self.sent += 1
            return ""

    channel = Hangs()
    with closing_outbox(channel) as outbox:
        outbox.put(message())
        assert channel.has_begun.wait(30)
        for _ in range(3 * MAX_WAITING_MESSAGES):
            outbox.put(message())
        channel.free.set()
    assert MAX_WAITING_MESSAGES <= channel.sent <= MAX_WAITING_MESSAGES + 1


def test_a_service_is_told_what_is_wrong_and_what_to_do() -> None:
    with web(500) as (url, got):
        service = AppriseService(url.replace("http", "json", 1))
        with pytest.raises(NotificationError) as raised:
            service.send(message())
        assert "s3cret" not in str(raised.value)
        service.send(message())
    body = json.loads(got[1][2])
    assert body["title"] == "[fedprune lab] critical: no-devices"
    assert "to do: t" in body["message"]


def test_an_address_that_no_service_has_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "services").write_text("# a comment\nnonsense://ann:hunter2@h\n")
    with pytest.raises(ConfigError) as raised:
        notification_channels(AlertSettings(services=tmp_path / "services"))
    assert raised.value.path == ("alerts", "services")
    assert "hunter2" not in str(raised.value)


def test_a_notifier_tells_by_all_ways_and_beats_while_the_server_works(tmp_path: Path) -> None:
    opened = [alert()]
    with web() as (url, got), web() as (service, service_requests), web() as (beat, beats):
        (tmp_path / "services").write_text(service.replace("http", "json", 1))
        settings = AlertSettings(webhook=url, services=tmp_path / "services", heartbeat=beat)
        with closing(Notifier(settings, "lab", lambda: opened, lambda: True)):
            until(lambda: got and service_requests and beats)
            opened.clear()
            until(lambda: len(got) == len(service_requests) == 2)
        before = len(beats)
        with closing(Notifier(AlertSettings(heartbeat=beat), "lab", list, lambda: False)):
            pass
        assert len(beats) == before
    assert [json.loads(raw)["event"] for _, _, raw in got] == ["opened", "resolved"]


def test_a_server_tells_of_what_ended_it_and_its_next_run_not_again(tmp_path: Path) -> None:
    def run(url: str, opened: list[Alert]) -> None:
        config = ServerConfig(state=tmp_path, alerts=AlertSettings(webhook=url))
        book = AlertBook(read_monitor_record(tmp_path).alerts)
        with monitoring(config, {JOB.name: tmp_path}, book):
            book.update(opened, 0.0, NOON)

    with web() as (url, got):
        run(url, [alert("broker")])
        run(url, [alert("broker")])
        run(url, [alert("broker"), alert("disk")])
    assert [[a["kind"] for a in json.loads(raw)["alerts"]] for _, _, raw in got] == [["broker"], ["disk"]]


# Settings and the command.


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"webhook": "ftp://h"}, "webhook"),
        ({"webhook": "https://user:hunter2@h/x"}, "webhook"),
        ({"services": "nowhere"}, "services"),
        ({"severity": "bad"}, "severity"),
    ],
)
def test_a_wrong_setting_is_named(body: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names) as raised:
        read_table(AlertSettings, body, "[alerts]")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://u:s3cret@host:1/a/b", "https://host:1/a?key=s3cret", "https://host:1?key=s3cret",
        "https://host:1#s3cret", "https://host:1?x@s3cret/y",
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_secrets(url: str) -> None:
    assert shown_url(url) == "https://host:1/..."


def test_what_is_no_address_is_not_shown() -> None:
    assert "s3cret" not in shown_url("https://[host?key=s3cret")
    assert "s3cret" not in shown_url("s3cret")


def test_a_test_notification_is_sent_and_its_result_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["alerts", "test", "--state", str(tmp_path / "state")]
    assert main(words) == ExitCode.CONFIG
    with web() as (url, got):
        words += ["--json", "--alert-webhook"]
        assert main([*words, url]) == ExitCode.OK
        assert json.loads(got[0][2])["event"] == "test"
    assert main([*words, url]) == ExitCode.NOTIFICATION
    results = [json.loads(line) for line in capsys.readouterr().out.replace("]\n[", "]\n\n[").split("\n\n") if line]
    assert [(r["channel"], r["delivered"]) for rows in results for r in rows] == [("webhook", True), ("webhook", False)]


def test_settings_come_from_file_environment_and_command_line_and_their_secrets_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("k3y\n")
    (tmp_path / "fleet.toml").write_text(
        '[alerts]\nwebhook = "https://a/x"\nwebhook_secret = "key"\nseverity = "info"\n'
    )
    monkeypatch.setenv("FEDPRUNE_ALERTS_AWAY_ROUNDS", "30")
    words = ["config", "check", str(tmp_path / "fleet.toml"), "--json", "--alert-webhook", "https://b/s3cret?t=1"]
    assert main([*words, "--state", str(tmp_path / "state")]) == ExitCode.OK
    out = capsys.readouterr().out
    rows = {r["key"]: (r["value"], r["from"]) for r in json.loads(out) if r["table"] == "alerts"}
    assert rows["webhook"] == ("https://b/...", "command line, --alert-webhook")
    assert rows["webhook_secret"][0] == str(tmp_path / "key")
    assert rows["severity"] == ("info", f"{tmp_path}/fleet.toml")
    assert rows["away_rounds"] == (30, "environment variable FEDPRUNE_ALERTS_AWAY_ROUNDS")
    assert "s3cret" not in out
    assert "k3y" not in out
