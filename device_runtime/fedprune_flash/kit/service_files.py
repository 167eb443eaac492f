"""The files of a board's service: its systemd unit and its environment."""

from __future__ import annotations

from fedprune_device.releases.unit import ServiceUnit
from fedprune_flash.kit.board_settings import BoardSettings
from fedprune_flash.kit.target import Target
from fedprune_flash.on_board.installation import HOME, SETTINGS, STATE, USER
from fedprune_flash.on_board.kit_folder import AUTHORITY, ENVIRONMENT


def unit(board: BoardSettings, target: Target) -> str:
    """The systemd unit: the strict one, or that of a Jetson, whose agent may use the GPU."""
    command = ["run", "--patient", "--state", STATE, "--data", board.data]
    if board.authority:
        command += ["--ca", f"{SETTINGS}/{AUTHORITY}"]
    return ServiceUnit(
        jetson=target.jetson,
        arguments=tuple(command),
        root=HOME,
        user=USER,
        environment=f"{SETTINGS}/{ENVIRONMENT}",
        # Without samples the agent would be restarted again and again.
        needs=board.data if board.data.startswith("/") else "",
    ).text()


def environment(board: BoardSettings) -> str:
    rows = {"BROKER": board.server, "JOIN": board.join, "SITE": board.site, "DEVICE": board.device}
    return "".join(f"FEDPRUNE_{name}={value}\n" for name, value in rows.items() if value)
