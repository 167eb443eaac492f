"""Users' modules are found in the current folder, and nothing else of that folder takes an installed module's place."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.core.imports import import_user_module, module_code, program_code

pytestmark = pytest.mark.board


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_module_goes_before_an_installed_one_of_its_name_where_it_is_named(here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "ours_d.py").write_text("N = 1\n")
    (here / "ours_d.py").write_text("N = 2\n")
    sys.path.insert(0, str(here / "elsewhere"))
    assert import_user_module("ours_d").N == 2


def test_a_file_of_the_folder_takes_no_installed_modules_place(here: Path) -> None:
    (here / "mine.py").write_text("")
    (here / "netrc.py").write_text("raise RuntimeError('not me')\n")  # of the standard library, not imported yet
    program = "from fedprune.core import imports; imports.import_user_module('mine')"
    program += "; import netrc; print(netrc.__file__)"
    run = subprocess.run([sys.executable, "-c", program_code(program)], capture_output=True, text=True, check=True)
    assert str(here) not in run.stdout


def test_a_child_process_runs_a_module_and_takes_nothing_from_the_current_folder(here: Path) -> None:
    for name in ("runpy", "pkgutil", "calendar"):
        (here / f"{name}.py").write_text("raise RuntimeError('not me')\n")
    command = [sys.executable, "-c", module_code("calendar"), "2026", "11"]
    assert "November 2026" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_module_that_fails_is_tried_again(here: Path) -> None:
    (here / "ours_e.py").write_text("raise ValueError('no')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            import_user_module("ours_e")
    with pytest.raises(ModuleNotFoundError):
        import_user_module("ours_nowhere")
