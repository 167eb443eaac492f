"""The installer on a processor that a kit's wheels are not for."""

import shutil
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.security.keys import SigningKey
from fedprune_flash import BoardSettings, BoardTarget, build_kit
from fedprune_flash.kit.kit import INSTALLER_FILE
from support.fakes.tiny_wheels import fleet_of_wheels, wheel
from support.processes.arm_board import copy_userland
from support.processes.arm_installation import STICK
from support.processes.arm_userland import BOOKWORM, userland


@pytest.mark.parametrize(("processor", "code"), [("cortex-a53", ExitCode.RUNTIME), ("cortex-a72", ExitCode.RUNTIME)])
def test_a_kit_that_the_processor_can_t_run_is_refused(
    processor: str, code: ExitCode, broken_wheel: Path, tmp_path: Path
) -> None:
    """All wheels are tiny but one, which is real, and known to crash there."""
    wheels = tmp_path / "wheels"
    own_wheel = fleet_of_wheels(wheels)
    (tiny,) = wheels.glob("onnxruntime-*.whl")
    tiny.unlink()
    shutil.copyfile(broken_wheel, wheels / broken_wheel.name)
    for name in ("coloredlogs", "flatbuffers", "packaging", "protobuf", "sympy"):
        wheel(wheels, name)
    settings = BoardSettings("mqtts://broker.example:8883", "attic", "lab")
    kit = build_kit(
        tmp_path / "kit",
        settings,
        BoardTarget(BOOKWORM.python),
        wheel=own_wheel,
        links=[wheels],
        signer=SigningKey.make(),
    )
    board = copy_userland(userland(BOOKWORM), tmp_path / "board", processor=processor)
    shutil.copytree(kit.folder, board.root / STICK[1:])
    done = board.run("/usr/bin/python3", f"{STICK}/{INSTALLER_FILE}", "--no-start", offline=True)
    assert (done.returncode, done.stderr) == (
        code,
        "error: onnxruntime uses instructions that this processor lacks. Take another version of it.\n",
    )
    assert not (board.root / "etc/systemd/system/fedprune.service").exists()
