import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from fedprune.core.errors import BrokerError
from fedprune.wire import link as link_module
from fedprune.wire.link import BrokerLink
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.topics import Topics
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging.broker.embedded import EmbeddedBroker, PortTakenError
from fedprune_server.messaging.broker.programs import (
    Amqtt,
    Command,
    Mosquitto,
    Program,
    TlsFiles,
    available_programs,
    find_mosquitto,
)
from fedprune_server.messaging.connection import open_connection
from fedprune_server.messaging.second_server import OtherServerError, ServerInstance, second_server_guard
from support.processes import machine
from support.processes.machine import free_port, listens
from support.waiting import until

pytestmark = pytest.mark.system

TOPICS = Topics("test")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_RECONNECT_PAUSE_S", 0.2)


@pytest.fixture(params=["mosquitto", "amqtt"])
def program(request: pytest.FixtureRequest) -> Program:
    """Each program that can be the embedded broker, where it is installed."""
    if request.param == "amqtt":
        return Amqtt()
    machine.find_mosquitto()
    mosquitto = find_mosquitto()
    assert mosquitto is not None
    return mosquitto


@pytest.fixture
def broker(program: Program) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(port=0, candidates=[program]) as broker:
        assert broker.program is program
        yield broker


def open_link(broker: EmbeddedBroker, name: str, topics: list[str]) -> closing[BrokerLink]:
    link = BrokerLink(broker.url, name)
    link.subscribe(topics)
    link.start()
    assert link.get(30) == ConnectionUp()
    return closing(link)


def test_a_will_is_delivered(broker: EmbeddedBroker) -> None:
    with open_link(broker, "watcher", ["wills"]) as watcher:
        mortal = BrokerLink(broker.url, "mortal", will=("wills", b"gone"))
        with closing(mortal):
            mortal.start()
            mortal._client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

            assert watcher.get(30) == ("wills", b"gone")


def test_with_a_certificate_it_encrypts(program: Program, tmp_path: Path) -> None:
    lab = Topics("lab")
    with IdentityFolder.make(tmp_path / "the state", "lab") as identity:
        tls = TlsFiles(*identity.listener_files("broker", ["127.0.0.1"]), "lab")
        with EmbeddedBroker(port=0, tls=tls, candidates=[program]) as broker:
            assert broker.url.startswith("mqtts://")
            with closing(BrokerLink(broker.url, "a", tls=identity.tls_context)) as link:
                link.subscribe([lab.servers()])
                link.start()
                assert link.get(30) == ConnectionUp()
                link.publish(lab.servers(), b"123")
                assert link.get(30) == (lab.servers(), b"123")


def test_it_restarts_on_the_same_port_and_links_come_back_with_their_subscriptions(broker: EmbeddedBroker) -> None:
    with open_link(broker, "a", ["x"]) as link:
        link.publish("x", b"123")
        assert link.get(30) == ("x", b"123")
        url = broker.url
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        assert isinstance(link.get(30), ConnectionDown)
        until(lambda: not broker.is_alive)  # its sockets close a moment before it is gone

        broker.stop()
        broker.start()

        assert broker.url == url
        assert link.get(30) == ConnectionUp()
        link.publish("x", b"4567")
        assert link.get(30) == ("x", b"4567")


def test_a_port_that_is_just_becoming_free_is_waited_for() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        threading.Timer(0.5, listener.close).start()
        with EmbeddedBroker(port=port) as broker:
            assert broker.port == port


def test_a_port_that_is_taken_is_named_and_so_is_a_server_of_this_identity_that_has_it(tmp_path: Path) -> None:
    first, copy = (ServerConfig(state=tmp_path / name, port=free_port()) for name in ("first", "copy"))
    copy = replace(copy, port=first.port)
    with IdentityFolder.make(first.state, "lab") as identity, open_connection(first, identity) as reached:
        with pytest.raises(PortTakenError, match=str(first.port)), open_connection(copy, identity):
            pass
        instance = ServerInstance(first.state, owns_broker=True)
        with second_server_guard(reached.url, identity, None, instance) as guard:
            guard.enter()
            with pytest.raises(OtherServerError, match=str(first.state)), open_connection(copy, identity):
                pass


