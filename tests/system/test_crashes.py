"""kill -9 of device, server and broker in the middle of rounds: the run continues by itself, to the very same model."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.coordination import State
from fedprune.core.errors import ExitCode
from support.processes.machine import listens
from support.processes.real_site import Site, job_config

pytestmark = pytest.mark.system

ROUNDS = 3
DEVICES = ("north", "south")
PATIENCE_S = 120
CONFIG = job_config("crashes", rounds=ROUNDS, recipe={"epochs": 40, "lr": 0.001})


def site_of(material: Path, folder: Path, broker: str = "embedded", *, secure: bool = True) -> Site:
    own, amqtt = broker == "mosquitto", broker == "amqtt"
    return Site(material, folder, CONFIG, DEVICES, PATIENCE_S, mosquitto=own, amqtt=amqtt, secure=secure, may_hold=True)


@pytest.fixture
def site(request: pytest.FixtureRequest, material: Path, tmp_path: Path) -> Iterator[Site]:
    with site_of(material, tmp_path, request.param) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> State:
    """A run without kills, at the broker of a machine that has no Mosquitto."""
    with site_of(material, tmp_path_factory.mktemp("calm"), "amqtt", secure=False) as calm:
        calm.start_all()
        state = calm.finish()
        assert "embedded broker: amqtt " in calm.logs_in_full()
        return state


def test_an_undisturbed_run_counts_every_device_in_every_round(undisturbed: State) -> None:
    progress = [[d["progress"] for d in r["devices"].values()] for r in undisturbed.history]
    assert progress == [["folded"] * len(DEVICES)] * ROUNDS


# `test_dead_fleet.py` takes a Mosquitto away at every push.
@pytest.mark.parametrize(
    "site",
    [
        "embedded",
        pytest.param("amqtt", marks=pytest.mark.soak),
        pytest.param("mosquitto", marks=[pytest.mark.mosquitto, pytest.mark.soak]),
    ],
    indirect=True,
)
def test_kills_in_the_middle_of_rounds_change_not_a_bit(site: Site, undisturbed: State) -> None:
    site.hold(*range(1, ROUNDS + 1))
    site.start_all()
    for number, victim in enumerate((DEVICES[0], "server", "broker"), start=1):
        site.wait_for_the_middle(number)
        site.kill(victim)
        site.let_go(number)
    assert [r["model"] for r in site.finish().history] == [r["model"] for r in undisturbed.history]


@pytest.mark.parametrize(
    ("number", "code", "group"),
    [
        pytest.param(signal.SIGTERM, ExitCode.OK, True, id="SIGTERM to the group"),
        pytest.param(signal.SIGTERM, ExitCode.OK, False, id="SIGTERM", marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, ExitCode.INTERRUPTED, True, id="SIGINT to the group", marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, ExitCode.INTERRUPTED, False, id="SIGINT"),
    ],
)
@pytest.mark.at_push(1)
def test_a_signal_ends_a_server_cleanly(
    material: Path, tmp_path: Path, number: signal.Signals, code: ExitCode, group: bool
) -> None:
    site = site_of(material, tmp_path)
    try:
        site.start("server", in_group=True)
        site.wait_for(lambda: listens(site.port), "the broker listens")
        site.wait_for(lambda: "connected to the broker" in site.logs_in_full(), "the server is connected")
        server = site.processes["server"]
        if group:  # as a service manager and a terminal do
            os.killpg(server.pid, number)
        else:
            server.send_signal(number)
        assert server.wait(60) == code
        assert "connection was lost" not in site.logs_in_full()
        assert not listens(site.port)
    finally:
        site.stop_all()
