"""The configuration that `fedprune-server broker-config` writes, on a real Mosquitto with paho clients."""

from __future__ import annotations

import queue
import re
import secrets
import shlex
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fedprune.core.errors import IdentityError
from fedprune.security.authority import Authority
from fedprune.security.certificates import make_request, make_tls_key, save_tls_key
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.tls import pinned_context, unpinned_context
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.topics import Topics
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.messaging.broker.broker_files import BrokerAddress, filled_template, write_broker
from fedprune_server.messaging.broker.embedded import EmbeddedBroker
from fedprune_server.messaging.broker.programs import Amqtt, TlsFiles
from fedprune_server.messaging.broker.programs import find_mosquitto as find_program
from fedprune_server.messaging.broker.revocations import list_delivery
from support.processes.machine import find_mosquitto, free_port, listens
from support.waiting import attempts, until

LAB = Topics("lab")
QUIET_S = 0.4


class Site:
    """A server's identity, and a Mosquitto with the configuration that it wrote."""

    def __init__(self, folder: Path, binary: str) -> None:
        self.folder = folder
        self.identity = IdentityFolder.make(folder / "state", "lab")
        self.broker = BrokerAddress(("127.0.0.1", "localhost"), free_port(), free_port(), folder / "broker")
        self.log = (folder / "log").open("wb")
        write_broker(self.identity, "mosquitto", self.broker, self.broker.folder)
        with (self.broker.folder / "mosquitto.conf").open("a") as file:
            file.write("user root\n")  # what starts it here can't give its files to another user
        main = self.folder / "debian.conf"
        main.write_text(f"log_dest file {self.folder / 'rotated.log'}\ninclude_dir {self.broker.folder}\n")
        self.process = subprocess.Popen([binary, "-c", main], stdout=self.log, stderr=subprocess.STDOUT)
        for _ in attempts("mosquitto's start"):
            if listens(self.broker.port) and listens(self.broker.join_port):
                break
            assert self.process.poll() is None, (self.folder / "log").read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.identity.close()

    def device(self, name: str) -> DeviceIdentity:
        """A device that has joined."""
        device = DeviceIdentity(self.folder / "boards" / secrets.token_hex(4), "lab", name)
        claim = self.identity.make_claim(name, 60)
        device.admit(EnrollmentService(self.identity).answer(device.request(claim)), claim.pin)
        return device

    @contextmanager
    def client(self, context: ssl.SSLContext, client_id: str = "") -> Iterator[Client]:
        client = Client(context, [], client_id or secrets.token_hex(12))
        try:
            client.connect(self.broker.port)
            yield client
        finally:
            client.close()

    def refuses(self, context: ssl.SSLContext) -> bool:
        """Whether the broker takes no client with this context."""
        try:
            with self.client(context):
                return False
        except (OSError, TimeoutError):
            return True


class Client:
    """A paho client of MQTT 3.1.1 that notes what it gets."""

    def __init__(self, context: ssl.SSLContext | None, topics: list[str], client_id: str, user: str = "") -> None:
        self.got: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.ready, self.gone = threading.Event(), threading.Event()
        self.paho = paho.Client(CallbackAPIVersion.VERSION2, client_id, reconnect_on_failure=False)
        if context is not None:
            self.paho.tls_set_context(context)
        if user:
            self.paho.username_pw_set(user)
        self.topics, self.waiting = topics, set[int]()
        self.paho.on_connect = self._on_connect
        self.paho.on_subscribe = lambda _c, _u, mid, _codes, _p: self._on_subscribe(mid)
        self.paho.on_message = lambda _c, _u, m: self.got.put((m.topic, m.payload))
        self.paho.on_disconnect = lambda *_: self.gone.set()

    def connect(self, port: int) -> None:
        self.paho.connect("127.0.0.1", port)
        self.paho.loop_start()
        until(lambda: self.ready.is_set() or self.gone.is_set())
        if self.gone.is_set():
            raise ConnectionError("the broker has hung up")

    def _on_connect(
        self, _client: paho.Client, _user: object, _flags: object, code: paho.ReasonCode, _p: object
    ) -> None:
        if code.is_failure:
            self.gone.set()
            return
        self.waiting = {self.paho.subscribe(t, 1)[1] or 0 for t in self.topics}
        if not self.topics:
            self.ready.set()

    def _on_subscribe(self, mid: int) -> None:
        self.waiting.discard(mid)
        if not self.waiting:
            self.ready.set()

    def publish(self, topic: str, payload: bytes) -> None:
        self.paho.publish(topic, payload, 1).wait_for_publish(30)

    def all(self, min_count: int = 0) -> list[tuple[str, bytes]]:
        """What has come, once nothing more comes; for so many messages it waits as long as it takes."""
        messages = []
        with suppress(queue.Empty):
            while len(messages) < min_count:
                messages.append(self.got.get(timeout=30))
            while True:
                messages.append(self.got.get(timeout=QUIET_S))
        return messages

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()
        # Without the cycle its sockets are closed at once, and not left to an order of the garbage collector's.
        self.paho.on_connect = self.paho.on_subscribe = self.paho.on_message = self.paho.on_disconnect = None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"), find_mosquitto())
    yield site
    site.close()


