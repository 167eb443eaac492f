"""Addresses of the tier that are refused at a start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ConfigError, ExitCode
from fedprune.jobs.job import Job
from fedprune_server.aggregators.channel import ParentLostError
from fedprune_server.aggregators.parent import ParentLink
from fedprune_server.aggregators.place import configurations, parent_of, regions_of
from fedprune_server.config.server_config import ServerConfig

pytestmark = pytest.mark.soak


@pytest.mark.parametrize(
    ("aggregators", "parent", "own"),
    [
        ("127.0.0.1:8885", "localhost:8885", True),
        ("8885", "127.0.0.1:8885", True),
        ("0.0.0.0:8885", "127.0.0.1:8885", True),
        ("[::]:8885", "[::1]:8885", True),
        ("127.0.0.1:8885", "127.0.0.1:8886", False),
        ("off", "127.0.0.1:8885", False),
    ],
)
def test_a_server_is_not_its_own_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aggregators: str, parent: str, own: bool
) -> None:
    monkeypatch.setattr(ParentLink, "start", lambda link: link.jobs)
    config = ServerConfig(aggregators=aggregators, parent=f"ws://{parent}", region="north", state=tmp_path)
    if not own:
        with parent_of(config, None) as link:
            assert link.region == "north"
        return
    with (
        pytest.raises(ConfigError, match=r"server: parent: expected another server, got ws://"),
        parent_of(config, None),
    ):
        pass


def test_a_server_is_not_its_own_parent_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "fleet.example")
    config = ServerConfig(aggregators="0.0.0.0:8885", parent="wss://fleet.example:8885", region="north", state=tmp_path)
    with (
        pytest.raises(ConfigError, match="server: parent: expected another server"),
        parent_of(config, None),
    ):
        pass


def test_without_an_identity_aggregators_connect_from_this_machine_alone(tmp_path: Path) -> None:
    config = ServerConfig(aggregators="0.0.0.0:0", state=tmp_path)
    with (
        pytest.raises(ConfigError, match=r"server: aggregators without TLS and identity.*'0\.0\.0\.0'.*--insecure"),
        regions_of(config, None),
    ):
        pass


def test_a_parent_that_is_lost_before_its_models_are_here_is_one_that_does_not_answer(tmp_path: Path) -> None:
    config = ServerConfig(parent="ws://127.0.0.1:1", region="north", state=tmp_path)
    with ParentLink(config.parent, config.region, None, BlobStore(tmp_path / "landing")) as link:
        link.jobs = {"leaves": {"job": Job(name="leaves").to_dict(), "model": "a" * 64, "name": "net"}}
        with pytest.raises(ParentLostError) as caught:
            configurations(config, link)
    assert caught.value.exit_code == ExitCode.BROKER
