"""A slow line, two brokers that are joined by a bridge, and a cluster: a short job of real processes through each."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import State
from support.fakes.fleet import models
from support.faults.relay import Relay
from support.processes.machine import find_mosquitto, free_port, listens
from support.processes.rabbitmq import RabbitMQ
from support.processes.real_site import Site, job_config, write_material

pytestmark = [pytest.mark.mosquitto, pytest.mark.system]

DEVICES = ("north", "south")
WEIGHTS = 196_620
"""Bytes of the model's numbers: six leaves, two chunks. Two thirds of them are w1's."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_mosquitto()
    return write_material(tmp_path_factory.mktemp("material"), dict.fromkeys(DEVICES, 100), hidden=4096)


@pytest.fixture
def make(material: Path, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes a site; its processes end with the test."""
    with ExitStack() as stack:

        def site(name: str = "site", rounds: int = 2, settings: str = "", **options: Any) -> Site:
            folder = tmp_path / name
            folder.mkdir()
            recipe = {"epochs": 1, "max_steps": 3}
            config = job_config("short", rounds=rounds, strategy="fedavg", density=1.0, recipe=recipe)
            made = stack.enter_context(Site(material, folder, config, DEVICES, 120, mosquitto=True, **options))
            with (folder / "mosquitto.conf").open("a") as file:
                file.write(settings)
            return made

        yield site


def complete(site: Site) -> State:
    """Run the job to its end; everything that was trained counts."""
    site.start_all()
    return site.finish_complete()


@pytest.mark.soak
@pytest.mark.parametrize("limit", ["message_size_limit 65536", "max_packet_size 65536"])
def test_bodies_of_64_kb_and_no_retained_messages_are_enough(make: Callable[..., Site], limit: str) -> None:
    complete(make(settings=f"{limit}\nretain_available false\n"))


@pytest.mark.soak
def test_a_slow_processor_behind_a_slow_line_gets_through_tls(make: Callable[..., Site]) -> None:
    """30 ms of every 100 for the board, and 60 kB/s each way."""
    site, over = make(secure=True), threading.Event()

    def throttle() -> None:
        while not over.wait(0.03):
            process = site.processes.get("north")
            if process is not None and process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGSTOP)
                    over.wait(0.07)
                    os.kill(process.pid, signal.SIGCONT)

    with closing(Relay(site.port, 60_000)) as line:
        site.board_ports = {"north": line.port}
        thread = threading.Thread(target=throttle)
        thread.start()
        try:
            complete(site)
        finally:
            over.set()
            thread.join()
        assert line.passed_bytes > 3 * WEIGHTS


def bridge(port: int) -> str:
    """What the boards' broker is told of the server's, at a port; as docs/broker-cluster.md has it."""
    return f"""
connection to-the-server
address 127.0.0.1:{port}
bridge_protocol_version mqttv311
cleansession true
notifications false
restart_timeout 1
topic fedprune/1/+/+/+/up/# out 1
topic fedprune/1/+/+/-/join out 1
topic fedprune/1/+/+/+/down/# in 1
topic fedprune/1/+/+/-/joined in 1
"""


@pytest.mark.soak
def test_a_bridge_that_is_cut_once_changes_no_bit(make: Callable[..., Site], tmp_path: Path) -> None:
    expected = complete(make("alone", rounds=4))
    site, port = make("bridged", rounds=4, may_hold=True), free_port()
    site.hold(2)
    with closing(Relay(site.port)) as line, ExitStack() as stack:
        (tmp_path / "far.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n" + bridge(line.port))
        site.board_ports = dict.fromkeys(DEVICES, port)
        site.start("broker")
        site.wait_for(lambda: listens(site.port), "the server's broker listens")
        far = subprocess.Popen([find_mosquitto(), "-c", str(tmp_path / "far.conf")], stderr=subprocess.DEVNULL)
        stack.callback(far.wait)
        stack.callback(far.kill)
        site.wait_for(lambda: line.connections > 0, "the bridge stands")
        site.start("server")
        for name in DEVICES:
            site.start(name)
        site.wait_for(lambda: bool((state := site.saved_state()) and state.history), "a round is over")
        line.cut()
        site.let_go(2)
        time.sleep(3)
        line.mend()
        state = site.finish()
    assert line.connections >= 2
    assert models(state) == models(expected)
    assert len(state.history) == 4


@pytest.mark.soak
def test_a_cluster_that_loses_a_node_changes_no_bit(make: Callable[..., Site]) -> None:
    """The server is at one node; behind a balancer, boards are at two others, of which one is killed in round 2."""
    expected = complete(make("alone", rounds=4))
    site = make("clustered", rounds=4, may_hold=True)
    site.hold(2)
    with (
        closing(RabbitMQ()) as cluster,
        closing(Relay(cluster.ports["b"])) as north,
        closing(Relay(cluster.ports["c"])) as south,
    ):
        site.port = cluster.ports["a"]
        site.board_ports = {"north": north.port, "south": south.port}
        for name in ("server", *DEVICES):
            site.start(name)
        site.wait_until_held(2)
        cluster.kill("b")
        north.cut()
        north.target = cluster.ports["c"]
        north.mend()
        site.let_go(2)
        state = site.finish_complete()
        assert north.connections >= 2
    assert models(state) == models(expected)
    assert len(state.history) == 4