@pytest.fixture(scope="module")
def pi_1(site: Site) -> DeviceIdentity:
    return site.device("pi-1")


@pytest.fixture(scope="module")
def pi_2(site: Site) -> DeviceIdentity:
    return site.device("pi-2")


READERS_AND_WRITERS = {
    **{LAB.up(name, job): ({"server"}, {name}) for name in ("pi-1", "pi-2") for job in ("-", "job")},
    **{LAB.up_blob(name): ({"server"}, {name}) for name in ("pi-1", "pi-2")},
    **{LAB.down(name, job): ({name}, {"server"}) for name in ("pi-1", "pi-2") for job in ("-", "job")},
    **{LAB.down_blob(name): ({name}, {"server"}) for name in ("pi-1", "pi-2")},
    **{
        LAB.join_request(32 * d): ({"server"}, {who})
        for d, who in zip("123", ("pi-1", "pi-2", "stranger"), strict=True)
    },
    **{
        LAB.join_answer(32 * d): ({who}, {"server"}) for d, who in zip("123", ("pi-1", "pi-2", "stranger"), strict=True)
    },
    LAB.broadcast(): ({"pi-1", "pi-2", "server"}, {"server"}),
    LAB.servers(): ({"server"}, {"server"}),
    Topics("other").up("pi-1"): (set(), set()),
    "elsewhere": (set(), set()),
}


def start_broker(site: Site, kind: str, stack: ExitStack) -> tuple[int, int]:
    """Ports for members and for joining, of the site's broker or of an embedded one."""
    if kind == "broker-config":
        return site.broker.port, site.broker.join_port
    tls = TlsFiles(*site.identity.listener_files("broker", ["127.0.0.1"]), "lab")
    program = Amqtt() if "amqtt" in kind else find_program()
    assert program is not None
    is_plain = "insecure" in kind
    broker = stack.enter_context(EmbeddedBroker(port=0, tls=None if is_plain else tls, candidates=[program]))
    return broker.port, broker.port + (not is_plain)


@pytest.mark.mosquitto
@pytest.mark.parametrize("kind", ["broker-config", "mosquitto", "amqtt"])
def test_every_broker_that_we_set_up_lets_the_same_clients_reach_the_same_topics(
    site: Site, pi_1: DeviceIdentity, pi_2: DeviceIdentity, kind: str
) -> None:
    filters = ["#", "+/+/+/+/+/+", "$SYS/#", "fedprune/1/lab/+/-/joined", *READERS_AND_WRITERS]
    with ExitStack() as stack:
        port, join_port = start_broker(site, kind, stack)
        clients = {
            "server": Client(site.identity.tls_context(), filters, "0" * 32),
            "pi-1": Client(pi_1.tls_context(), filters, "1" * 32),
            "pi-2": Client(pi_2.tls_context(), filters, "2" * 32),
            "stranger": Client(unpinned_context(), filters, "3" * 32, "fedprune-server"),
            "wildcard": Client(unpinned_context(), filters, "+"),
        }
        for name, client in clients.items():
            stack.callback(client.close)
            client.connect(join_port if name in ("stranger", "wildcard") else port)
        for name, client in clients.items():
            for topic in READERS_AND_WRITERS:
                client.publish(topic, name.encode())
        got = {(topic, publisher.decode(), reader) for reader, c in clients.items() for topic, publisher in c.all()}

    assert got == {
        (topic, writer, reader)
        for topic, (readers, writers) in READERS_AND_WRITERS.items()
        for writer in writers
        for reader in readers
    }


@pytest.mark.mosquitto
@pytest.mark.parametrize("kind", ["broker-config", "mosquitto", "amqtt", "insecure mosquitto", "insecure amqtt"])
def test_strangers_leave_no_messages_behind(site: Site, kind: str) -> None:
    """Retained messages under ever new topics, half of which they may publish to."""
    with ExitStack() as stack:
        members_port, port = start_broker(site, kind, stack)
        context = None if "insecure" in kind else unpinned_context()
        for nonce in (secrets.token_hex(16) for _ in range(5)):
            stranger = Client(context, [], nonce)
            stranger.connect(port)
            for topic in (LAB.join_request(nonce), f"x/{nonce}"):
                sent = stranger.paho.publish(topic, bytes(2**18), 1, retain=True)
                until(lambda: stranger.gone.is_set() or sent.is_published())  # noqa: B023 - waited for at once
            stranger.close()
        server = Client(context and site.identity.tls_context(), ["#", LAB.join_subscription()], "0" * 32)
        server.connect(members_port)
        left = server.all()
        server.close()
    assert left == []


