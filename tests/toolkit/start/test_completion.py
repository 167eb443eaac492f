"""The scripts by which shells complete commands: made from the parsers, and read by a real bash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedprune_start

PROGRAMS = ("fedprune", "fedprune-export", "fedprune-simulate", "fedprune-server", "fedprune-device", "fedprune-flash")

ASK = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
complete -p "$1" | sed 's/.* -F \\([^ ]*\\) .*/\\1/' >"$NAMED"
"$(<"$NAMED")"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script for each shell, by the shell's name."""
    pytest.importorskip("shtab", reason="the extra completion is not installed")
    folder = tmp_path_factory.mktemp("completion")
    code = "import sys, fedprune_start; sys.exit(fedprune_start.main(['completion', sys.argv[1]]))"
    for shell in ("bash", "zsh"):
        done = subprocess.run([sys.executable, "-c", code, shell], capture_output=True, text=True, check=True)
        (folder / shell).write_text(done.stdout)
    return folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fedprune ser", {"server"}),
        ("fedprune completion z", {"zsh"}),
        ("fedprune server rollout st", {"start", "status", "stop"}),
        ("fedprune-server rollout st", {"start", "status", "stop"}),
        ("fedprune-server operators add ann --role a", {"admin"}),
        ("fedprune-device pr", {"predict", "probe"}),
        ("fedprune-flash kit --fin", {"--find-links"}),
        ("fedprune-simulate sw", {"sweep"}),
        ("fedprune-simulate sweep --wor", {"--workers"}),
        ("fedprune-export to-", {"to-onnx", "to-torch"}),
        ("fedprune-export profiles sh", {"show"}),
        ("fedprune-export --tar", {"--target"}),
        ("fedprune-server run --config net.on", {"net.onnx"}),
    ],
)
def test_bash_completes_every_program(line: str, words: set[str], scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    answer = subprocess.run(
        ["bash", "-c", ASK, "bash", str(scripts / "bash"), *line.split(" ")],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "NAMED": str(tmp_path / "function")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(answer.stdout.split()) == words


def test_the_script_for_zsh_registers_every_program(scripts: Path) -> None:
    text = (scripts / "zsh").read_text()
    for program in PROGRAMS:
        assert f"-N {program}\n" in text
    if (zsh := shutil.which("zsh")) is not None:
        subprocess.run([zsh, "-n", str(scripts / "zsh")], check=True)


def test_without_shtab_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert fedprune_start.main(["completion", "bash"]) == 3
    assert "completion" in capsys.readouterr().err
