"""Commands that are interrupted while they are imported."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fedprune_start
from fedprune.core.errors import ExitCode
from fedprune.core.toml_file import parse_toml
from support.paths import ROOT

SLOW_PACKAGES = ("cryptography", "fedprune.strategies", "onnx", "onnxruntime", "sqlalchemy", "torch", "uvicorn")
ENTRIES = [fedprune_start.device, fedprune_start.server, fedprune_start.simulate, fedprune_start.export]


@pytest.mark.parametrize("entry", [*ENTRIES, fedprune_start.flash])
def test_an_interruption_while_a_command_is_imported_is_no_traceback(
    entry: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt_import(_module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fedprune_start.importlib, "import_module", interrupt_import)
    assert entry() == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_what_a_command_needs_comes_with_its_extra() -> None:
    project = parse_toml((ROOT / "pyproject.toml").read_text())["project"]
    sources = packages_distributions()
    for name, command in fedprune_start._COMMANDS.items():
        extra = {Requirement(text).name.lower() for text in project["optional-dependencies"][command.extra]}
        assert {source.lower() for package in command.packages for source in sources[package]} <= extra, name


def test_a_wrong_subcommand_is_one_line_that_says_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedprune_start.main(["exprot"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "error: there is no command 'exprot' (export?). See `fedprune --help`.\n"
    assert fedprune_start.main([]) == ExitCode.USAGE


@pytest.mark.parametrize(
    ("words", "slow_packages"),
    [
        (("--help",), ("numpy", "rich", "onnx", "argparse")),
        (("server", "status", "--help"), ("numpy", "sqlalchemy")),
        (("server", "run", "--help"), (*SLOW_PACKAGES, "fedprune_device")),
        (("completion", "bash"), (*SLOW_PACKAGES, "packaging")),
    ],
)
def test_its_help_imports_nothing_that_takes_long(words: tuple[str, ...], slow_packages: tuple[str, ...]) -> None:
    folder = Path(fedprune_start.__file__).parent.parent
    code = (
        f"import atexit, sys; sys.path.insert(0, {str(folder)!r})\n"
        f"atexit.register(lambda: print([name for name in {slow_packages} if name in sys.modules]))\n"
        f"import fedprune_start; fedprune_start.main({list(words)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
