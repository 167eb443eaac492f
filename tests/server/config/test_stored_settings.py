"""What a server's state folder remembers of the settings it ran with."""

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune_server.cli.main import build_parser
from fedprune_server.cli.run import load_config
from fedprune_server.config.network_settings import without_password
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.storage import Storage


@pytest.fixture
def ran(tmp_path: Path) -> ServerConfig:
    """A configuration in which every setting of the server differs from its default."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "ca.pem").write_text("")
    return ServerConfig(
        job=Job(name="leaves", rounds=5),
        site="field",
        broker="mqtts://me:geheim@broker",
        ca=tmp_path / "ca.pem",
        host="0.0.0.0",  # noqa: S104 - nothing listens
        port=1999,
        state=tmp_path / "state",
        keep=7,
        pulls=2,
        profiles=tmp_path / "profiles",
        max_devices=9,
        max_packet=70_000,
    )


def keep(config: ServerConfig) -> Path:
    config.state.mkdir()
    with Storage.open_in(config.state) as storage:
        storage.put_settings({"job": config.job.to_dict(), "name": "n", "server": config.server_settings()})
    return config.state


def again(state: Path, *options: str) -> ServerConfig:
    """The configuration of another start."""
    return load_config(build_parser().parse_args(["run", "--state", str(state), *options]), {}).config


def test_the_state_folder_alone_is_enough(ran: ServerConfig) -> None:
    assert again(keep(ran)) == ran


def test_paths_hold_in_another_folder(ran: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = keep(replace(ran, profiles=Path("profiles"), ca=Path("ca.pem")))
    monkeypatch.chdir("/")
    assert again(state) == ran


def test_the_command_line_wins(ran: ServerConfig) -> None:
    config = again(keep(ran), "--port", "1234")
    assert (config.port, config.site) == (1234, "field")


def test_another_broker_leaves_the_old_ones_authority_behind(ran: ServerConfig) -> None:
    config = again(keep(ran), "--broker", "embedded")
    assert (config.ca, config.keep) == (None, 7)


def test_a_folder_of_profiles_that_has_gone_is_named_and_can_be_replaced(ran: ServerConfig, tmp_path: Path) -> None:
    state = keep(ran)
    (tmp_path / "profiles").rmdir()
    with pytest.raises(ConfigError, match="profiles"):
        again(state)
    assert again(state, "--profiles", str(tmp_path)).profiles == tmp_path


def test_only_the_owner_reads_the_database(tmp_path: Path) -> None:
    with Storage.open_in(tmp_path):
        assert stat.S_IMODE((tmp_path / DATABASE_FILE).stat().st_mode) == 0o600
    (tmp_path / DATABASE_FILE).chmod(0o644)
    with Storage.open_in(tmp_path):
        assert stat.S_IMODE((tmp_path / DATABASE_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("url", ["mqtt://me:ge@heim@host:1", "mqtt://host:1"])
def test_a_password_is_not_shown(url: str) -> None:
    assert without_password(url) == "mqtt://host:1"
