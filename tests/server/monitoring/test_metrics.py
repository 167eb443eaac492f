"""Figures for Prometheus: they count what happened, and the dashboard and the alerts ask for figures that there are."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedprune.coordination import State
from fedprune.core.errors import ConfigError
from fedprune_server.monitoring import http
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alert_rules import ALERT_SEVERITIES as ALERTS
from fedprune_server.monitoring.alerts import HANG_THRESHOLD_S
from fedprune_server.monitoring.http import serve_metrics
from fedprune_server.monitoring.metrics import Metrics
from fedprune_server.monitoring.round_parts import ROUND_PARTS
from fedprune_server.observation.observer import (
    LoopBlocked,
    Observer,
    Observers,
    RoundEnded,
    TurnEnded,
    TurnEvent,
    TurnSaved,
)
from fedprune_server.observation.snapshot import LazyMapping
from support.fakes.shown_jobs import TRAINING_SNAPSHOT, show
from support.paths import ROOT

DOCS = ROOT / "docs"


class Steps:
    """A clock that advances by a second whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_a_played_job_is_counted(play_two_rounds: Callable[[Observer], State], tmp_path: Path) -> None:
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / "abc").write_bytes(bytes(123))
    metrics = Metrics(tmp_path, lambda: {("quarantine", "warning"): 3, ("broker", "critical"): 0}, Steps())
    state = play_two_rounds(metrics)
    show(metrics, TurnSaved(0.01), TurnEnded(0.02), at=2000.0)
    metric_values = values(metrics)
    job = ("job", "toy")

    def value(name: str, **labels: str) -> float:
        return metric_values[f"fedprune_{name}", tuple(sorted([job, *labels.items()]))]

    counted = sum(p["progress"] == "folded" for p in state.history[0]["devices"].values())
    assert value("updates_counted_total") == counted == 3
    assert value("rounds_finished_total") == len(state.history) == 1
    assert value("staleness_rounds_count") == 3
    assert value("round") == 2
    assert value("phase", phase="training") == 1
    assert value("phase", phase="waiting") == 0
    assert value("devices", state="working") == 2
    assert value("quarantined_devices") == 1
    assert value("bytes_total", direction="down") == 700
    assert value("broker_connected") == 1
    assert value("model_metric", metric="accuracy") == 0.5
    assert value("database_save_seconds_count") == 1
    done = {"score": 2, "extract": 6, "train": 3, "pull": 3, "aggregate": 3, "close": 1, "evaluate": 1, "round": 1}
    assert {p: value("round_part_seconds_count", part=p) for p in ROUND_PARTS} == done
    assert metric_values["fedprune_blobs_bytes", ()] == 123
    alerts = {dict(labels)["kind"]: n for (name, labels), n in metric_values.items() if name == "fedprune_alerts"}
    assert alerts == {"quarantine": 3, "broker": 0}


def test_refused_parts_are_counted_by_kinds_that_are_few() -> None:
    metrics = Metrics()
    parts_by_device = {
        "a": {"progress": "refused", "reason": "x", "kind": "diverged"},
        "b": {"progress": "refused", "reason": "x", "kind": "late"},
        "c": {"progress": "refused", "reason": "zzz"},
    }
    show(metrics, RoundEnded({"round": 1, "model": "m", "metrics": {}, "devices": parts_by_device}))
    metric_values = values(metrics)
    for kind in ("diverged", "late", "other"):
        assert metric_values["fedprune_updates_refused_total", (("job", "toy"), ("reason", kind))] == 1


