"""The service under which a board runs the agent: its systemd unit, and the environment that it is started with."""

from __future__ import annotations

from fedprune_device.releases.unit import ServiceUnit
from fedprune_flash.kit.board_settings import BoardSettings
from fedprune_flash.kit.target import Target
from fedprune_flash.on_board.installation import HOME, SETTINGS, STATE, USER
from fedprune_flash.on_board.kit_folder import AUTHORITY, ENVIRONMENT


def unit(board: BoardSettings, target: Target) -> str:
    """The systemd unit: the strict one for a processor, or that of a Jetson, whose agent may use the GPU."""
    command = ["run", "--patient", "--state", STATE, "--data", board.data]
    if board.authority:
        command += ["--ca", f"{SETTINGS}/{AUTHORITY}"]
    return ServiceUnit(
        jetson=target.jetson,
        arguments=tuple(command),
        root=HOME,
        user=USER,
        environment=f"{SETTINGS}/{ENVIRONMENT}",
        # Without samples the agent would end and be started again and again.
        needs=board.data if board.data.startswith("/") else "",
    ).text()


def environment(board: BoardSettings) -> str:
    """What the unit's environment says: as whom, and by which broker."""
    rows = {"BROKER": board.server, "JOIN": board.join, "SITE": board.site, "DEVICE": board.device}
    return "".join(f"FEDPRUNE_{name}={value}\n" for name, value in rows.items() if value)
