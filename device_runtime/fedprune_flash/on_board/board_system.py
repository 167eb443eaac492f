"""The board that a kit is installed on: its paths, its service and the service's user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from fedprune.core.errors import UsageError
from fedprune_device.launcher.slot_store import Owner
from fedprune_flash.on_board.kit_folder import SERVICE_NAME
from fedprune_flash.on_board.service_control import ServiceControl

SERVICE_USER = "fedprune"
RUNTIME_FOLDER, SETTINGS_FOLDER, STATE_FOLDER = "/opt/fedprune", "/etc/fedprune", "/var/lib/fedprune"
UNITS_FOLDER = "/etc/systemd/system"

# The unit that an image customised for cloud-init makes at every boot, until the kit is installed.
FIRST_BOOT_UNIT = "/run/systemd/system/fedprune-install.service"


class BoardSystem:
    """The board that a kit is installed on or removed from.

    A `root` other than / is a trial: no user is made, and systemctl is only called if it is in the root's usr/bin.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_other_root = root != Path("/")
        self.control = ServiceControl(root)
        self.unit = self.path_of(f"{UNITS_FOLDER}/{SERVICE_NAME}")
        self.link = self.path_of(f"{UNITS_FOLDER}/multi-user.target.wants/{SERVICE_NAME}")

    def path_of(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    @property
    def owner(self) -> Owner | None:
        """The service's user; None in trials and before it is made."""
        if self.is_other_root:
            return None
        try:
            entry = pwd.getpwnam(SERVICE_USER)
        except KeyError:
            return None
        return entry.pw_uid, entry.pw_gid

    def check_root(self) -> None:
        """Raise `UsageError` if this is neither root nor a trial."""
        if not self.is_other_root and os.geteuid() != 0:
            raise UsageError("only root may do this", hint="Run it with sudo.")