def test_an_event_that_cannot_be_counted_takes_no_other_event_with_it(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    events: list[Any] = [
        RoundEnded({"round": 1}),
        TurnSaved(0.01),
        RoundEnded({"round": 2, "model": "", "metrics": {}, "devices": {}}),
    ]
    Observers([metrics]).show([(TRAINING_SNAPSHOT, [TurnEvent(1.0, what) for what in events])])
    job = (("job", TRAINING_SNAPSHOT.name),)
    figures = values(metrics)
    assert figures["fedprune_database_save_seconds_count", job] == 1
    assert figures["fedprune_rounds_finished_total", job] == 2
    assert "Metrics" in caplog.text


@pytest.fixture
def site() -> Iterator[tuple[str, Metrics, list[float], list[str]]]:
    now, trouble = [100.0], [""]
    metrics = Metrics(clock=lambda: now[0])
    with serve_metrics(("127.0.0.1", 0), metrics, {"database": lambda: trouble[0]}) as port:
        yield f"http://127.0.0.1:{port}", metrics, now, trouble


def status(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_web_server_says_whether_the_loop_turns_and_what_is_ready(
    site: tuple[str, Metrics, list[float], list[str]],
) -> None:
    url, metrics, now, trouble = site
    assert status(f"{url}/healthz")[0] == 503
    show(metrics, TurnEnded(0.1))
    assert status(f"{url}/healthz") == status(f"{url}/readyz") == (200, "ok\n")
    trouble[0] = "no room"
    assert status(f"{url}/readyz") == (503, "database: no room\n")
    assert status(f"{url}/healthz")[0] == 200
    now[0] += HANG_THRESHOLD_S + 1
    assert status(f"{url}/healthz")[0] == 503
    assert "fedprune_round{" in status(f"{url}/metrics")[1]
    assert status(f"{url}/../etc/passwd")[0] == 404


def test_a_name_that_another_site_may_have_is_not_answered() -> None:
    with serve_metrics(("127.0.0.1", 0), Metrics(), {}, ("fleet.example",)) as port:
        for host, code in {
            f"127.0.0.1:{port}": 200, "localhost": 200, "[::1]:9": 200, "server:9100": 200, "Fleet.Example:9": 200,
            "evil.example": 421, f"evil.example:{port}": 421, "a@127.0.0.1.evil.example": 421,
            "127.0.0.1.evil.example": 421, "": 200,
        }.items():  # fmt: skip
            client = HTTPConnection("127.0.0.1", port, timeout=10)
            client.putrequest("GET", "/metrics", skip_host=True)
            client.putheader("Host", host)
            client.endheaders()
            assert client.getresponse().status == code, host
            client.close()


def test_while_the_loop_waits_for_its_database_no_figure_needs_that() -> None:
    def states() -> dict[str, int]:
        raise AssertionError("who is a member stands in the database")

    now = [100.0]
    metrics = Metrics(clock=lambda: now[0])
    show(metrics, LoopBlocked(), device_states=LazyMapping(states))
    assert metrics.turned_at == 100.0


def test_a_port_that_is_taken_is_one_clear_error(site: tuple[str, Metrics, list[float], list[str]]) -> None:
    port = int(site[0].rpartition(":")[2])
    with pytest.raises(ConfigError, match=r"server\.metrics"), serve_metrics(("127.0.0.1", port), Metrics(), {}):
        pass


def exposed_names() -> set[str]:
    metrics = Metrics(Path("/nowhere"), AlertBook().counts)
    show(metrics, RoundEnded({"round": 1, "model": "m", "metrics": {"loss": 1.0}, "devices": {}}), TurnEnded(0.1))
    return {s.name for f in text_string_to_metric_families(metrics.text().decode()) for s in f.samples}


def asked_for(expression: str) -> set[str]:
    return set(re.findall(r"\bfedprune_\w+", expression))


def test_the_dashboard_asks_for_figures_that_there_are() -> None:
    board = json.loads((DOCS / "grafana" / "fedprune.json").read_text())
    names = exposed_names()
    targets = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
    assert len(targets) >= 10
    for expression in targets:
        assert asked_for(expression), expression
        assert asked_for(expression) <= names, expression
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])


def test_the_alerts_ask_for_figures_that_there_are() -> None:
    groups = pytest.importorskip("yaml").safe_load((DOCS / "prometheus" / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    names = exposed_names()
    assert len(rules) >= 6
    kinds = {kind for rule in rules for kind in re.findall(r'fedprune_alerts\{kind="([\w-]+)"', rule["expr"])}
    assert kinds
    assert kinds <= set(ALERTS)
    for rule in rules:
        assert asked_for(rule["expr"]) <= names, rule["expr"]
        assert {"alert", "expr", "labels", "annotations"} <= rule.keys()
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_who_only_connects_keeps_nobody_out() -> None:
    metrics = Metrics()
    metrics.turned_at = metrics.clock()
    with serve_metrics(("127.0.0.1", 0), metrics, {}) as port, ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(http.MAX_CONNECTIONS)
        ]
        assert status(f"http://127.0.0.1:{port}/healthz") == (200, "ok\n")
        assert silent[0].recv(1) == b""  # hung up on: it has waited longest


def test_a_database_that_hangs_makes_the_server_not_ready_but_leaves_it_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ANSWER_TIMEOUT_S", 0.5)
    metrics, goes_on, calls = Metrics(), threading.Event(), list[None]()
    metrics.turned_at = metrics.clock()

    def check() -> str:
        calls.append(None)
        goes_on.wait(60)
        return ""

    with serve_metrics(("127.0.0.1", 0), metrics, {"database": check}) as port, ExitStack() as stack:
        url = f"http://127.0.0.1:{port}"
        stack.callback(goes_on.set)

        def ask(path: str) -> socket.socket:
            client = socket.create_connection(("127.0.0.1", port), 10)
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return client

        for _ in range(50):  # more than a pool has threads
            with ask("/readyz"):
                pass  # gives up at once
        assert status(f"{url}/healthz") == (200, "ok\n")
        assert status(f"{url}/readyz") == (503, "checks of database: no answer within 0.5 s\n")
        assert len(calls) == 1
        monkeypatch.setattr(http, "ANSWER_TIMEOUT_S", 60.0)
        for _ in range(http.MAX_CONNECTIONS):
            stack.enter_context(ask("/readyz"))
        assert status(f"{url}/healthz") == (200, "ok\n")
        goes_on.set()
        assert status(f"{url}/readyz") == (200, "ok\n")
