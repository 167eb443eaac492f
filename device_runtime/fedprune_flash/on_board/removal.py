"""Removes an installation from a board, without a kit."""

from __future__ import annotations

import os
from pathlib import Path

from fedprune_device.launcher.slot_store import sync_slot_folder
from fedprune_flash.on_board.board_files import delete_folder
from fedprune_flash.on_board.board_system import (
    FIRST_BOOT_UNIT,
    RUNTIME_FOLDER,
    SERVICE_USER,
    SETTINGS_FOLDER,
    STATE_FOLDER,
    UNITS_FOLDER,
    BoardSystem,
)
from fedprune_flash.on_board.kit_folder import SERVICE_NAME
from fedprune_flash.on_board.service_control import run_command_line


def remove_installation(system: BoardSystem, *, purge: bool) -> None:
    """Undo an installation; `purge` deletes the board's state, its identity and the user, too."""
    if system.unit.exists() or system.link.is_symlink():
        print(f"now: stop and remove {SERVICE_NAME}", flush=True)
        _remove_service(system)
    for path in (SETTINGS_FOLDER, RUNTIME_FOLDER, *([STATE_FOLDER] if purge else [])):
        if os.path.lexists(system.path_of(path)):
            print(f"now: delete {path}", flush=True)
            delete_folder(system.path_of(path))
    if purge and system.owner is not None:
        print(f"now: remove the user {SERVICE_USER}", flush=True)
        run_command_line(["userdel", SERVICE_USER])
    if not purge:
        print(f"What was learnt stays in {STATE_FOLDER}, and so do the board's identity, its user and its samples.")


def _remove_service(system: BoardSystem) -> None:
    if system.control.may_run:
        system.control.call_systemctl("stop", SERVICE_NAME)
    # Otherwise the boot partition's unit would install the kit again at the next boot.
    if system.path_of(FIRST_BOOT_UNIT).exists():
        mask = system.path_of(f"{UNITS_FOLDER}/{Path(FIRST_BOOT_UNIT).name}")
        mask.unlink(missing_ok=True)
        mask.symlink_to("/dev/null")
    for path in (system.link, system.unit):
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_slot_folder(path.parent)
    system.control.call_systemctl("daemon-reload", must=False)
