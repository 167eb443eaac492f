"""docs/export.md: its commands and its code run."""

import contextlib
import io
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

PAGE = (ROOT / "docs" / "export.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)]
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


@pytest.fixture(scope="module")
def command_outputs(folder: Path) -> dict[str, list[str]]:
    """What every command of the page prints, run in the page's order in one folder."""
    out: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for line in (line for block in BLOCKS for line in block if line.startswith(COMMAND)):
            command = line.removeprefix(COMMAND)
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                code = main(shlex.split(command))
            assert code == ExitCode.OK, command
            out[command] = text.getvalue().splitlines()
    return out


def test_all_commands_of_the_page_run(command_outputs: dict[str, list[str]]) -> None:
    assert {c.split()[0] for c in command_outputs} >= {"digits.onnx", *COMMANDS}
