"""`config check` and `config show`: what a server would use, and where each setting comes from."""

import json
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.cli.main import build_parser, main
from fedprune_server.cli.run import load_config
from fedprune_server.engine.state_folder import StateFolder
from support.fakes.opened_job import open_job
from support.processes.real_site import write_material

FILE = """\
[job]
name = "leaves"
rounds = 4

[job.recipe]
lr = 0.1

[server]
broker = "mqtts://ann:secret@broker"
keep = 5
state = "../etc/state"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc" / "fleet.toml"
    path.write_text(FILE)
    return path


def rows(out: str) -> dict[str, tuple[object, str]]:
    return {f"{r['table']}.{r['key']}": (r["value"], r["from"]) for r in json.loads(out)}


def test_each_setting_comes_from_the_highest_layer_that_has_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "broker").write_text("mqtts://bob:other@there\n")
    for name, value in {
        "SERVER_KEEP": "7",
        "JOB_ROUNDS": "8",
        "SERVER_BROKER_FILE": str(file.parent / "broker"),
    }.items():
        monkeypatch.setenv(f"FEDPRUNE_{name}", value)
    assert main(["config", "check", str(file), "--rounds", "9", "--json"]) == ExitCode.OK
    out = capsys.readouterr().out
    settings = rows(out)
    assert settings["job.name"] == ("leaves", str(file))
    assert settings["job.recipe.lr"] == (0.1, str(file))
    assert settings["server.keep"] == (7, "environment variable FEDPRUNE_SERVER_KEEP")
    assert settings["job.rounds"] == (9, "command line, --rounds")
    assert settings["server.broker"] == ("mqtts://bob:***@there", "environment variable FEDPRUNE_SERVER_BROKER_FILE")
    assert settings["server.state"] == (str(file.parent / "state"), str(file))
    assert settings["server.pulls"] == (4, "default")
    assert "secret" not in out
    assert "other" not in out


@pytest.mark.parametrize(
    ("schedule", "kind", "expected"),
    [
        ('{ kind = "async", window_s = 3 }', "sync", {"kind": "sync"}),
        ('{ kind = "semi-async", window_s = 3.0 }', "semi-async", {"kind": "semi-async", "window_s": 3.0}),
    ],
)
def test_another_kind_of_schedule_replaces_the_files_and_the_same_keeps_its_keys(
    file: Path, schedule: str, kind: str, expected: dict[str, object]
) -> None:
    file.write_text(f"[job]\nschedule = {schedule}\n")
    arguments = build_parser().parse_args(["run", "--config", str(file), "--schedule", kind])
    assert load_config(arguments, {}).config.job.schedule == expected


@pytest.mark.parametrize("command", [["config", "check"], ["run", "--config"]], ids=" ".join)
def test_a_total_that_a_server_does_not_count_is_refused_where_it_stands(
    command: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("[job]\nrounds = 4\ntotal_macs = 1_000_000\n")
    assert main([*command, str(file)]) == ExitCode.CONFIG
    message = " ".join(capsys.readouterr().err.split())
    assert f"{file}: job.total_macs: " in message
    assert "total_bytes" in message


def test_the_environment_may_name_the_file_and_a_folder_has_its_last_start(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDPRUNE_CONFIG", str(file))
    for arguments in ([], [str(file)]):
        assert main(["config", "show", "--json", *arguments]) == ExitCode.OK
        assert rows(capsys.readouterr().out)["server.keep"] == (5, str(file))
    monkeypatch.delenv("FEDPRUNE_CONFIG")
    write_material(file.parent, {})
    model = str(file.parent / "model.onnx")
    ran = load_config(build_parser().parse_args(["run", "--model", model, "--keep", "9", "--rounds", "3"]), {}).config
    with StateFolder(ran.state) as folder:
        open_job(folder, ran)
    monkeypatch.setenv("FEDPRUNE_JOB_ROUNDS", "6")
    assert main(["config", "show", "--json", "--workers", "2"]) == ExitCode.OK
    settings = rows(capsys.readouterr().out)
    assert settings["server.keep"] == (9, "the last start")
    assert settings["job.rounds"] == (6, "environment variable FEDPRUNE_JOB_ROUNDS")
    assert settings["server.workers"] == (2, "command line, --workers")


@pytest.mark.parametrize("url", ["mysql://ann:secret@db/x"])
def test_a_database_that_cant_be_one_is_named_without_its_password(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    monkeypatch.setenv("FEDPRUNE_SERVER_DATABASE", url)
    assert main(["config", "check", str(file)]) == ExitCode.CONFIG
    err = capsys.readouterr().err
    assert err.startswith("error: environment variable FEDPRUNE_SERVER_DATABASE: server.database: expected postgresql")
    assert "secret" not in err
