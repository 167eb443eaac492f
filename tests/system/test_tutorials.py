"""The commands of tutorials and examples do what the pages say, one after the other."""

import shutil
import subprocess
from pathlib import Path

import pytest

from support.paths import ROOT
from support.processes.machine import find_mosquitto, free_port
from support.processes.page_runner import Reader

pytestmark = [pytest.mark.soak, pytest.mark.system]

TUTORIALS = ROOT / "docs" / "tutorials"


def reader(folder: Path, patience_s: float, *, bare: bool = False) -> Reader:
    """A reader whose ports nobody else has; in a folder that is a clone, or a part of one."""
    folder.mkdir(exist_ok=True)
    if not bare:
        for part in ("examples", "hardware_profiles"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return Reader(folder, {port: str(free_port()) for port in ("8883", "8884", "1883")}, patience_s, bare=bare)


def test_from_clone_to_a_fleet(tmp_path: Path) -> None:
    find_mosquitto()
    with reader(tmp_path / "clone", 60) as new:
        new.follow(TUTORIALS / "fleet.md")
        assert new.left_out == 2
        assert (new.folder / "global.onnx").is_file()


@pytest.mark.soak
@pytest.mark.torch
def test_your_own_model(tmp_path: Path) -> None:
    with reader(tmp_path / "clone", 120) as new:
        new.follow(TUTORIALS / "model.md")
        assert new.left_out == 1
        assert (new.folder / "bundle" / "report.html").is_file()


@pytest.mark.soak
def test_try_a_strategy(tmp_path: Path) -> None:
    with reader(tmp_path / "clone", 120) as new:
        new.follow(TUTORIALS / "strategy.md")
        assert new.left_out == 0
        assert (new.folder / "sims" / "both" / "comparison.html").is_file()


@pytest.mark.soak
def test_from_a_bare_clone_to_a_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that the page installs: needs a package index."""
    find_mosquitto()
    monkeypatch.setenv("REPOSITORY", str(ROOT))
    head = revision(ROOT)
    with reader(tmp_path / "home", 600, bare=True) as new:
        new.follow(TUTORIALS / "fleet.md")
    clone = tmp_path / "home" / "fedprune"
    assert (clone / "global.onnx").is_file()
    assert revision(clone) == head


def revision(clone: Path) -> bytes:
    return subprocess.check_output(["git", "-C", str(clone), "rev-parse", "HEAD"])
