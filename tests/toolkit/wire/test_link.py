import datetime as dt
import gc
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import BrokerError, ConfigError
from fedprune.wire import link as link_module
from fedprune.wire import queues
from fedprune.wire.link import BrokerLink, tls_context
from fedprune.wire.queues import ConnectionDown, ConnectionUp, Inbox
from support.waiting import attempts, until

Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_RECONNECT_PAUSE_S", 0.2)


def connect(url: str, name: str, topics: list[str] | None = None, **options: Any) -> closing[BrokerLink]:
    link = BrokerLink(url, name, **options)
    link.subscribe(topics or [])
    link.start()
    assert link.get(30) == ConnectionUp()
    return closing(link)


@pytest.mark.board
@pytest.mark.parametrize(
    "url", ["", "http://broker", "mqtt://", "mqtt://h:70000", "mqtt://h:1x", "mqtt://[::1", "mqtt://h/path"]
)
def test_what_is_no_broker_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="broker URL"):
        BrokerLink(url, "x")


@pytest.mark.board
def test_passwords_are_not_shown() -> None:
    link = BrokerLink("mqtt://user:secret@127.0.0.1:1", "x")

    with pytest.raises(BrokerError) as caught:
        link.start()
    assert "secret" not in f"{caught.value} {link.url} {link.url!r}"


@pytest.mark.board
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system doesn't list open files")
def test_attempts_that_fail_before_they_connect_leave_no_file_open(tmp_path: Path) -> None:
    attempts_count = 0

    def missing_authority() -> ssl.SSLContext:
        nonlocal attempts_count
        attempts_count += 1
        return tls_context(tmp_path / "missing.pem")

    gc.disable()  # it would close them, some time
    try:
        with closing(BrokerLink("mqtts://127.0.0.1:1", "x", tls=missing_authority)) as link:
            count_before = len(list(Path("/proc/self/fd").iterdir()))
            link.start(patient=True)
            until(lambda: attempts_count > 5)
            assert len(list(Path("/proc/self/fd").iterdir())) <= count_before + 3
    finally:
        gc.enable()