PARENT = """
    import os, sys, time
    from fedprune_server.messaging.broker.embedded import EmbeddedBroker
    from fedprune_server.messaging.broker.programs import Amqtt, available_programs
    from fedprune.wire.link import BrokerLink

    candidates = [Amqtt()] if sys.argv[3] == "amqtt" else available_programs()
    broker = EmbeddedBroker(port=int(sys.argv[2]), candidates=candidates)
    broker.start()
    link = BrokerLink(broker.url, "a", will=("x", b"y"))
    link.subscribe(["x"])
    link.start()
    link.publish("x", bytes(100_000))
    link.get(30)
    link.get(30)
    os.write(3, f"{broker.pid} {broker.port}\\n".encode())
    time.sleep(float(sys.argv[1]))
    link.close()
    broker.stop()
"""


def parent(seconds: float, program: Program) -> tuple[subprocess.Popen[bytes], int, int]:
    """A process with a broker: itself, the broker's pid and port."""
    ours, theirs = os.pipe()
    code = "import os\n" + textwrap.dedent(PARENT).replace("os.write(3,", f"os.write({theirs},")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(seconds), str(free_port()), str(program).split()[0]],
        pass_fds=[theirs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        pid, port = map(int, pipe.readline().split())
    return process, pid, port


def is_gone(pid: int, timeout: float = 30) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_it_dies_with_a_parent_that_is_killed_and_of_no_other_signal(program: Program) -> None:
    process, pid, port = parent(60, program)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert not is_gone(pid, 0.1)

    process.kill()
    process.communicate()

    assert is_gone(pid)
    until(lambda: not listens(port))  # a process's threads may outlive its first one by a moment


@pytest.mark.mosquitto
def test_a_board_that_falls_silent_is_reported_by_its_will() -> None:
    """amqtt reports only a connection that ends."""
    machine.find_mosquitto()
    with (
        EmbeddedBroker(port=0) as broker,
        open_link(broker, "watcher", ["wills"]) as watcher,
        socket.create_connection(("127.0.0.1", broker.port)) as mortal,
    ):
        # CONNECT with a clean session, a keepalive of 1 s and a will; after it not a word.
        body = b"\0\4MQTT\4\6\0\1" + b"\0\4mute" + b"\0\5wills" + b"\0\4gone"
        mortal.sendall(bytes([0x10, len(body)]) + body)
        assert mortal.recv(4) == b"\x20\2\0\0"
        assert watcher.get(10) == ("wills", b"gone")


def script(folder: Path, text: str) -> Path:
    """A program called mosquitto."""
    folder.mkdir()
    path = folder / "mosquitto"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("says", ["echo mosquitto version 1.6.9", "exit 1", "echo something else"])
def test_a_mosquitto_that_is_old_or_broken_is_not_used(
    says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin", says).parent), prepend=":")
    assert available_programs() == [Amqtt()]


def test_amqtt_takes_the_place_of_a_mosquitto_that_does_not_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Mosquitto(str(script(tmp_path / "bin", "echo it has no rights >&2; exit 3")), "2.9")
    with EmbeddedBroker(port=0, candidates=[broken, Amqtt()]) as broker:
        assert broker.program == Amqtt()
        with open_link(broker, "a", ["x"]) as link:
            link.publish("x", b"123")
            assert link.get(30) == ("x", b"123")
    assert "Mosquitto 2.9" in caplog.text
    assert "(it has no rights); amqtt" in caplog.text


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), TimeoutError("timed out")])
def test_a_program_that_runs_and_never_answers_is_no_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr(socket, "create_connection", Mock(side_effect=error))
    broker = EmbeddedBroker(port=0, candidates=[Mosquitto(str(script(tmp_path / "bin", "exec sleep 600")), "2.9")])
    with pytest.raises(BrokerError, match=r"Mosquitto 2\.9"):
        broker.start(timeout=0.1)
    assert not broker.is_alive


@pytest.mark.parametrize("port", [0, 18_839])
def test_an_address_that_is_not_ours_is_named_and_is_no_port_that_is_taken(port: int) -> None:
    with pytest.raises(BrokerError, match=r"192\.0\.2\.1") as caught:
        EmbeddedBroker("192.0.2.1", port).start()
    assert not isinstance(caught.value, PortTakenError)


def test_an_extra_that_is_missing_is_named() -> None:
    class Without(Amqtt):
        def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:
            return Command([sys.executable, "-c", "import amqtt_that_is_missing"])

    with pytest.raises(BrokerError, match=r"No module named.*\[server\]"):
        EmbeddedBroker(port=0, candidates=[Without()]).start()
