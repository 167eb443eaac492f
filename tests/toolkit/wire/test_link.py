from __future__ import annotations

import datetime as dt
import ipaddress
import random
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import BrokerError, ConfigError
from fedprune.wire import link as link_module
from fedprune.wire import queues
from fedprune.wire.link import Link, longest_pause, tls_context
from fedprune.wire.queues import ConnectionDown, ConnectionUp, Inbox
from fedprune.wire.urls import BrokerUrl
from support.processes.machine import free_port
from support.waiting import attempts, until

Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_DELAY", 0.2)


def connected(url: str, name: str, topics: list[str] | None = None, **options: Any) -> closing[Link]:
    link = Link(url, name, **options)
    link.subscribe(topics or [])
    link.start()
    assert link.get(30) == ConnectionUp()
    return closing(link)


@pytest.mark.board
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://broker", BrokerUrl("broker", 1883, False, None, None)),
        ("mqtts://broker", BrokerUrl("broker", 8883, True, None, None)),
        ("mqtt://u%40x:p%2Fw@10.0.0.1:99/", BrokerUrl("10.0.0.1", 99, False, "u@x", "p/w")),
        ("mqtt://[::1]:5", BrokerUrl("::1", 5, False, None, None)),
    ],
)
def test_urls_are_read(url: str, expected: BrokerUrl) -> None:
    assert BrokerUrl.parse(url) == expected


@pytest.mark.board
def test_an_address_without_a_scheme_comes_with_the_url_that_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"Try mqtts://localhost:8883\.") as error:
        BrokerUrl.parse("user:secret@localhost:8883")
    assert "secret" not in str(error.value)


@pytest.mark.board
@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker",
        "http://broker",
        "mqtt://",
        "mqtt://h:0",
        "mqtt://h:70000",
        "mqtt://h:1x",
        "mqtt://[::1",
        "mqtt://h/path",
    ],
)
def test_what_is_no_broker_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="broker URL"):
        Link(url, "x")


@pytest.mark.board
def test_passwords_are_not_shown() -> None:
    link = Link("mqtt://user:secret@127.0.0.1:1", "x")

    with pytest.raises(BrokerError) as caught:
        link.start()
    assert "secret" not in f"{caught.value} {link.url} {link.url!r}"


@pytest.mark.board
def test_a_broker_that_is_not_there_is_named_with_what_to_check() -> None:
    with pytest.raises(BrokerError, match=r"127\.0\.0\.1:1: connection refused\. Is a broker running"):
        Link("mqtt://127.0.0.1:1", "x").start()


@pytest.mark.board
def test_a_host_that_is_unknown_is_named() -> None:
    with pytest.raises(BrokerError, match=r"nowhere\.invalid:1883: the host name is unknown"):
        Link("mqtt://nowhere.invalid", "x").start()