@pytest.mark.board
def test_a_server_that_is_no_broker_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(BrokerError, match=r"no answer within 0\.5 s"):
        BrokerLink(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", "x").start(timeout=0.5)


@pytest.mark.board
def test_publishing_while_offline_is_declined() -> None:
    link = BrokerLink("mqtt://127.0.0.1:1", "x")
    link.start(patient=True)

    assert not link.publish("a", b"b")
    assert link.get() is None
    link.close()


@pytest.mark.mosquitto
class TestWithMosquitto:
    def test_a_subscription_made_while_connected_is_in_force_at_once(self, mosquitto: Any) -> None:
        with connect(mosquitto.url, "a") as sender, connect(mosquitto.url, "b") as receiver:
            receiver.subscribe(["late"])
            sender.publish("late", b"1")

            assert receiver.get(30) == ("late", b"1")

    def test_after_the_broker_s_death_the_link_comes_back_with_its_subscriptions(
        self, mosquitto: Any, start_mosquitto: Start
    ) -> None:
        with connect(mosquitto.url, "a") as sender, connect(mosquitto.url, "b", ["x"]) as receiver:
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

    def test_the_will_is_published_when_the_connection_breaks_and_not_when_it_is_closed(self, mosquitto: Any) -> None:
        sessions = iter(range(1, 10))

        def will() -> tuple[str, bytes]:
            return "wills", str(next(sessions)).encode()

        with connect(mosquitto.url, "watcher", ["wills"]) as watcher:
            with connect(mosquitto.url, "mortal", will=will) as mortal:
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
            connect(mosquitto.url, "watcher", ["wills", "x"]) as watcher,
            connect(mosquitto.url, "guest", will=will) as guest,
        ):
            guest.publish("x", b"last")
            began = time.monotonic()
            guest.leave(1.0)
            assert guest.get(30) == ConnectionDown("away for 1 s")
            assert guest.is_away
            assert not guest.publish("x", b"lost")
            assert guest.get(30) == ConnectionUp()
            assert time.monotonic() - began >= 1
            assert not guest.is_away
            assert guest.publish("x", b"again")
            assert [watcher.get(30), watcher.get(30)] == [("x", b"last"), ("x", b"again")]
            guest.leave(3600)
            assert isinstance(guest.get(30), ConnectionDown)
            guest.close()
            assert watcher.get(0.3) is None

    def test_nothing_is_sent_again_after_a_reconnection(self, mosquitto: Any, start_mosquitto: Start) -> None:
        with connect(mosquitto.url, "a") as sender:
            mosquitto.process.send_signal(19)  # SIGSTOP: the connection stays, nothing is acknowledged
            for _ in range(100):
                assert sender.publish("x", bytes(1000))
            assert sender.unsent == 100_000
            mosquitto.kill()
            assert isinstance(sender.get(30), ConnectionDown)
            assert sender.unsent == 0
            start_mosquitto(mosquitto.port)
            assert sender.get(30) == ConnectionUp()
            with connect(mosquitto.url, "b", ["x"]) as receiver:
                assert receiver.get(0.3) is None

    def test_what_can_t_be_sent_is_declined_before_it_fills_the_memory(
        self, mosquitto: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queues, "OUTBOX_BYTES", 1_000_000)
        with connect(mosquitto.url, "a") as sender:
            mosquitto.process.send_signal(19)
            assert [sender.publish("x", bytes(100_000)) for _ in range(20)] == [True] * 10 + [False] * 10
            assert not sender.room
            mosquitto.process.send_signal(18)
            assert sender.flush(30)
            assert sender.publish("x", b"1")

    def test_who_holds_chunks_back_is_woken_when_little_is_left_to_send(self, mosquitto: Any) -> None:
        with connect(mosquitto.url, "a") as sender:
            mosquitto.process.send_signal(19)
            assert sender.publish("x", bytes(queues.LOW_WATER))
            mosquitto.process.send_signal(18)
            assert sender.get(None) is None
            assert sender.unsent < queues.LOW_WATER

    def test_a_flood_is_dropped_and_counted(self, mosquitto: Any) -> None:
        with connect(mosquitto.url, "a") as sender, connect(mosquitto.url, "b", ["x"]) as receiver:
            receiver._inbox.limit = 30_000  # of which one sender gets half
            for _ in range(30):
                sender.publish("x", bytes(1000))
            sender.flush(30)
            until(lambda: receiver.dropped_count >= 20)
            assert receiver.dropped_count == 20
            assert [receiver.get() for _ in range(10)] == [("x", bytes(1000))] * 10

    def test_a_wrong_password_is_told_from_a_broker_that_is_not_there(
        self, start_mosquitto: Start, tmp_path: Path
    ) -> None:
        (tmp_path / "passwords").write_text("")
        broker = start_mosquitto(0, f"listener {{port}} 127.0.0.1\npassword_file {tmp_path}/passwords\n")

        with pytest.raises(BrokerError, match="user name"):
            BrokerLink(broker.url.replace("//", "//user:wrong@"), "a").start()

    # paho leaves the socket of a failed handshake to the garbage collector.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_tls_verifies_the_broker(self, start_mosquitto: Start, certificate: tuple[Path, Path]) -> None:
        cert, key = certificate
        broker = start_mosquitto(
            0, f"listener {{port}} 127.0.0.1\nallow_anonymous true\ncertfile {cert}\nkeyfile {key}\ncafile {cert}\n"
        )
        url = broker.url.replace("mqtt:", "mqtts:")
        with connect(url, "a", ["x"], tls=lambda: tls_context(cert)) as link:
            link.publish("x", bytes(300_000))
            assert link.get(30) == ("x", bytes(300_000))
        with pytest.raises(BrokerError, match="TLS failed"):
            BrokerLink(url, "b").start()


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


@pytest.mark.mosquitto
@pytest.mark.system
def test_a_connection_that_is_flooded_closes_for_a_while_and_names_the_topic(start_mosquitto: Start) -> None:
    broker = start_mosquitto()
    woken: list[int] = []
    with (
        connect(
            broker.url, "listener", ["a/b/c/+/-/join"], inbox=Inbox(50_000), pause_s=0.3, wake=lambda: woken.append(1)
        ) as listener,
        connect(broker.url, "stranger") as stranger,
    ):
        for _ in range(500):
            stranger.publish("a/b/c/flood/-/join", b"x", 0)
        stranger.publish("elsewhere", b"", 1)
        assert stranger.flush(30)  # the broker has passed the whole flood on
        until(lambda: listener.dropped_count)  # nothing is read until the inbox is full
        heard = []
        for _ in attempts("another connection", pause_s=0.0):
            heard.append(listener.get(1))
            if isinstance(heard[-1], ConnectionUp):
                break
        assert any(isinstance(item, ConnectionDown) for item in heard)
        assert sum(isinstance(item, tuple) for item in heard) <= 100
        assert listener.flooding_prefix == "a/b/c/flood"
        assert listener.dropped_count
        assert woken
        hello, item = ("a/b/c/board/-/join", b"hello"), None
        for _ in attempts("a greeting", pause_s=0.0):  # the flood's end may close the connection once more
            stranger.publish(*hello)
            item = listener.get(1)
            if item == hello:
                break


def test_a_file_of_authorities_that_holds_none_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no certificate")
    for path in (tmp_path / "key.pem", tmp_path, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
            tls_context(path)
        assert caught.value.hint
        assert not any(word in str(caught.value) for word in ("_ssl", "Errno"))
