"""Commands and code of docs/export.md run, and the sample plan of docs/planner.md is what its command prints."""

import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune_export.cli.main import COMMANDS, main
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import digits_model, load_digits
from support.paths import ROOT

PAGE, PLANNER = ((ROOT / "docs" / name).read_text() for name in ("export.md", "planner.md"))
COMMAND = "    fedprune-export "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that the page's commands read."""
    path = tmp_path_factory.mktemp("docs")
    (path / "digits.onnx").write_bytes(digits_model())
    x, y = load_digits()
    np.savez(path / "eval.npz", x=x[:50], y=y[:50])
    (path / "global.safetensors").write_bytes(tensorfile.encode(import_onnx(digits_model(), "digits").tensors))
    (path / "my-boards").mkdir()
    loss = PAGE[PAGE.index("    # my_losses.py") :].partition(COMMAND)[0]
    (path / "my_losses.py").write_text(textwrap.dedent(loss))
    (path / "my_nets.py").write_text(
        "from torch import nn\n\n\ndef unet():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))\n"
        "    net.input_shape = (3, 16, 16)\n    return net\n"
        "\n\ndef reader():\n    block = nn.Sequential()\n"
        "    for name in ('q', 'v', 'out'):\n        block.add_module(name, nn.Linear(24, 24))\n"
        "    net = nn.Sequential(block)\n    net.input_shape = (24,)\n    return net\n"
    )
    (path / "my-board.toml").write_text((ROOT / "hardware_profiles" / "raspberry-pi-5.toml").read_text())
    return path


def test_all_commands_of_the_page_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    commands = re.findall(rf"^{COMMAND}(.*)", PAGE, re.MULTILINE)
    for command in commands:
        assert main(shlex.split(command)) == ExitCode.OK, command
    assert {c.split()[0] for c in commands} >= {"digits.onnx", *COMMANDS}


def test_the_sample_is_what_the_command_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, sample = re.findall(r"(?:^    .*\n)+", PLANNER, re.MULTILINE)[:2]
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)[1:]) == ExitCode.OK
    lines = textwrap.dedent(sample).splitlines()
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines
