"""Notifications: what is due and when, and that webhook and e-mail arrive, are signed, retried, and block nothing."""

from __future__ import annotations

import hashlib
import hmac
import json
import smtplib
import socketserver
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
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
from fedprune_server.monitoring import notifications
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.monitor import read_recorded
from fedprune_server.monitoring.notifications import (
    KEPT,
    MOST,
    Mail,
    Message,
    NotificationError,
    NotificationSchedule,
    Notifier,
    Outbox,
    Webhook,
    fetch,
    trial,
)
from support.fakes.tiny_job import JOB
from support.paths import ROOT
from support.waiting import until

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


@contextmanager
def relay(refusal: str = "") -> Iterator[tuple[int, list[EmailMessage]]]:
    """A mail relay that takes everything, or refuses all senders."""
    taken: list[EmailMessage] = []

    class Session(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            while line := self.rfile.readline():
                verb = line[:4].upper()
                if verb == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    raw = b""
                    while (row := self.rfile.readline()) not in (b".\r\n", b""):
                        raw += row
                    taken.append(message_from_bytes(raw, policy=policy.default))  # type: ignore[arg-type]
                if verb == b"MAIL" and refusal:
                    self.wfile.write(f"{refusal}\r\n".encode())
                else:
                    self.wfile.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 fine\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Session) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1], taken
        finally:
            server.shutdown()


def mailed(port: int, **more: Any) -> AlertSettings:
    return AlertSettings(
        mail_to="ann@example.org, bob@example.org", mail_from="fleet@example.org",
        mail_server=f"smtp://127.0.0.1:{port}", mail_starttls=False, **more,
    )  # fmt: skip


# What is due.


def test_an_alert_is_sent_once_then_repeated_and_its_end_is_sent() -> None:
    due, told = NotificationSchedule(AlertSettings(repeat_minutes=60), "lab"), []
    for minute in range(150):
        opened = [alert()] if minute < 140 else []
        told += [(minute, m.event) for m in due.messages(opened, 60.0 * minute, NOON)]
    assert told == [(0, "opened"), (60, "repeated"), (120, "repeated"), (140, "resolved")]


def test_what_is_not_severe_enough_is_not_told_and_its_end_neither() -> None:
    due = NotificationSchedule(AlertSettings(severity="critical", resolved=True), "lab")
    assert due.messages([alert(severity="warning")], 0.0, NOON) == []
    assert due.messages([], 100.0, NOON) == []


def test_an_end_is_not_told_to_who_does_not_want_it() -> None:
    due = NotificationSchedule(AlertSettings(resolved=False), "lab")
    assert len(due.messages([alert()], 0.0, NOON)) == 1
    assert due.messages([], 100.0, NOON) == []
    assert [m.event for m in due.messages([alert()], 200.0, NOON)] == ["opened"]


@pytest.mark.parametrize(("hours", "begins", "ends"), [("22:00-07:00", 22, 7), ("13:00-15:00", 13, 15)])
def test_quiet_hours_hold_back_what_is_told_afterwards_if_it_is_still_open(hours: str, begins: int, ends: int) -> None:
    due = NotificationSchedule(AlertSettings(quiet_hours=hours), "lab")
    told: list[tuple[int, str, str]] = []
    night, short = alert("disk", "warning"), alert("quarantine", "warning", device="a")
    for step in range(48):
        hour = begins + step / 2
        at = NOON + (hour - 12) * HOUR
        opened = [night] if step < 40 else []
        opened += [short] if step < 2 else []
        opened += [alert()] if step == 1 else []
        told += [(int(hour % 24), m.event, m.alerts[0].kind) for m in due.messages(opened, step * HOUR / 2, at)]
    quiet = [(begins, "opened", "no-devices"), (begins + 1, "resolved", "no-devices")]
    assert told[:2] == quiet
    assert told[2][1:] == ("opened", "disk")
    assert told[2][0] == ends
    assert not [t for t in told if t[2] == "quarantine"]


def test_many_alerts_are_one_message_and_the_critical_one_waits_for_nothing() -> None:
    due = NotificationSchedule(AlertSettings(), "lab")
    waiting = [alert("devices-wait", "warning", device=f"d{i}") for i in range(60)]
    (first,) = due.messages(waiting[:1], 0.0, NOON)
    assert [due.messages(waiting[:n], float(n), NOON) for n in range(2, 29)] == [[]] * 27
    (urgent,) = due.messages([*waiting, alert()], 29.0, NOON)
    assert [len(first.alerts), len(urgent.alerts), urgent.alerts[0].severity] == [1, 60, "critical"]
    body = json.loads(urgent.to_bytes())
    assert (body["count"], len(body["alerts"])) == (60, MOST)
    assert "and 40 more" in urgent.text


def test_a_restarted_server_does_not_tell_again_but_tells_the_end() -> None:
    due = NotificationSchedule(AlertSettings(repeat_minutes=1), "lab", notified=[alert()])
    assert due.messages([alert()], 0.0, NOON) == []
    assert [m.event for m in due.messages([alert()], 61.0, NOON)] == ["repeated"]
    assert [m.event for m in due.messages([], 62.0, NOON)] == ["resolved"]


def test_an_alert_that_changes_its_severity_is_sent_again_if_it_got_worse_and_resolved_once() -> None:
    due, sent = NotificationSchedule(AlertSettings(repeat_minutes=0), "lab"), []
    severities = ["warning"] * 60 + ["critical"] * 60 + ["warning"] * 60 + [""] * 60
    for second, severity in enumerate(severities):
        opened = [alert("disk", severity)] if severity else []
        sent += [(second, m.event, m.alerts[0].severity) for m in due.messages(opened, float(second), NOON)]
    assert sent == [(0, "opened", "warning"), (60, "opened", "critical"), (180, "resolved", "critical")]


def test_a_new_text_is_not_sent_again_and_the_end_is_told_in_the_latest() -> None:
    due = NotificationSchedule(AlertSettings(repeat_minutes=0, quiet_hours="22:00-07:00"), "lab")
    texts = ["a is away", "a and b are away", "b is away"]
    hours = [NOON, NOON + HOUR, NOON + 11 * HOUR, NOON + 20 * HOUR]
    sent = []
    for second, (text, at) in enumerate(zip([*texts, ""], hours, strict=True)):
        opened = [alert("rollout", "warning", what=text)] if text else []
        sent += [(m.event, m.alerts[0].what) for m in due.messages(opened, 60.0 * second, at)]
    assert sent == [("opened", texts[0]), ("resolved", texts[-1])]


def test_an_alert_has_one_id_in_every_message() -> None:
    mild, bad = alert("disk", "warning"), alert("disk", "critical")
    ids = [json.loads(Message("opened", NOON, "lab", (a,)).to_bytes())["alerts"][0]["id"] for a in (mild, bad)]
    assert ids == ["disk", "disk"]
    assert alert("no-devices", job="leaves").key == "no-devices:leaves"


def test_nothing_that_is_due_waits_beyond_the_end_of_the_server() -> None:
    due = NotificationSchedule(AlertSettings(quiet_hours="22:00-07:00"), "lab")
    first, second = alert("disk", "warning"), alert("parent", "warning")
    assert due.messages([first], 0.0, NOON)
    assert due.messages([first, second], 1.0, NOON) == []
    assert [m.alerts for m in due.messages([first, second], 2.0, NOON, last=True)] == [(second,)]
    assert due.notified == [first, second]
    held_back = alert("quarantine", "warning", device="a")
    assert due.messages([first, second, held_back], 3.0, NOON + 11 * HOUR, last=True) == []
    assert held_back not in due.notified


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
    page = (ROOT / "docs" / "observe.md").read_text()
    assert {k for k in (*body, *body["alerts"][0]) if f'"{k}"' not in page} == set()


def test_a_redirect_is_not_followed_and_the_path_is_in_no_error() -> None:
    with web(302) as (url, got):
        with pytest.raises(NotificationError, match="HTTP 302") as raised:
            Webhook(url).send(message())
        assert len(got) == 1
    assert raised.value.lasting
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(("code", "lasting"), [(500, False), (503, False), (429, False), (404, True), (401, True)])
def test_which_answers_are_worth_another_try(code: int, lasting: bool) -> None:
    with web(code) as (url, _), pytest.raises(NotificationError) as raised:
        fetch(url)
    assert raised.value.lasting is lasting


def test_what_fails_is_tried_again_until_it_arrives_and_in_order() -> None:
    with web(503, 500) as (url, got), closing_outbox(Webhook(url)) as outbox:
        outbox.put(message())
        outbox.put(message("resolved"))
        until(lambda: len(got) == 4)
    assert [json.loads(raw)["event"] for _, _, raw in got] == ["opened", "opened", "opened", "resolved"]


def test_what_is_refused_for_good_keeps_back_nothing_else() -> None:
    with web(404) as (url, got), closing_outbox(Webhook(url)) as outbox:
        outbox.put(message())
        outbox.put(message("resolved"))
        until(lambda: len(got) == 2)


