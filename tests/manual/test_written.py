"""What is made from the code is what lies in docs/, and says all that the code has."""

from __future__ import annotations

import argparse
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import Privacy
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.server_config import ServerConfig
from manual import command_pages, written
from support.paths import ROOT


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return written.files()


def test_docs_say_what_the_code_says() -> None:
    assert written.stale(ROOT) == [], "run `python -m manual`"


def test_a_changed_a_missing_and_a_left_over_file_are_stale(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "files", lambda: files)
    for folder in ("docs", "toolkit/fedprune_start"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    changed, missing, left = (tmp_path / written.SCHEMAS / name for name in ("want.json", "gone.json", "old.json"))
    changed.write_text(changed.read_text().replace("1024", "1025"))
    missing.unlink()
    left.write_text("{}\n")
    found = [f"{written.SCHEMAS}/{name}" for name in ("gone.json", "want.json", "old.json")]

    assert written.stale(tmp_path) == found
    assert written.write(tmp_path) == found
    assert written.stale(tmp_path) == []
    assert not left.exists()


def test_the_page_of_commands_has_every_command_and_every_option(files: dict[str, str]) -> None:
    from fedprune_device.cli import main as device
    from fedprune_export.cli import main as export
    from fedprune_flash.cli import main as flash
    from fedprune_server.cli import advise, simulate
    from fedprune_server.cli import main as server

    page = files["docs/reference/cli.md"]
    parsers = [module.build_parser() for module in (device, export, flash, server, simulate)]
    parsers += [export._command_parser(name) for name in export.COMMANDS]
    parsers += [simulate.build_compare_parser(), simulate.build_sweep_parser(), simulate.build_new_parser()]
    parsers.append(advise.build_advise_parser())
    options = 0
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                assert all(f"# {inner.prog}\n" in page for inner in action.choices.values())
            elif action.help != argparse.SUPPRESS and not {"--help", "--version"} & set(action.option_strings):
                options += len(action.option_strings)
                assert all(re.search(rf"`{name}[ `]", page) for name in action.option_strings), action
    assert options > 150


def test_the_page_of_commands_says_nothing_of_this_machine(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "somewhere-else")
    assert command_pages.page() == files["docs/reference/cli.md"]
    assert str(Path.home()) not in files["docs/reference/cli.md"].replace("/root/", "") or Path.home() == Path("/")
    assert str(ROOT) not in files["docs/reference/cli.md"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the fleet's site", "The fleet's site."),
        ("don't measure", "Don't measure."),
        ("default: 72", "Default: 72."),
        ("ray:auto or processes", "ray:auto or processes."),
        ("text (default), or json", "text (default), or json."),
        ("mqtts://host", "mqtts://host."),
    ],
)
def test_help_becomes_a_sentence_but_a_value_stays_as_it_is(text: str, said: str) -> None:
    assert command_pages._sentence(text) == said


def test_the_page_of_settings_has_every_key(files: dict[str, str]) -> None:
    page = files["docs/reference/settings.md"]
    tables = {
        "kind",
        "recipe",
        "options",
        "privacy",
        "schedule",
        "job",
        "model",
        "evaluation",
        "calibration",
        "input_shape",
        "alerts",
    }
    for cls in (Job, Privacy, Recipe, Schedule, ServerConfig, AlertSettings):
        for field in fields(cls):
            assert field.name in tables or f"| `{field.name}` |" in page or f"### `{field.name}`" in page, field.name


def test_pages_fetch_the_versions_that_are_tested() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    lines = [line for page in pages for line in page.read_text().splitlines() if "pip download " in line]
    assert lines
    assert all("-c constraints.txt" in line for line in lines)
