"""A server, its broker and its boards as processes: updates go up over HTTPS or into a bucket, and over MQTT where that
fails."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.jobs.state import Progress
from support.fakes.fleet import models
from support.faults.relay import Relay
from support.processes.machine import free_port
from support.processes.real_site import Site, job_config, write_material
from support.processes.s3 import Ceph

pytestmark = pytest.mark.system

DEVICES = ("north", "south")
RECIPE = {"epochs": 1, "max_steps": 3}
CONFIG = job_config("uploaded", rounds=2, strategy="fedavg", density=1.0, recipe=RECIPE) + "[server]\n"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"), dict.fromkeys(DEVICES, 100), hidden=16384)


@pytest.fixture(scope="module")
def over_mqtt(material: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with Site(material, tmp_path_factory.mktemp("mqtt"), CONFIG, DEVICES, 120) as site:
        site.start_all()
        return models(site.finish_complete())


def taken_in(site: Site) -> int:
    """Updates that came over HTTPS, by the logs of the servers that ended by themselves."""
    return sum(map(int, re.findall(r"took in (\d+) updates", (site.folder / "server.log").read_text())))


def failed_uploads(site: Site) -> list[str]:
    logs = "".join((site.folder / f"{name}.log").read_text() for name in DEVICES)
    return [line for line in logs.splitlines() if "can't be uploaded" in line]


# At every push the next test compares the same models over a kill.
@pytest.mark.soak
def test_updates_come_over_https_to_the_same_models(material: Path, tmp_path: Path, over_mqtt: list[str]) -> None:
    settings = f'serve_blobs = "127.0.0.1:{free_port()}"\nuploads = "https"\n'
    with Site(material, tmp_path, CONFIG + settings, DEVICES, 120, secure=True) as site:
        site.start_all()
        assert models(site.finish_complete()) == over_mqtt
        assert taken_in(site) == 4
        assert failed_uploads(site) == []


@pytest.mark.soak
def test_a_server_that_is_killed_in_the_middle_of_an_upload_counts_it_once(
    material: Path, tmp_path: Path, over_mqtt: list[str]
) -> None:
    port = free_port()
    relay = Relay(port)
    settings = f'serve_blobs = "127.0.0.1:{port}"\nblob_url = "https://127.0.0.1:{relay.port}"\nuploads = "https"\n'
    try:
        with Site(material, tmp_path, CONFIG + settings, DEVICES, 120, secure=True, may_hold=True) as site:
            site.hold(1)
            site.start_all()
            site.wait_until_held(1)
            relay.most = relay.passed_bytes + 300_000
            site.let_go(1)
            partial = site.state / "blobs" / "tmp"
            # What the relay passed on may still be in a socket's buffer: the server's file is what says that it reads.
            site.wait_for(lambda: any(partial.iterdir()), "an upload is under way")
            site.kill("server")
            relay.most = None
            assert models(site.finish_complete()) == over_mqtt
            assert not any(partial.iterdir())
            assert taken_in(site) >= 3
            assert 1 <= len(failed_uploads(site)) <= 2
    finally:
        relay.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ceph]:
    made = Ceph()
    for name, value in made.secure_environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@pytest.mark.soak  # a Ceph cluster
def test_updates_go_into_the_bucket_to_the_same_models_over_a_kill(
    material: Path, tmp_path: Path, over_mqtt: list[str], s3: Ceph
) -> None:
    settings = (
        f'blobs = "s3://{s3.bucket()}/fleet"\nuploads = "s3"\n'
        f'serve_blobs = "127.0.0.1:{free_port()}"\n'  # downloads come from the server itself
    )
    with Site(material, tmp_path, CONFIG + settings, DEVICES, 120, secure=True, may_hold=True) as site:
        site.hold(1)
        site.start_all()
        site.wait_until_held(1)
        s3.hold()
        site.let_go(1)

        def awaited() -> bool:
            state = site.saved_state()
            return state is not None and [t.progress for t in state.tasks.values()] == [Progress.PULLING] * 2

        site.wait_for(awaited, "both updates are announced")
        time.sleep(0.5)
        site.kill("server")
        s3.resume()
        assert models(site.finish_complete()) == over_mqtt
        logs = "".join((site.folder / f"{name}.log").read_text() for name in DEVICES)
        assert logs.count(f"bytes of the update were uploaded to {s3.secure_endpoint}") == 4
        assert taken_in(site) == 0
        assert "bytes came from https://127.0.0.1" in site.logs_in_full()
        assert failed_uploads(site) == []
        assert "X-Amz" not in site.logs_in_full()
