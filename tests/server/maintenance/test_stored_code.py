"""Code that only a state folder's database names: no command calls it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ConfigError, ExitCode
from fedprune_server.cli.main import main
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.further_jobs import further_configs
from fedprune_server.maintenance.finding import Severity
from fedprune_server.maintenance.state_check import check_state
from fedprune_server.storage.folder_layout import JOBS_FOLDER
from fedprune_server.storage.storage import Storage
from support.fakes.recorded_job import JOB, play_job

CODE = "planted:run"

SETTINGS = [
    pytest.param({"job": JOB.to_dict() | {"strategy": CODE}}, id="strategy"),
    pytest.param({"calibration": CODE}, id="calibration"),
    pytest.param({"evaluation": CODE}, id="evaluation"),
]


@pytest.fixture
def import_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there once the module in the current folder has been imported."""
    mark = tmp_path / "called"
    (tmp_path / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef run(*_):\n    raise ValueError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield mark
    sys.modules.pop("planted", None)


def plant(folder: Path, settings: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    play_job(folder)
    with Storage.open_existing(folder) as storage:
        stored_settings = storage.settings()
    assert stored_settings is not None
    with Storage(f"sqlite:///{folder / 'server.db'}") as storage:
        storage.put_settings(stored_settings | settings)


@pytest.mark.parametrize("settings", [*SETTINGS, pytest.param({"server": {"workers_url": "ray:auto"}}, id="workers")])
def test_a_start_refuses_code_that_only_the_database_names(
    settings: dict[str, Any], import_mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "state", settings)
    assert main(["run", "--insecure", "--state", str(tmp_path / "state")]) == ExitCode.CONFIG
    assert not import_mark.exists()
    assert "If this code is yours, add --" in " ".join(capsys.readouterr().err.split())


def test_a_start_calls_code_that_the_command_line_repeats(import_mark: Path, tmp_path: Path) -> None:
    plant(tmp_path / "state", {"job": JOB.to_dict() | {"strategy": CODE}})
    main(["run", "--insecure", "--state", str(tmp_path / "state"), "--strategy", CODE])
    assert import_mark.exists()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_further_job_s_folder_names_no_code(settings: dict[str, Any], import_mark: Path, tmp_path: Path) -> None:
    plant(tmp_path / "state" / JOBS_FOLDER / "second", settings)
    with pytest.raises(ConfigError):
        further_configs(ServerConfig(state=tmp_path / "state"), [])
    assert not import_mark.exists()


@pytest.mark.parametrize("settings", SETTINGS)
def test_check_export_and_backup_go_on_without_it(settings: dict[str, Any], import_mark: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    plant(state, settings)
    assert not [f for f in check_state(state, lambda _: None, running=False) if f.severity is Severity.WRONG]
    assert main(["export-model", "--state", str(state), "--out", str(tmp_path / "out.safetensors")]) == ExitCode.OK
    assert main(["backup", "--state", str(state), "--to", str(tmp_path / "backup")]) == ExitCode.OK
    assert main(["restore", "--from", str(tmp_path / "backup"), "--state", str(tmp_path / "copy")]) == ExitCode.OK
    assert not import_mark.exists()


def test_a_folder_for_a_hub_needs_the_job_s_own_strategy(import_mark: Path, tmp_path: Path) -> None:
    plant(tmp_path / "state", {"job": JOB.to_dict() | {"strategy": CODE}})
    command = ["export-model", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "hub")]
    assert main(command) == ExitCode.CONFIG
    assert not import_mark.exists()
    main([*command, "--allow", CODE])
    assert import_mark.exists()
