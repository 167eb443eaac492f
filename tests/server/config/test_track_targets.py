"""The setting `track`."""

from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.tables import parse_config
from fedprune_server.config.track_targets import TrackTarget, track_targets
from fedprune_server.simulation.fleet.fleet_tables import read_fleet_tables


def test_each_tracker_may_have_a_destination() -> None:
    targets = track_targets("tensorboard, mlflow:http://here:5000/path,wandb:us/ours", "track")

    assert targets == (
        TrackTarget("tensorboard"),
        TrackTarget("mlflow", "http://here:5000/path"),
        TrackTarget("wandb", "us/ours"),
    )
    assert [str(target) for target in targets] == ["tensorboard", "mlflow:http://here:5000/path", "wandb:us/ours"]
    assert track_targets("off", "track") == ()


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("neptune", "neptune"),
        ("tensorboard,", "''"),
        ("mlflow:", "mlflow:"),
        ("mlflow:http://ann:secret@here:5000", "here:5000"),
    ],
)
def test_a_wrong_tracker_is_refused_by_its_name(text: str, got: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.track: expected") as caught:
        ServerConfig(track=text)

    assert got in str(caught.value)
    assert "secret" not in str(caught.value)


def test_folders_of_event_files_count_from_the_configuration(tmp_path: Path) -> None:
    config = parse_config({"server": {"track": "tensorboard:events,mlflow"}}, tmp_path)

    assert config.tracker_targets == (TrackTarget("tensorboard", str(tmp_path / "events")), TrackTarget("mlflow"))
    assert ServerConfig(track="tensorboard:events").server_settings()["track"] == f"tensorboard:{Path.cwd() / 'events'}"


def test_a_folder_with_a_comma_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "runs, old"
    tables = {"server": {"track": f"mlflow,tensorboard:{tmp_path}/events"}}
    assert len(parse_config(tables, folder).tracker_targets) == 2
    tables["server"]["track"] = "mlflow,tensorboard:events"
    expected = "track: a tracker's folder: expected a path without commas, got"
    with pytest.raises(ConfigError, match=rf"^server\.{expected}"):
        parse_config(tables, folder)
    folder.mkdir()
    file = folder / "fleet.toml"
    file.write_text('[simulation]\ntrack = "mlflow,tensorboard:events"\n')
    with pytest.raises(ConfigError, match=rf"fleet\.toml: simulation\.{expected}"):
        read_fleet_tables(file)