@contextmanager
def closing_outbox(channel: Any) -> Iterator[Outbox]:
    outbox = Outbox(channel, 0.01)
    try:
        yield outbox
    finally:
        outbox.close(30.0)


def test_nobody_waits_for_a_channel_that_hangs_and_its_queue_is_bounded() -> None:
    class Hangs:
        name, free, begun = "webhook", threading.Event(), threading.Event()

        def send(self, message: Message) -> str:
            self.begun.set()
            self.free.wait(30)
            return ""

    channel = Hangs()
    outbox = Outbox(channel)
    outbox.put(message())
    assert channel.begun.wait(30)
    for _ in range(3 * KEPT):
        outbox.put(message())
    assert len(outbox._waiting) == KEPT
    channel.free.set()
    outbox.close(30.0)


def test_an_e_mail_says_what_is_wrong_and_what_to_do() -> None:
    with relay() as (port, taken):
        assert "taken by" in Mail(mailed(port)).send(message())
    (mail,) = taken
    assert mail["Subject"] == "[fedprune lab] critical: no-devices"
    assert mail["To"] == "ann@example.org, bob@example.org"
    assert "to do: t" in mail.get_content()


def test_a_name_with_line_ends_makes_no_further_header() -> None:
    hostile = Message("opened", NOON, "lab", (alert(what="x\r\nBcc: eve@example.org"),))
    with relay() as (port, taken):
        Mail(mailed(port)).send(hostile)
    (mail,) = taken
    assert mail["Bcc"] is None
    assert "\n" not in mail["Subject"]


def test_a_relay_without_tls_gets_nothing_unless_that_is_wanted() -> None:
    with relay() as (port, taken):
        settings = AlertSettings(mail_to="ann@example.org", mail_server=f"smtp://127.0.0.1:{port}")
        with pytest.raises(NotificationError) as raised:
            Mail(settings).send(message())
    assert raised.value.lasting
    assert taken == []


@pytest.mark.parametrize(("refusal", "lasting"), [("550 no", True), ("451 later", False)])
def test_what_a_relay_refuses(refusal: str, lasting: bool) -> None:
    with relay(refusal) as (port, _), pytest.raises(NotificationError, match=refusal[:3]) as raised:
        Mail(mailed(port)).send(message())
    assert raised.value.lasting is lasting


def test_a_notifier_tells_by_all_ways_and_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "_LOOK_S", 0.01)
    monkeypatch.setattr(notifications, "_BEAT_S", 0.05)
    opened, asked, running = [alert()], 0, True

    def works() -> bool:
        nonlocal asked
        asked += 1
        return running

    with web() as (url, got), web() as (beat, beats), relay() as (port, taken):
        settings = mailed(port, webhook=url, heartbeat=beat)
        with closing(Notifier(settings, "lab", lambda: opened, works)):
            until(lambda: got and taken and len(beats) > 2)
            opened.clear()
            until(lambda: len(got) == len(taken) == 2)
            running, before = False, asked
            until(lambda: asked > before + 1)  # a beat that was on its way has ended
            quiet = len(beats)
            until(lambda: asked > before + 5)
            assert len(beats) == quiet
    assert [json.loads(raw)["event"] for _, _, raw in got] == ["opened", "resolved"]


def test_a_server_tells_of_what_ended_it_and_its_next_run_of_what_quiet_hours_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "_LOOK_S", 60.0)  # the end comes before the next look

    def run(url: str, quiet_hours: str, opened: list[Alert]) -> None:
        settings = AlertSettings(webhook=url, quiet_hours=quiet_hours)
        config = ServerConfig(state=tmp_path, alerts=settings)
        book = AlertBook(read_recorded(tmp_path).alerts)
        with monitoring(config, {JOB.name: tmp_path}, book):
            book.update(opened, 0.0, NOON)

    now = datetime.now().hour
    quiet = f"{(now - 1) % 24:02d}:00-{(now + 2) % 24:02d}:00"
    held_back, urgent = alert("disk", "warning"), alert("broker")
    with web() as (url, got):
        run(url, quiet, [held_back, urgent])
        run(url, "off", [held_back, urgent])
        run(url, "off", [held_back, urgent])
        run(url, "off", [alert("disk"), urgent])
    told = [[(body["event"], a["severity"]) for a in body["alerts"]] for body in (json.loads(raw) for _, _, raw in got)]
    assert told == [[("opened", "critical")], [("opened", "warning")], [("opened", "critical")]]


