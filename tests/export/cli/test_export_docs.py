"""docs/export.md: its commands are commands, and its samples are what they print."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fedprune_export as fx
from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune_export.cli.main import COMMANDS, build_parser, main
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import digits_model, load_digits
from support.paths import ROOT

PAGE = (ROOT / "docs" / "export.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)]
COMMAND = "    fedprune-export "


def sample_after(command: str) -> list[str]:
    """The lines of the first block after a command that shows no commands."""
    at = next(i for i, block in enumerate(BLOCKS) if any(line.startswith(COMMAND + command) for line in block))
    return [line.strip() for line in next(b for b in BLOCKS[at + 1 :] if not b[0].startswith(COMMAND))]


def words(line: str) -> list[str]:
    """Columns of a table's row."""
    return re.split(r" {2,}|\t", line.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that the page's commands read."""
    path = tmp_path_factory.mktemp("docs")
    (path / "digits.onnx").write_bytes(digits_model())
    x, y = load_digits()
    np.savez(path / "eval.npz", x=x[:50], y=y[:50])
    tensors = import_onnx(digits_model(), "digits").tensors
    (path / "global.safetensors").write_bytes(tensorfile.encode(tensors))
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
    shipped = ROOT / "hardware_profiles" / "raspberry-pi-5.toml"
    (path / "my-board.toml").write_text(shipped.read_text())
    return path


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, list[str]]:
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


def test_all_commands_of_the_page_run(printed: dict[str, list[str]]) -> None:
    assert {c.split()[0] for c in printed} >= {"digits.onnx", *COMMANDS}


def test_the_sample_is_what_the_command_prints(printed: dict[str, list[str]]) -> None:
    command = next(c for c in printed if c.endswith("--out bundle"))
    # The last digits of the parity are the machine's own.
    said, found = (
        [line.strip() for line in text if "parity" not in line] for text in (sample_after(command), printed[command])
    )
    assert said == found


def test_the_table_of_boards_is_what_the_command_prints(printed: dict[str, list[str]]) -> None:
    command = next(c for c in printed if c.endswith("--out bundles"))
    said, found = ([words(line)[:-1] for line in text] for text in (sample_after(command), printed[command]))
    assert said == found


def test_the_groups_are_what_the_command_prints(printed: dict[str, list[str]]) -> None:
    assert sample_after("groups") == printed["groups digits.onnx"]


def test_verify_says_what_the_page_says(printed: dict[str, list[str]]) -> None:
    command = next(c for c in printed if c.startswith("verify"))
    # Losses and sizes of graphs are those of the day.
    said, found = (
        [re.sub(r"[0-9][0-9.,e-]*", "#", line) for line in text] for text in (sample_after(command), printed[command])
    )
    assert said == found


def test_the_profiler_times_the_operators_of_a_training_step(
    printed: dict[str, list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any(command.endswith("--out bundle") for command in printed)
    monkeypatch.chdir(folder)
    code = next(c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "enable_profiling" in c)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(code, {})  # noqa: S102
    events = json.loads((folder / text.getvalue().strip()).read_text())
    times = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    assert "Conv" in {e["args"]["op_name"] for e in times}
    assert all(e["dur"] >= 0 for e in times)


@pytest.mark.parametrize("function", [fx.load, fx.plan, fx.export])
def test_the_table_of_keywords_has_those_of_each_function(function: Callable[..., object]) -> None:
    (cell,) = re.findall(rf"^\| `fx\.{function.__name__}` \| (.*) \|$", PAGE, re.MULTILINE)
    named = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", cell))
    parameters = inspect.signature(function).parameters.values()
    assert named == [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def test_every_flag_that_the_page_names_is_one() -> None:
    text = build_parser().format_help()
    flags = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--into", "--others", "--model", "--weights", "--state"}
    assert len(flags) > 15
    for flag in flags:
        assert flag in text
