"""A dead fleet, a lost broker and a full disk, reported within a deadline by log, metrics, console, webhook, doctor."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from support.processes.machine import listens
from support.processes.real_site import job_config, write_material
from support.processes.watched_site import Hook, Watched, console_alerts, doctor

pytestmark = pytest.mark.system

DEADLINE_S = 14.0
CONFIG = job_config("leaves", rounds=100000, deadline_s=DEADLINE_S)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Watched]:
    write_material(tmp_path, {"north": 60, "south": 60})
    with Watched(tmp_path, tmp_path, CONFIG, ("north", "south"), 90, may_hold=True) as made:
        yield made


def rounds(site: Watched) -> int:
    """The round that the server has saved."""
    return 0 if (saved := site.saved_state()) is None else saved.round


def hold_a_round(site: Watched) -> int:
    """Let all boards come into the middle of a round: boards that end between two rounds miss no deadline."""
    server = site.processes["server"]
    server.send_signal(signal.SIGSTOP)
    held = rounds(site) + 3
    site.hold(held)
    server.send_signal(signal.SIGCONT)
    site.wait_until_held(held)
    return held


# At every push the next test tells everywhere, and `test_alerts.py` and `test_doctor.py` find a dead fleet.
@pytest.mark.soak
def test_a_dead_fleet_is_told_everywhere_within_a_deadline(site: Watched) -> None:
    site.start_all()
    site.wait_for(lambda: listens(site.metrics) and rounds(site) > 2, "rounds go by")
    assert site.count_open_alerts("no-devices") == site.count_open_alerts("no-progress") == 0
    assert "alert:" not in site.log().replace("alert: the disk", "")
    ann = site.operator()
    assert console_alerts(ann).keys() <= {"disk"}

    held = hold_a_round(site)
    for name in site.devices:
        site.stop(name)
    site.let_go(held)
    site.wait_for(lambda: "alert: no board" in site.log(), "the log reports it")
    assert site.count_open_alerts("no-devices") == 1
    site.wait_for(
        lambda: "no-devices" in console_alerts(ann) and bool(Hook.posted_alerts("opened", "no-devices")),
        "console and webhook, too",
    )
    assert "no board that can take part" in ann.ask("/")
    site.wait_for(lambda: site.count_open_alerts("no-progress") == 1, "a deadline passes")
    assert site.log().index("alert: no board") < site.log().index("makes no progress"), (
        "reported before the deadline passed"
    )
    code, findings = doctor(site.state)
    assert (code, findings.keys() - {"disk"}) == (ExitCode.FINDINGS, {"no-devices", "no-progress"})
    assert all(f["todo"] for f in findings.values())

    for name in site.devices:
        site.start(name)
    site.wait_for(
        lambda: site.count_open_alerts("no-devices") + site.count_open_alerts("no-progress") == 0, "the alerts close"
    )
    site.wait_for(
        lambda: not console_alerts(ann).keys() - {"disk"} and bool(Hook.posted_alerts("resolved", "no-devices")),
        "console and webhook report the end",
    )
    assert len(Hook.posted_alerts("opened", "no-devices")) == len(Hook.posted_alerts("resolved", "no-devices")) == 1
    assert site.log().count("alert: no board") == site.log().count("the alert is over: no board") == 1

    site.stop("server")
    code, findings = doctor(site.state)
    assert (code, findings.keys() - {"disk"}) == (ExitCode.FINDINGS, {"server-not-running"})


@pytest.mark.mosquitto
def test_a_broker_that_dies_is_told_everywhere_and_so_is_its_return(tmp_path: Path) -> None:
    write_material(tmp_path, {"north": 60})
    config = job_config("leaves", rounds=100000, devices=1, deadline_s=DEADLINE_S)
    with Watched(tmp_path, tmp_path, config, ("north",), 90, mosquitto=True) as site:
        site.start_all()
        site.wait_for(lambda: rounds(site) > 1, "a round goes by")
        ann = site.operator()
        site.stop("broker")
        what = "there is no connection to the broker"
        site.wait_for(lambda: f"alert: {what}. To do: see" in site.log(), "the log reports it")
        site.wait_for(
            lambda: what in console_alerts(ann).get("broker", "") and Hook.posted_alerts("opened", "broker") == [what],
            "console and webhook, too",
        )
        assert site.count_open_alerts("broker") == 1
        assert doctor(site.state)[1]["broker"]["todo"]
        site.start("broker")
        site.wait_for(lambda: f"the alert is over: {what}" in site.log(), "it is over")
        site.wait_for(
            lambda: "broker" not in console_alerts(ann) and Hook.posted_alerts("resolved", "broker") == [what],
            "console and webhook report the end",
        )