def test_an_alert_that_opened_before_notifications_were_set_up_is_sent_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "_LOOK_S", 0.01)
    without = Notifier(AlertSettings(), "lab", lambda: [alert()], lambda: True)
    without.close()
    assert without.notified() == []
    with web() as (url, got):
        settings = AlertSettings(webhook=url)
        with closing(Notifier(settings, "lab", lambda: [alert()], lambda: True, without.notified())):
            until(lambda: got)
    assert [json.loads(raw)["event"] for _, _, raw in got] == ["opened"]


# Settings and the command.


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"webhook": "ftp://h"}, "webhook"),
        ({"webhook": "https://user:hunter2@h/x"}, "webhook"),
        ({"webhook": "https://h/a b"}, "webhook"),
        ({"webhook": "https://h:0/"}, "webhook"),
        ({"webhook": 3}, "webhook"),
        ({"webhok": "https://h"}, "webhok"),
        ({"webhook_secret": "nowhere"}, "webhook_secret"),
        ({"mail_to": "ann"}, "mail_to"),
        ({"mail_to": "ann@example.org\nBcc: eve@example.org"}, "mail_to"),
        ({"mail_server": "http://h"}, "mail_server"),
        ({"mail_user": "ann"}, "mail_password"),
        ({"severity": "bad"}, "severity"),
        ({"quiet_hours": "22-7"}, "quiet_hours"),
        ({"quiet_hours": "24:00-07:00"}, "quiet_hours"),
        ({"repeat_minutes": -1}, "repeat_minutes"),
        ({"resolved": "yes"}, "resolved"),
    ],
)
def test_a_wrong_setting_is_named(body: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names) as raised:
        read_table(AlertSettings, body, "[alerts]")
    assert "hunter2" not in str(raised.value)


def test_settings_come_from_file_environment_and_command_line_and_their_secrets_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("k3y\n")
    (tmp_path / "fleet.toml").write_text(
        '[alerts]\nwebhook = "https://a/x"\nwebhook_secret = "key"\nseverity = "info"\n'
    )
    monkeypatch.setenv("FEDPRUNE_ALERTS_QUIET_HOURS", "22:00-07:00")
    monkeypatch.setenv("FEDPRUNE_ALERTS_REPEAT_MINUTES", "30")
    words = ["config", "check", str(tmp_path / "fleet.toml"), "--json", "--alert-webhook", "https://b/s3cret?t=1"]
    assert main([*words, "--state", str(tmp_path / "state")]) == ExitCode.OK
    out = capsys.readouterr().out
    rows = {r["key"]: (r["value"], r["from"]) for r in json.loads(out) if r["table"] == "alerts"}
    assert rows["webhook"] == ("https://b/...", "command line, --alert-webhook")
    assert rows["webhook_secret"][0] == str(tmp_path / "key")
    assert rows["severity"] == ("info", f"{tmp_path}/fleet.toml")
    assert rows["quiet_hours"] == ("22:00-07:00", "environment variable FEDPRUNE_ALERTS_QUIET_HOURS")
    assert rows["repeat_minutes"][0] == 30
    assert "s3cret" not in out
    assert "k3y" not in out


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
    with web() as (url, got), relay() as (port, taken):
        text = f'mail_to = "ann@example.org"\nmail_server = "smtp://127.0.0.1:{port}"\nmail_starttls = false\n'
        (tmp_path / "fleet.toml").write_text(f"[alerts]\n{text}")
        words += ["--config", str(tmp_path / "fleet.toml"), "--alert-webhook"]
        assert main([*words, url]) == ExitCode.OK
        assert json.loads(got[0][2])["event"] == "test"
        assert trial("default", NOON).title == taken[0]["Subject"].strip()
    said = capsys.readouterr().out
    assert "webhook: delivered: HTTP 204" in said
    assert "e-mail: delivered: taken by 127.0.0.1" in said
    assert main([*words, url]) == ExitCode.NOTIFICATION
    assert "webhook: failed" in capsys.readouterr().out
    assert main([*words, url, "--json"]) == ExitCode.NOTIFICATION
    rows = json.loads(capsys.readouterr().out)
    assert [(r["channel"], r["delivered"], r["exit_code"]) for r in rows] == [
        ("webhook", False, ExitCode.NOTIFICATION),
        ("e-mail", False, ExitCode.NOTIFICATION),
    ]


def test_a_password_is_given_to_the_relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    given: list[tuple[str, str]] = []
    monkeypatch.setattr(smtplib.SMTP, "login", lambda self, user, password: given.append((user, password)))
    with relay() as (port, _):
        settings = mailed(port, mail_user="fleet", mail_password=tmp_path / "password")
        (channel,) = notifications.channels(settings)
        channel.send(message())
    assert given == [("fleet", "hunter2")]
