from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import BrokerError
from fedprune.wire import link as link_module
from fedprune.wire.chunk import Chunk
from fedprune.wire.link import Link
from fedprune.wire.messages import BlobRequest, parse
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender, Pull
from fedprune_server.messaging.broker.child import kind
from fedprune_server.messaging.broker.embedded import EmbeddedBroker
from support.processes.machine import free_port, listens

pytestmark = pytest.mark.system

TOPICS = Topics("test")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_DELAY", 0.2)


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(port=0) as broker:
        yield broker


def connected(broker: EmbeddedBroker, name: str, topics: list[str]) -> closing[Link]:
    link = Link(broker.url, name)
    link.subscribe(topics)
    link.start()
    assert link.get(30) == ConnectionUp()
    return closing(link)


def pull_through(server: Link, device: Link, source: BlobStore, target: BlobStore, sha256: str) -> None:
    """One blob from server to device, both ends in this thread."""
    ref = source.ref(sha256)
    serve, pull = BlobSender(source), Pull(ref, target.partial(ref))
    wants, deadline = pull.start(time.monotonic()), time.monotonic() + 30
    while not pull.done and time.monotonic() < deadline:
        for want in wants:
            assert device.publish(TOPICS.up("pi"), want.to_bytes())
        wants = []
        asked = server.get(0.01)
        if isinstance(asked, tuple):
            message = parse(asked[1])
            assert isinstance(message, BlobRequest)
            for raw in serve.answer(message):
                assert isinstance(raw, bytes)
                assert server.publish(TOPICS.down_blob("pi"), raw)
        got = device.get(0.01)
        if isinstance(got, tuple):
            wants = pull.on_chunk(Chunk.parse(got[1]), time.monotonic())
    assert pull.done


def test_a_blob_travels_through_it_and_its_bytes_are_counted(broker: EmbeddedBroker, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3_000_000)
    source, target = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    ref = source.put(data)
    with (
        connected(broker, "server", TOPICS.server_subscriptions()) as server,
        connected(broker, "pi", TOPICS.device_subscriptions("pi")) as device,
    ):
        pull_through(server, device, source, target, ref.sha256)
        device.publish("elsewhere", b"12345")
        assert device.flush(30)

    traffic = broker.traffic()

    assert target.read(ref.sha256) == data
    chunks = traffic.received["down/blob"]
    assert len(data) < chunks < 1.01 * len(data)
    assert traffic.delivered["down/blob"] == chunks
    assert 0 < traffic.received["up"] == traffic.delivered["up"] < 20_000
    assert traffic.received["other"] == 5
    assert traffic.delivered["other"] == traffic.received["up/blob"] == traffic.received["down"] == 0


def test_a_will_is_delivered(broker: EmbeddedBroker) -> None:
    with connected(broker, "watcher", ["wills"]) as watcher:
        mortal = Link(broker.url, "mortal", will=("wills", b"gone"))
        with closing(mortal):
            mortal.start()
            mortal._client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

            assert watcher.get(30) == ("wills", b"gone")


def test_it_restarts_on_the_same_port_and_links_come_back_with_their_subscriptions(broker: EmbeddedBroker) -> None:
    with connected(broker, "a", ["x"]) as link:
        link.publish("x", b"123")
        assert link.get(30) == ("x", b"123")
        url = broker.url
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        assert isinstance(link.get(30), ConnectionDown)
        until = time.monotonic() + 30
        while broker.alive and time.monotonic() < until:  # its sockets close a moment before it is gone
            time.sleep(0.01)
        assert not broker.alive

        broker.restart()

        assert broker.url == url
        assert link.get(30) == ConnectionUp()
        link.publish("x", b"4567")
        assert link.get(30) == ("x", b"4567")


def test_traffic_adds_up_over_restarts(broker: EmbeddedBroker) -> None:
    for size in (10, 5):
        with connected(broker, "a", []) as link:
            link.publish("x", bytes(size))
        broker.restart()

    assert broker.traffic().received["other"] == 15
    broker.stop()
    assert broker.traffic().received["other"] == 15


def test_a_port_that_is_just_becoming_free_is_waited_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        threading.Timer(0.5, taken.close).start()
        with EmbeddedBroker(port=port) as broker:
            assert broker.port == port


def test_a_taken_port_is_named(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedprune_server.messaging.broker.embedded._PORT_PATIENCE_S", 0.0)
    second = EmbeddedBroker(port=broker.port)

    with pytest.raises(BrokerError, match=rf"port {broker.port} of 127\.0\.0\.1 is taken"):
        second.start()
    assert not second.alive


def test_an_address_that_is_not_ours_is_named() -> None:
    for port in (0, 18_839):
        with pytest.raises(BrokerError, match=r"192\.0\.2\.1"):
            EmbeddedBroker("192.0.2.1", port).start()


def test_starting_and_stopping_twice_is_harmless() -> None:
    broker = EmbeddedBroker(port=0)
    broker.stop()
    broker.start()
    pid = broker.pid
    broker.start()
    assert broker.pid == pid
    broker.stop()
    broker.stop()
    assert not broker.alive


def test_it_survives_the_thread_that_started_it() -> None:
    broker = EmbeddedBroker(port=0)
    thread = threading.Thread(target=broker.start)
    thread.start()
    thread.join()
    time.sleep(0.3)

    assert broker.alive
    broker.stop()


PARENT = """
    import os, sys, time
    from fedprune_server.messaging.broker.embedded import EmbeddedBroker
    from fedprune.wire.link import Link

    broker = EmbeddedBroker(port=int(sys.argv[2]))
    broker.start()
    link = Link(broker.url, "a", will=("x", b"y"))
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


def parent(seconds: float) -> tuple[subprocess.Popen[bytes], int, int]:
    """A process with a broker: itself, the broker's pid and port."""
    ours, theirs = os.pipe()
    code = "import os\n" + textwrap.dedent(PARENT).replace("os.write(3,", f"os.write({theirs},")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(seconds), str(free_port())],
        pass_fds=[theirs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        pid, port = map(int, pipe.readline().split())
    return process, pid, port


def gone(pid: int, timeout: float = 30) -> bool:
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


def test_it_dies_with_a_parent_that_is_killed() -> None:
    process, pid, port = parent(60)
    assert not gone(pid, 0.1)

    process.kill()
    process.communicate()

    assert gone(pid)
    deadline = time.monotonic() + 30
    while listens(port):  # a process's threads may outlive its first one by a moment
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_printed_from_start_to_end() -> None:
    process, pid, _ = parent(0.1)

    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (0, b"", b"")
    assert gone(pid)


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        (TOPICS.up("pi"), "up"),
        (TOPICS.up_blob("pi", "job"), "up/blob"),
        (TOPICS.down("pi"), "down"),
        (TOPICS.down_blob("up"), "down/blob"),
        (TOPICS.broadcast(), "down"),
        ("up", "other"),
        ("x/1/site/pi/-/up", "other"),
        ("", "other"),
    ],
)
def test_topics_are_counted_by_their_channel(topic: str, expected: str) -> None:
    assert kind(topic) == expected
