"""The wheels of a kit on the processors of boards: what they compute there, and what is said where they can't run."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune_flash import BoardTarget
from fedprune_flash.kit import wheelhouse
from support.paths import TESTS
from support.processes.arm_board import Board, copy_userland
from support.processes.arm_step import main as train_here
from support.processes.arm_userland import BOOKWORM, userland

SITE, OLD = "/site", "/old"
OLDER = ("cortex-a53", "cortex-a72")
"""Of the Raspberry Pi Zero 2 W and 3, and 4: without the instructions for dot products that later ones have."""


def unpack(wheels: Path, place: Path) -> None:
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory, own_wheel: Path, broken_wheel: Path) -> Board:
    """A userland with a kit's wheels, and beside them the broken one."""
    folder = tmp_path_factory.mktemp("processors")
    board = copy_userland(userland(BOOKWORM), folder / "board")
    wheelhouse.fetch_wheels(own_wheel, BoardTarget(BOOKWORM.python), folder / "wheels")
    unpack(folder / "wheels", board.root / SITE[1:])
    unpack(broken_wheel.parent, board.root / OLD[1:])
    (board.root / "step.py").write_bytes((TESTS / "support/processes/arm_step.py").read_bytes())
    return board


def on(board: Board, processor: str, *site: str) -> Board:
    """The same board with another processor, and packages from these folders."""
    return replace(board, processor=processor, environment={"PYTHONPATH": ":".join(site)})


@pytest.mark.parametrize("processor", OLDER)
def test_a_training_step_gives_what_it_gives_here(processor: str, board: Board, tmp_path: Path) -> None:
    done = on(board, processor, SITE).run("/usr/bin/python3", "/step.py", "/step.npz")
    assert done.returncode == 0, done.stderr
    train_here(tmp_path / "here.npz")
    with np.load(tmp_path / "here.npz") as here, np.load(board.root / "step.npz") as there:
        assert set(here.files) == set(there.files)
        for name in here.files:
            np.testing.assert_allclose(there[name], here[name], rtol=1e-4, atol=1e-6, err_msg=name)
    (board.root / "step.npz").unlink()


@pytest.mark.parametrize("processor", OLDER)
def test_a_wheel_that_the_processor_can_t_run_is_said_so(processor: str, board: Board) -> None:
    done = on(board, processor, OLD, SITE).run("/usr/bin/python3", "-m", "fedprune_device.cli.main", "probe")
    assert done.returncode == ExitCode.RUNTIME, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "onnxruntime kills the process that loads it (signal 4)" in message
    assert "instructions that this processor lacks" in message
    assert "Traceback" not in done.stderr


def test_the_same_wheel_runs_where_the_processor_can(board: Board, broken_wheel: Path) -> None:
    """So what was said above is the processor's doing, not that of the wheel or of this emulation."""
    program = "from fedprune_device.hardware.runtime_process import check_runtime; print(check_runtime())"
    done = on(board, "cortex-a76", OLD, SITE).run("/usr/bin/python3", "-c", program)
    assert (done.returncode, done.stdout.strip()) == (0, broken_wheel.name.split("-")[1]), done.stderr
