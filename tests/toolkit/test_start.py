"""Commands that are interrupted while they are imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fedprune_start
from fedprune.errors import ExitCode

ENTRIES = [fedprune_start.device, fedprune_start.server, fedprune_start.simulate, fedprune_start.export]


@pytest.mark.parametrize("entry", [*ENTRIES, fedprune_start.flash])
def test_an_interruption_while_a_command_is_imported_is_no_traceback(
    entry: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fedprune_start.importlib, "import_module", interrupted)
    assert entry() == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_command_says_its_version(
    entry: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedprune", "--version"])
    with pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("fedprune ")


def test_the_beginning_imports_nothing_that_takes_long() -> None:
    folder = Path(fedprune_start.__file__).parent.parent
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import fedprune_start; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
