"""Server and boards with identities, as processes: what a hostile broker or a revoked board can do to a run."""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.security.keys import SigningKey
from fedprune.security.signed_envelope import HEADER_BYTES, seal
from fedprune.security.tls import unpinned_context
from fedprune.wire.link import BrokerLink
from fedprune.wire.messages import Finished, Offer, UpdateAnnouncement, parse_message
from fedprune.wire.topics import Topics
from fedprune_device.cli import main as device_cli
from fedprune_server.cli import main as server_cli
from fedprune_server.enrollment.pki import IdentityFolder
from support.processes.machine import listens
from support.processes.real_site import Site, job_config, write_material

pytestmark = pytest.mark.system

DEVICES = ("north", "south")
CONFIG = job_config("trust", rounds=5)
TOPICS = Topics("default")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"), dict.fromkeys((*DEVICES, "late"), 200))


@pytest.fixture
def site(request: pytest.FixtureRequest, material: Path, tmp_path: Path) -> Iterator[Site]:
    mosquitto = request.param == "mosquitto"
    with Site(material, tmp_path, CONFIG, DEVICES, 90, mosquitto=mosquitto, secure=True, may_hold=True) as made:
        yield made


def models(site: Site) -> list[str]:
    return [r["model"] for r in site.finish().history]


class Mallory:
    """Everything passes through it: it repeats, changes and redirects what it hears, and makes up its own.

    Args:
        url: The broker, which lets it do what it likes, as if it were the broker.
        key: A key that it has made for itself.
    """

    def __init__(self, url: str, key: SigningKey) -> None:
        self.did: Counter[str] = Counter()
        self._key = key
        self._random = random.Random(0)
        self._heard: list[tuple[str, bytes]] = []
        self._mine: set[tuple[str, bytes]] = set()
        self._stop = threading.Event()
        self._link = BrokerLink(url, "mallory", tls=unpinned_context)
        self._link.subscribe(["#"])
        self._link.start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._link.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            item = self._link.get(0.05)
            if not isinstance(item, tuple) or item in self._mine:
                continue
            self._heard.append(item)
            try:
                address = TOPICS.parse(item[0])
            except FedpruneError:
                continue  # somebody joins: what can be done to that is tested elsewhere
            if address.channel.endswith("blob"):
                self._say("spoilt", item[0], item[1][:-1] + b"?", at_most=20)
                continue
            self._say("repeated", *item, again=True)
            self._say("repeated", *self._random.choice(self._heard), again=True)
            at = self._random.randrange(len(item[1]))
            self._say("changed", item[0], item[1][:at] + bytes([item[1][at] ^ 1]) + item[1][at + 1 :])
            other = DEVICES[DEVICES.index(address.device) - 1] if address.device in DEVICES else DEVICES[0]
            self._say("redirected", item[0].replace(f"/{address.device}/", f"/{other}/"), item[1])
            self._forge(*item)

    def _forge(self, topic: str, raw: bytes) -> None:
        """A message that says what it likes: unsigned, and signed by a key of its own."""
        message = parse_message(raw[HEADER_BYTES:])  # what is in an envelope is no secret
        if isinstance(message, UpdateAnnouncement):
            message = replace(message, samples=10**6)
        elif isinstance(message, Offer):
            message = replace(message, recipe={**message.recipe, "lr": 0.0001})
        else:
            message = Finished("trust")
        self._say("forged", topic, message.to_bytes())
        self._say("forged", topic, seal(self._key, topic, 2**40, 0, message.to_bytes()))

    def _say(self, what: str, topic: str, raw: bytes, *, at_most: int = 10**6, again: bool = False) -> None:
        if self.did[what] < at_most:
            self.did[what] += 1
            self._mine.add((topic, raw))
            self._link.publish(topic, raw)


@pytest.mark.mosquitto
@pytest.mark.parametrize("site", ["mosquitto"], indirect=True)
def test_a_hostile_broker_can_delay_a_run_but_not_change_a_bit_of_it(
    site: Site, material: Path, tmp_path: Path
) -> None:
    (tmp_path / "calm").mkdir()
    with Site(material, tmp_path / "calm", CONFIG, DEVICES, 90) as calm:
        calm.start_all()
        expected = models(calm)
    broker_url = site.open_broker()
    site.start("broker")
    site.start("server")
    site.wait_for(lambda: listens(site.join_port), "the broker listens")
    mallory = Mallory(broker_url, SigningKey.make())

    def noticed() -> bool:
        return all("ignored a message" in (site.folder / f"{name}.log").read_text() for name in ("server", *DEVICES))

    try:
        site.hold(3)  # else the job may be over before it has done anything
        for name in DEVICES:
            site.start(name)
        everything = {"spoilt", "repeated", "changed", "redirected", "forged"}
        site.wait_for(lambda: set(mallory.did) == everything and noticed(), "it has done its worst")
        time.sleep(10)  # so that the server, which waits by what the last rounds took, waits for a starved board, too
        site.let_go(3)
        assert models(site) == expected
    finally:
        mallory.close()
    assert len(expected) == 5


