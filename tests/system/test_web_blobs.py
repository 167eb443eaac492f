"""A server, its broker and its boards as processes: models come over HTTPS, and over MQTT when the web server dies."""

import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.security.certificates import make_request, make_tls_key, save_tls_key
from fedprune.security.tls import unpinned_context
from fedprune.wire.link import BrokerLink
from fedprune_server.enrollment.pki import IdentityFolder
from support.fakes.web_server import Behaviour, Handler, WebPlace
from support.processes.machine import free_port, listens
from support.processes.real_site import Site, job_config

pytestmark = pytest.mark.system

DEVICES = ("north", "south")
CONFIG = job_config("web", rounds=2) + "[server]\n"


class Ear:
    """Counts the bytes of chunks to boards that pass a broker which lets everybody listen."""

    def __init__(self, url: str) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._link = BrokerLink(url, "ear", tls=unpinned_context)
        self._link.subscribe(["fedprune/1/+/+/+/down/#"])
        self._link.start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            item = self._link.get(0.05)
            if isinstance(item, tuple) and not item[0].endswith("/down"):
                self.bytes += len(item[1])

    def close(self) -> int:
        self._stop.set()
        self._thread.join()
        self._link.close()
        return self.bytes


@contextmanager
def site(material: Path, folder: Path, settings: str) -> Iterator[Site]:
    folder.mkdir()
    with Site(material, folder, f"{CONFIG}{settings}\n", DEVICES, 60, mosquitto=True, secure=True) as made:
        yield made


def ran(made: Site) -> tuple[list[str], int, int]:
    """Models of the rounds, bytes that boards got from the web, and bytes of chunks that they got over MQTT."""
    ear_url = made.open_broker()
    made.start_all()
    made.wait_for(lambda: listens(int(ear_url.rpartition(":")[2])), "the broker listens on its open port, too")
    ear = Ear(ear_url)
    try:
        models = [r["model"] for r in made.finish().history]
    finally:
        chunks = ear.close()
    logs = "".join((made.folder / f"{name}.log").read_text() for name in DEVICES)
    return models, sum(map(int, re.findall(r"(\d+) bytes came from", logs))), chunks


def own(material: Path, folder: Path) -> list[str]:
    """Models of a site whose server gives out blobs itself; all of them come from there."""
    with site(material, folder, f'serve_blobs = "127.0.0.1:{free_port()}"') as made:
        models, from_web, over_mqtt = ran(made)
        said = re.search(r"the web server gave out (\d+) bytes", (made.folder / "server.log").read_text())
        assert said is not None
        assert over_mqtt == 0
        assert 10_000 < from_web <= int(said[1]) < 1.1 * from_web + 10_000
    return models


def test_models_come_over_https_from_the_server_itself(material: Path, tmp_path: Path) -> None:
    assert len(own(material, tmp_path / "own")) == 2


@pytest.mark.soak
def test_mqtt_takes_over_when_the_web_server_dies(material: Path, tmp_path: Path) -> None:
    models = own(material, tmp_path / "own")
    with site(material, tmp_path / "other", 'blob_url = "https://127.0.0.1:1"') as made:
        with IdentityFolder(made.state) as identity:  # the web server has a certificate of the fleet's authority
            key = make_tls_key()
            save_tls_key(key, made.folder / "web.key")
            certificate = identity.authority.issue_broker(["127.0.0.1"], make_request(key, "web"))
            (made.folder / "web.pem").write_text(certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.folder / "web.pem", made.folder / "web.key")
        with WebPlace(BlobStore(made.state / "blobs"), context) as web:
            config = made.folder / "fleet.toml"
            config.write_text(config.read_text().replace("https://127.0.0.1:1", web.url))
            web.behave = dies_after(web, 3)
            again, from_web, over_mqtt = ran(made)
        assert again == models
        assert 0 < from_web <= web.sent
        assert over_mqtt > 0
        logs = "".join((made.folder / f"{name}.log").read_text() for name in DEVICES)
        assert "what is lacking comes over MQTT" in logs


def dies_after(web: WebPlace, answers: int) -> Behaviour:
    left = threading.Semaphore(answers)

    def behave(handler: Handler, data: bytes) -> bool:
        if left.acquire(blocking=False):
            return False
        web.answers = 0
        handler.give(data, until=len(data) // 2)
        return True

    return behave