@pytest.mark.board
def test_a_server_that_is_no_broker_is_given_up() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(BrokerError, match=r"no answer within 0\.5 s"),
    ):
        Link(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", "x").start(timeout=0.5)


@pytest.mark.board
def test_a_slow_broker_has_its_time_for_each_answer_and_not_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_ANSWER_S", -4.0)  # of paho's 5 s for a connection one is left
    pause = 0.7

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(1000)
                time.sleep(pause)
                connection.sendall(b"\x20\x02\0\0")
                number = connection.recv(1000)[2:4]
                time.sleep(pause)
                connection.sendall(b"\x90\x03" + number + b"\x01")
                connection.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        link = Link(f"mqtt://127.0.0.1:{server.getsockname()[1]}", "slow")
        link.subscribe(["topic"])
        with closing(link):
            link.start(patient=True)
            up = link.get(30)
            assert isinstance(up, ConnectionUp)
            assert 2 * pause <= up.took < 10  # what a receiver takes for the way's slowness
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.board
def test_publishing_while_offline_is_declined() -> None:
    link = Link("mqtt://127.0.0.1:1", "x")
    link.start(patient=True)

    assert not link.publish("a", b"b")
    assert link.get() is None
    link.close()


@pytest.mark.board
def test_pauses_grow_up_to_a_minute_and_are_spread_over_more_where_many_share_a_broker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert [longest_pause(n) for n in (0, 1, 6, 7, 99)] == [0.5, 1.0, 32.0, 60.0, 60.0]
    assert [longest_pause(n, 40.0) for n in (0, 1, 6, 7, 99)] == [40.0, 40.0, 40.0, 60.0, 60.0]
    assert longest_pause(0, 100.0) == longest_pause(99, 100.0) == 100.0


@pytest.mark.board
def test_a_lost_broker_is_tried_after_pauses_of_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def uniform(_: object, least: float, most: float) -> float:
        limits.append(most)
        return 0.01

    monkeypatch.setattr(link_module.SystemRandom, "uniform", uniform)
    with closing(Link("mqtt://127.0.0.1:1", "x")) as link:
        link.spread_s = 40.0
        link.start(patient=True)
        until(lambda: len(limits) >= 4)
    assert limits[:4] == [40.0] * 4


@pytest.mark.board
def test_pauses_do_not_depend_on_a_seed_of_the_user_s_program(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None:
                found.append(timeout)
                random.seed(0)
            return super().wait(0.01)

    with closing(Link("mqtt://127.0.0.1:1", "x")) as link:
        monkeypatch.setattr(link, "_closing", Closing())
        link.spread_s = 40.0
        random.seed(0)
        link.start(patient=True)
        until(lambda: len(found) >= 4)
    assert len(set(found[:4])) == 4


@pytest.mark.board
def test_each_reason_of_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    link = Link("mqtt://127.0.0.1:1", "x")
    link._tell = True
    for reason in ("the connection was lost", "connection refused", "no answer", "connection refused", "no answer"):
        link._lost(reason)
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records][1:] == ["connection refused", "no answer"]
    with link._state:
        link._report_up()
    link._lost("the connection was lost")  # which the link's owner logs
    link._lost("connection refused")
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records][3:] == ["connection refused"]


@pytest.mark.board
def test_a_link_without_a_connection_can_not_leave() -> None:
    link = Link("mqtt://127.0.0.1:1", "x")
    link.leave(3600)
    assert not link.away
    link.close()