@pytest.mark.parametrize(
    "site",
    [pytest.param("embedded", marks=pytest.mark.soak), pytest.param("mosquitto", marks=pytest.mark.mosquitto)],
    indirect=True,
)
def test_a_claim_lets_one_board_in_and_a_revoked_one_is_out_at_once(site: Site, tmp_path: Path) -> None:
    config = site.folder / "fleet.toml"
    config.write_text(config.read_text().replace("rounds = 5", "rounds = 100000").replace("devices = 2", "devices = 1"))
    site.start_all()
    site.wait_for(lambda: (state := site.saved_state()) is not None and state.round > 2, "rounds")

    used = site.command("north")
    used[used.index("--device") + 1], used[used.index("--state") + 1] = "late", str(tmp_path / "late")
    again = subprocess.run(used, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == ExitCode.JOIN, again.stderr
    assert "claim" in again.stderr

    revoke = [
        sys.executable,
        "-m",
        "fedprune_server.cli.main",
        "devices",
        "revoke",
        "north",
        "--state",
        str(site.state),
    ]
    subprocess.run(revoke, check=True, capture_output=True)

    site.wait_for(lambda: "device north was revoked" in (site.folder / "server.log").read_text(), "north is out")
    state = site.saved_state()
    assert state is not None
    out = state.round + 1  # the round that was under way may still wait for it
    site.wait_for(lambda: (state := site.saved_state()) is not None and state.round > out + 5, "rounds without north")
    state = site.saved_state()
    assert state is not None
    assert not state.devices["north"].online
    assert all(r["devices"].keys() == {"south"} for r in state.history if r["round"] > out)


@pytest.mark.parametrize("site", ["embedded"], indirect=True)
def test_without_an_identity_nothing_leaves_this_machine(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(main: Callable[[list[str]], int], *arguments: str) -> None:
        assert main(["run", "--insecure", *arguments]) == ExitCode.CONFIG, capsys.readouterr().err

    data = str(site.material / "north.npz")
    server = ("--config", str(site.folder / "fleet.toml"), "--state", str(tmp_path / "s"))
    for url in ("mqtt://192.0.2.1", "mqtts://192.0.2.1"):
        run(device_cli.main, "--broker", url, "--data", data, "--state", str(tmp_path / "d"))
        run(server_cli.main, *server, "--broker", url)
    for host in ("0.0.0.0", "192.0.2.1"):  # noqa: S104
        run(server_cli.main, *server, "--host", host)
    assert not (tmp_path / "d").exists()
    assert not (tmp_path / "s").exists()


# At every push `tests/server/messaging/test_authentication.py` has boards in memory join again.
@pytest.mark.soak
@pytest.mark.parametrize("site", ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)], indirect=True)
def test_a_fleet_joins_again_after_the_keys_of_its_server_were_replaced(site: Site) -> None:
    """As docs/runbook.md says for a server whose keys were stolen; the job goes on where it was."""
    config = site.folder / "fleet.toml"
    config.write_text(config.read_text().replace("rounds = 5", "rounds = 3"))
    site.hold(2)
    site.start_all()
    site.wait_until_held(2)
    for name in ("server", *DEVICES):
        site.processes[name].kill()
        site.processes[name].wait()
    site.let_go(2)

    def run(module: str, *words: str) -> str:
        command = [sys.executable, "-m", f"{module}.cli.main", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    state = ["--state", str(site.state)]
    run("fedprune_server", "identity", "replace", *state)
    if site.mosquitto:
        with IdentityFolder(site.state) as identity:
            site.write_broker(identity)
        site.kill("broker")
    site.start("server")
    site.wait_for(lambda: listens(site.port), "the broker listens")

    site.start("south")
    told = "its certificate is another server's"
    site.wait_for(lambda: told in (site.folder / "south.log").read_text(), "a board that has not joined stays away")
    site.processes["south"].kill()
    site.processes["south"].wait()

    for name in DEVICES:
        claim = site.folder / f"{name}.new-claim"
        run("fedprune_server", "claim", "--device", name, "--out", str(claim), *state)
        started = site.command(name)
        ways = [started[at : at + 2] for at in map(started.index, ("--broker", "--join", "--device", "--state"))]
        run("fedprune_device", "join", "--new-key", "--claim", str(claim), *(word for way in ways for word in way))
        site.start(name)
    history = site.finish_complete().history
    assert [(r["round"], r["devices"].keys()) for r in history] == [(n, set(DEVICES)) for n in (1, 2, 3)]