@pytest.mark.mosquitto
def test_certificates_of_others_none_and_ones_that_are_over_are_refused(
    site: Site, pi_1: DeviceIdentity, tmp_path: Path
) -> None:
    ours = site.identity.authority
    ca, key_path = ours.crl_path.parent / "authority.pem", tmp_path / "tls.key"
    key = make_tls_key()
    save_tls_key(key, key_path)
    floor = lambda: BUILD_TIME  # noqa: E731

    def with_certificate(pem: str) -> ssl.SSLContext:
        path = tmp_path / "leaf.pem"
        path.write_text(pem)
        return pinned_context(ca, path, key_path, floor)

    foreign = Authority.make(tmp_path / "foreign", "lab").issue_device("lab", "pi-1", make_request(key, "pi-1"))
    past = Authority(ours.crl_path.parent, clock=lambda: float(BUILD_TIME))
    over = past.issue_device("lab", "pi-1", make_request(key, "pi-1"), days=1)
    broker = ours.issue_broker(["pi-1"], make_request(key, "x"))  # a certificate for brokers lets nobody in

    assert not site.refuses(pi_1.tls_context())
    assert site.refuses(with_certificate(foreign))
    assert site.refuses(with_certificate(over))
    assert site.refuses(with_certificate(broker))
    assert site.refuses(pinned_context(ca, None, None, floor))
    assert site.refuses(unpinned_context())


@pytest.mark.mosquitto
def test_debians_log_file_stays_empty_so_that_nothing_rotates_it(site: Site, pi_1: DeviceIdentity) -> None:
    with site.client(pi_1.tls_context(), "to-be-logged"):
        until(lambda: "to-be-logged" in (site.folder / "log").read_text())
    log = site.folder / "rotated.log"
    assert not log.exists() or not log.read_text()


@pytest.mark.mosquitto
def test_the_operators_command_brings_each_revocation_to_the_broker(site: Site) -> None:
    lost, member = site.device("stolen"), site.device("at-home")
    assert not site.refuses(lost.tls_context())
    reload = f'cp "$FEDPRUNE_CRL" {site.folder / "broker" / "crl.pem"} && kill -HUP {site.process.pid}'
    folder, crl = site.folder / "state", site.identity.authority.crl_path
    with list_delivery(shlex.join(["sh", "-c", reload]), folder, crl):
        site.identity.revoke("stolen")
        until(lambda: site.refuses(lost.tls_context()))
    assert not site.refuses(member.tls_context())


@pytest.mark.mosquitto
def test_a_stranger_leaves_no_will_behind(site: Site) -> None:
    nonce = secrets.token_hex(16)
    stranger = Client(unpinned_context(), [], nonce)
    stranger.paho.will_set(LAB.join_request(nonce), b"retained", 1, retain=True)
    with pytest.raises(ConnectionError, match="hung up"):
        stranger.connect(site.broker.join_port)
    stranger.close()


def test_emqx_has_the_same_rules_in_its_own_form() -> None:
    broker = BrokerAddress(("b",), 8883, 8884, Path("/etc/emqx"))
    config, text = (filled_template(name, "lab", broker) for name in ("emqx.conf", "acl.conf"))
    assert {"fail_if_no_peer_cert = true", "mqtt.peer_cert_as_username = cn"} <= {*map(str.strip, config.splitlines())}
    pattern = r'^\{allow, (?:all|\{username, "(.+)"\}), (publish|subscribe), \["(.+)"\]\}\.\n'
    rules = re.findall(pattern, text, re.MULTILINE)
    assert text.splitlines()[len(rules) + 1 :] == ["{deny, all}."]
    clients = {"server": ("fedprune-server", 32 * "0"), "pi-1": ("pi-1", 32 * "1"), "pi-2": ("pi-2", 32 * "2")}

    def users_of(action: str, topic: str) -> set[str]:
        return {
            client
            for client, (user, client_id) in clients.items()
            for name, permitted, filter_ in rules
            if name in ("", user) and permitted == action
            if paho.topic_matches_sub(filter_.replace("${username}", user).replace("${clientid}", client_id), topic)
        }

    for topic, (readers, writers) in READERS_AND_WRITERS.items():
        assert users_of("subscribe", topic) == readers - {"stranger"}
        assert users_of("publish", topic) == writers - {"stranger"}
    users = dict.fromkeys((*LAB.server_subscriptions(), LAB.join_subscription()), "server")
    users |= dict.fromkeys(LAB.device_subscriptions("pi-1")[:2], "pi-1") | {"#": "", "+/#": "", "fedprune/1/lab/#": ""}
    users |= dict.fromkeys((*Topics("other").server_subscriptions(), "fedprune/1/lab/+/-/joined"), "")
    assert {topic: "".join(users_of("subscribe", topic)) for topic in users} == users


@pytest.mark.parametrize("wrong", [{"folder": Path("/a b")}, {"bind": "x\nuser y"}])
def test_what_would_say_something_else_in_a_configuration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(IdentityError):
        BrokerAddress(**{"hosts": ("b",), "port": 8883, "join_port": 8884, "folder": Path("/a"), **wrong}).check()  # type: ignore[arg-type]