@pytest.mark.mosquitto
class TestWithMosquitto:
    def test_what_is_published_arrives_in_order(self, mosquitto: Any) -> None:
        with connected(mosquitto.url, "a") as sender, connected(mosquitto.url, "b", ["x/#"]) as receiver:
            for i in range(200):
                assert sender.publish(f"x/{i % 3}", str(i).encode(), qos=i % 2)

            got = [receiver.get(30) for _ in range(200)]
            by_qos = [[item for item in got if int(item[1]) % 2 == qos] for qos in (0, 1)]  # type: ignore[index]
            assert by_qos == [[(f"x/{i % 3}", str(i).encode()) for i in range(qos, 200, 2)] for qos in (0, 1)]
            assert sender.flush(30)
            assert sender.unsent == 0

    def test_a_subscription_made_while_connected_is_in_force_at_once(self, mosquitto: Any) -> None:
        with connected(mosquitto.url, "a") as sender, connected(mosquitto.url, "b") as receiver:
            receiver.subscribe(["late"])
            sender.publish("late", b"1")

            assert receiver.get(30) == ("late", b"1")

    def test_after_the_broker_s_death_the_link_comes_back_with_its_subscriptions(
        self, mosquitto: Any, start_mosquitto: Start
    ) -> None:
        with connected(mosquitto.url, "a") as sender, connected(mosquitto.url, "b", ["x"]) as receiver:
            mosquitto.kill()
            assert isinstance(receiver.get(30), ConnectionDown)
            assert isinstance(sender.get(30), ConnectionDown)
            assert not sender.publish("x", b"lost")
            time.sleep(0.5)
            start_mosquitto(mosquitto.port)

            assert receiver.get(30) == ConnectionUp()
            assert sender.get(30) == ConnectionUp()
            assert sender.publish("x", b"again")
            assert receiver.get(30) == ("x", b"again")

    def test_a_patient_link_waits_for_the_broker(self, start_mosquitto: Start) -> None:
        port = free_port()
        with closing(Link(f"mqtt://127.0.0.1:{port}", "a")) as link:
            link.start(patient=True)
            assert link.get(0.3) is None
            start_mosquitto(port)

            assert link.get(30) == ConnectionUp()
            assert link.connected

    def test_the_will_is_published_when_the_connection_breaks_and_not_when_it_is_closed(self, mosquitto: Any) -> None:
        sessions = iter(range(1, 10))

        def will() -> tuple[str, bytes]:
            return "wills", str(next(sessions)).encode()

        with connected(mosquitto.url, "watcher", ["wills"]) as watcher:
            with connected(mosquitto.url, "mortal", will=will) as mortal:
                mortal._client.socket().shutdown(socket.SHUT_RDWR)
                assert watcher.get(30) == ("wills", b"1")
                assert isinstance(mortal.get(30), ConnectionDown)
                assert mortal.get(30) == ConnectionUp()
                mortal._client.socket().shutdown(socket.SHUT_RDWR)
                assert watcher.get(30) == ("wills", b"2")
                mortal.get(30)
                assert mortal.get(30) == ConnectionUp()
            assert watcher.get(0.5) is None

    def test_who_leaves_is_away_for_that_long_without_its_will_and_comes_back(self, mosquitto: Any) -> None:
        will = ("wills", b"lost")
        with (
            connected(mosquitto.url, "watcher", ["wills", "x"]) as watcher,
            connected(mosquitto.url, "guest", will=will) as guest,
        ):
            guest.publish("x", b"last")
            began = time.monotonic()
            guest.leave(1.0)
            assert guest.get(30) == ConnectionDown("away for 1 s")
            assert guest.away
            assert not guest.publish("x", b"lost")
            assert guest.get(30) == ConnectionUp()
            assert time.monotonic() - began >= 1
            assert not guest.away
            assert guest.publish("x", b"again")
            assert [watcher.get(30), watcher.get(30)] == [("x", b"last"), ("x", b"again")]
            guest.leave(3600)
            assert isinstance(guest.get(30), ConnectionDown)
            guest.close()
            assert watcher.get(0.3) is None

    def test_nothing_is_sent_again_after_a_reconnection(self, mosquitto: Any, start_mosquitto: Start) -> None:
        with connected(mosquitto.url, "a") as sender:
            mosquitto.process.send_signal(19)  # SIGSTOP: the connection stays, nothing is acknowledged
            for _ in range(100):
                assert sender.publish("x", bytes(1000))
            assert sender.unsent == 100_000
            mosquitto.kill()
            assert isinstance(sender.get(30), ConnectionDown)
            assert sender.unsent == 0
            start_mosquitto(mosquitto.port)
            assert sender.get(30) == ConnectionUp()
            with connected(mosquitto.url, "b", ["x"]) as receiver:
                assert receiver.get(0.3) is None

    def test_what_can_t_be_sent_is_declined_before_it_fills_the_memory(
        self, mosquitto: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queues, "OUTBOX_BYTES", 1_000_000)
        with connected(mosquitto.url, "a") as sender:
            mosquitto.process.send_signal(19)
            sent = [sender.publish("x", bytes(100_000)) for _ in range(20)]
            assert sent == [True] * 10 + [False] * 10
            assert not sender.room
            mosquitto.process.send_signal(18)
            assert sender.flush(30)
            assert sender.publish("x", b"1")

    def test_who_holds_chunks_back_is_woken_when_little_is_left_to_send(self, mosquitto: Any) -> None:
        with connected(mosquitto.url, "a") as sender:
            mosquitto.process.send_signal(19)
            assert sender.publish("x", bytes(queues.LOW_WATER))
            mosquitto.process.send_signal(18)
            assert sender.get(None) is None
            assert sender.unsent < queues.LOW_WATER

    def test_a_flood_is_dropped_and_counted(self, mosquitto: Any) -> None:
        with connected(mosquitto.url, "a") as sender, connected(mosquitto.url, "b", ["x"]) as receiver:
            receiver._inbox.limit = 30_000  # of which one sender gets half
            for _ in range(30):
                sender.publish("x", bytes(1000))
            sender.flush(30)
            until(lambda: receiver.dropped >= 20)
            assert receiver.dropped == 20
            assert [receiver.get() for _ in range(10)] == [("x", bytes(1000))] * 10

    def test_a_second_client_of_the_same_name_does_not_start_a_fast_fight(self, mosquitto: Any) -> None:
        with connected(mosquitto.url, "same") as first, connected(mosquitto.url, "same") as second:
            time.sleep(1)
            events = [link.get() for link in (first, second) for _ in range(200)]

        assert sum(isinstance(e, ConnectionUp) for e in events) < 60

    def test_publishing_from_many_threads_while_receiving_loses_nothing(self, mosquitto: Any) -> None:
        with connected(mosquitto.url, "a", ["x"]) as link:

            def publish(name: int) -> None:
                for i in range(250):
                    assert link.publish("x", f"{name}-{i}".encode(), qos=i % 2)

            threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            got = [link.get(30) for _ in range(1000)]
            for thread in threads:
                thread.join()

            assert {g[1] for g in got} == {f"{n}-{i}".encode() for n in range(4) for i in range(250)}  # type: ignore[index]
            assert link.flush(30)

    def test_a_wrong_password_is_told_from_a_broker_that_is_not_there(
        self, start_mosquitto: Start, tmp_path: Path
    ) -> None:
        (tmp_path / "passwords").write_text("")
        broker = start_mosquitto(0, f"listener {{port}} 127.0.0.1\npassword_file {tmp_path}/passwords\n")

        with pytest.raises(BrokerError, match=r"it refuses the connection .*do user name and password fit\?$"):
            Link(broker.url.replace("//", "//user:wrong@"), "a").start()

    # paho leaves the socket of a failed handshake to the garbage collector.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_tls_verifies_the_broker(self, start_mosquitto: Start, certificate: tuple[Path, Path]) -> None:
        cert, key = certificate
        broker = start_mosquitto(
            0, f"listener {{port}} 127.0.0.1\nallow_anonymous true\ncertfile {cert}\nkeyfile {key}\ncafile {cert}\n"
        )
        url = broker.url.replace("mqtt:", "mqtts:")
        with connected(url, "a", ["x"], tls=lambda: tls_context(cert)) as link:
            link.publish("x", bytes(300_000))
            assert link.get(30) == ("x", bytes(300_000))
        with pytest.raises(BrokerError, match="TLS failed"):
            Link(url, "b").start()

    def test_a_certificate_that_the_broker_refuses_is_the_cause_that_is_told(
        self, certificate: tuple[Path, Path]
    ) -> None:
        """With TLS 1.3 a client's handshake is done before the broker has looked at its certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        with socket.create_server(("127.0.0.1", 0)) as server:

            def refuse() -> None:
                context.wrap_socket(server.accept()[0], server_side=True).close()

            threading.Thread(target=refuse, daemon=True).start()
            link = Link(f"mqtts://127.0.0.1:{server.getsockname()[1]}", "a", tls=lambda: tls_context(certificate[0]))
            with pytest.raises(BrokerError, match=r"as if this client's certificate were revoked\. `fedprune-"):
                link.start()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.timezone.utc)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "cert.pem").write_bytes(cert.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(private)
    return tmp_path / "cert.pem", tmp_path / "key.pem"


@pytest.mark.board
def test_a_slow_signal_handler_does_not_make_a_timeout_wait_for_ever() -> None:
    """Where a handler takes longer than what is left of it, some queues do."""
    link = Link("mqtt://127.0.0.1:1", "a")
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_: (came.append(1), time.sleep(0.3)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert link.get(0.1) is None
    finally:
        signal.signal(signal.SIGALRM, before)
    assert came


@pytest.mark.mosquitto
@pytest.mark.system
def test_a_connection_that_is_flooded_closes_for_a_while_and_names_the_topic(start_mosquitto: Start) -> None:
    broker = start_mosquitto()
    woken: list[int] = []
    with (
        connected(
            broker.url, "listener", ["a/b/c/+/-/join"], inbox=Inbox(50_000), pause_s=0.3, wake=lambda: woken.append(1)
        ) as listener,
        connected(broker.url, "stranger") as stranger,
    ):
        for _ in range(500):
            stranger.publish("a/b/c/flood/-/join", b"x", 0)
        stranger.publish("elsewhere", b"", 1)
        assert stranger.flush(30)  # the broker has passed the whole flood on
        until(lambda: listener.dropped)  # nothing is read until the inbox is full
        heard = []
        for _ in attempts("another connection", pause_s=0.0):
            heard.append(listener.get(1))
            if isinstance(heard[-1], ConnectionUp):
                break
        assert any(isinstance(item, ConnectionDown) for item in heard)
        assert sum(isinstance(item, tuple) for item in heard) <= 100
        assert listener.overflowed == "a/b/c/flood"
        assert listener.dropped
        assert woken
        hello, item = ("a/b/c/board/-/join", b"hello"), None
        for _ in attempts("a greeting", pause_s=0.0):  # the flood's end may close the connection once more
            stranger.publish(*hello)
            item = listener.get(1)
            if item == hello:
                break


@pytest.mark.mosquitto
def test_a_flood_that_goes_on_closes_the_connection_no_longer_each_time(mosquitto: Any) -> None:
    pauses: list[float] = []

    class Pauses(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return super().wait(0.01)

    listener = Link(mosquitto.url, "listener", inbox=Inbox(50_000), pause_s=7.0)
    listener._closing = Pauses()
    listener.subscribe(["x/#"])
    listener.start()
    with closing(listener), connected(mosquitto.url, "stranger") as stranger:
        for _ in attempts("five pauses", pause_s=0.0):
            if len(pauses) >= 5:
                break
            for _ in range(200):
                stranger.publish("x/flood", b"x", 0)
            if isinstance(listener.get(0.0), ConnectionDown):
                while not isinstance(listener.get(30), ConnectionUp):
                    pass
        assert pauses[:5] == [7.0] * 5


@pytest.mark.mosquitto
def test_what_has_arrived_is_read_without_looking_at_the_socket_for_each_message(
    mosquitto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, go = 0, threading.Event()
    loop = link_module.paho.Client.loop

    def counted(client: Any, timeout: float) -> Any:
        nonlocal looks
        looks += client.socket() is not None and client._client_id == b"a"
        return loop(client, timeout)

    monkeypatch.setattr(link_module.paho.Client, "loop", counted)
    with (
        connected(mosquitto.url, "a", ["x/#"], ignores=lambda topic: not go.wait(30)) as a,
        connected(mosquitto.url, "b") as b,
    ):
        for number in range(500):
            assert b.publish("x/y", str(number).encode(), 0)
        assert b.publish("x/y", b"last")
        assert b.flush(30)  # the broker has sent them all to the other, too
        before = looks
        go.set()
        heard = [a.get(30) for _ in range(501)]

    assert heard == [("x/y", str(number).encode()) for number in range(500)] + [("x/y", b"last")]
    assert looks - before < 100


@pytest.mark.parametrize("qos", [0, 1])
def test_what_comes_at_qos_0_is_not_acknowledged(mosquitto: Any, monkeypatch: pytest.MonkeyPatch, qos: int) -> None:
    acknowledged: list[int] = []
    send = link_module.paho.Client._send_puback

    def counted(client: Any, mid: int) -> Any:
        acknowledged.append(mid)
        return send(client, mid)

    monkeypatch.setattr(link_module.paho.Client, "_send_puback", counted)
    with connected(mosquitto.url, "a", ["x/#"], qos=qos) as a, connected(mosquitto.url, "b") as b:
        for number in range(20):
            assert b.publish("x/y", str(number).encode())
        assert [a.get(30) for _ in range(20)] == [("x/y", str(number).encode()) for number in range(20)]
    assert len(acknowledged) == 20 * qos
