"""The installation of a kit on a board: every step is skipped whose result is there already."""

from __future__ import annotations

import os
import platform
import re
import sys

from fedprune.core.errors import BoardSetupError, KitError, UsageError
from fedprune.wire.topics import check_device
from fedprune_device.launcher.slot_store import sync_slot_folder, write_file
from fedprune_flash.on_board.board_files import are_owned_by, give_to_owner, has_content
from fedprune_flash.on_board.board_system import (
    RUNTIME_FOLDER,
    SERVICE_USER,
    SETTINGS_FOLDER,
    STATE_FOLDER,
    UNITS_FOLDER,
    BoardSystem,
)
from fedprune_flash.on_board.kit_folder import AUTHORITY_FILE, CLAIM_FILE, ENVIRONMENT_FILE, SERVICE_NAME, KitFolder
from fedprune_flash.on_board.runtime_slot import RuntimeSlot
from fedprune_flash.on_board.service_control import run_command_line

TEGRA_RELEASE_PATH = "/etc/nv_tegra_release"
SERVICE_PYTHON = "/usr/bin/python3"  # the Python of the service

_JOINED_FILE = f"{STATE_FOLDER}/identity/tls.key"  # the last file of an identity that a board writes as it joins
_DEVICE_LINE = re.compile(r"^FEDPRUNE_DEVICE=(.*)$", re.MULTILINE)  # the board's name in its environment
_PYTHON_VERSION_PROGRAM = "import sys; print('%d.%d' % sys.version_info[:2])"


class Installation:
    """A kit and the board that it is installed on.

    `key` is the trusted key, or None for a kit that is not signed. `claim` is one that was given apart from the kit.
    `device` is a name for the board, or None to keep the kit's name for it.
    """

    def __init__(
        self,
        kit: KitFolder,
        system: BoardSystem,
        *,
        start: bool,
        key: bytes | None = None,
        claim: bytes | None = None,
        device: str | None = None,
    ) -> None:
        self.kit, self.system, self.key, self.claim, self.device = kit, system, key, claim, device
        self.start = start and system.control.is_available
        self._has_changed = False
        self._has_stopped_service = False
        self._state = system.path_of(STATE_FOLDER)

    @property
    def runtime(self) -> RuntimeSlot:
        python = sys.executable if self.system.is_other_root else SERVICE_PYTHON
        return RuntimeSlot(self.kit, self.system.path_of(RUNTIME_FOLDER), python, self.system.owner, self.key)

    def check(self) -> None:
        if self.kit.has_claim and self.claim is not None:
            raise UsageError("this kit has a claim of its own", hint="Leave --claim out.")
        self._check_name()
        actual = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if not self.system.is_other_root:
            actual = run_command_line([SERVICE_PYTHON, "-c", _PYTHON_VERSION_PROGRAM]).strip()
        required = self.kit.manifest.get("python")
        if required != actual:
            raise KitError(
                f"this kit is for Python {required}, this board has {actual}", hint=f"Make one with --python {actual}."
            )
        required, actual = self.kit.manifest.get("architecture"), platform.machine()
        if required != actual or sys.maxsize < 2**32:
            bits = "" if sys.maxsize > 2**32 else " with a 32-bit Python"
            raise KitError(f"this kit is for {required}, this board is {actual}{bits}", hint="Make another kit.")
        if self.kit.jetson != self.system.path_of(TEGRA_RELEASE_PATH).exists():
            kinds = ("a Jetson", "no Jetson") if self.kit.jetson else ("a board that is no Jetson", "one")
            raise KitError(
                f"this kit is for {kinds[0]}, this board is {kinds[1]}",
                hint="On a Jetson JetPack's own packages must not be hidden: `fedprune-flash kit --jetson`.",
            )
        self.runtime.check()

    def _check_name(self) -> None:
        """Raise `BoardSetupError` if the board has another name: its address may be that of another board."""
        if self.device is None:
            return
        check_device(self.device, "--device", error=UsageError)
        environment = self.system.path_of(SETTINGS_FOLDER) / ENVIRONMENT_FILE
        text = environment.read_text(encoding="utf-8", errors="replace") if environment.exists() else ""
        name = _DEVICE_LINE.search(text)
        if name is not None and name[1] != self.device:
            raise BoardSetupError(
                "this board is installed under another name", expected=self.device, got=name[1],
                hint="Is its address right? To give it another name, undo its installation first: --remove --purge.",
            )  # fmt: skip

    def install(self) -> None:
        """Do all steps that aren't done yet, in an order in which a power cut leaves nothing half trusted."""
        system, runtime = self.system, self.runtime
        if runtime.has_newer_release:
            print("already: a release from the server is installed; it is newer than the kit's and stays", flush=True)
        if not system.is_other_root and system.owner is None:
            self._report_step("make the system user fedprune")
            options = ("--system", "--no-create-home", "--home-dir", STATE_FOLDER, "--shell", "/usr/sbin/nologin")
            run_command_line(["useradd", *options, SERVICE_USER])
            runtime = self.runtime  # whose files are that user's
        if not runtime.is_laid_out:
            self._report_step(f"lay out {RUNTIME_FOLDER}: launcher.pyz, slots a and b")
            runtime.lay_out()
        if not runtime.is_filled:
            key = ", write the key" if self.key else ""
            self._report_step(f"unpack the kit's {len(self.kit.wheels)} wheels into a slot{key}")
            self._stop_service()
            runtime.fill()
        # A state folder on another disk may be a link, which is root's.
        service_paths = [*runtime.folders, self._state.resolve()]
        if not self._state.is_dir() or not are_owned_by(service_paths, system.owner):
            self._report_step(f"give slots and {STATE_FOLDER} to {SERVICE_USER}")
            self._stop_service()
            self._state.mkdir(parents=True, exist_ok=True)
            give_to_owner(service_paths, system.owner)
        for name in (ENVIRONMENT_FILE, AUTHORITY_FILE):
            path = system.path_of(SETTINGS_FOLDER) / name
            if name in self.kit.file_names and not has_content(path, self._settings_file(name), 0o644):
                self._report_step(f"write {SETTINGS_FOLDER}/{name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, self._settings_file(name))
        # The kit's claim, or a given one if the board has not joined.
        has_joined = os.path.lexists(system.path_of(_JOINED_FILE))
        if self.kit.has_claim or self.kit.has_spent_claim or (self.claim is not None and not has_joined):
            self._report_step(
                f"hand the claim over to {STATE_FOLDER}/claim{', and delete it here' if self.claim is None else ''}"
            )
            claim = self.kit.read(CLAIM_FILE) if self.kit.has_claim else self.claim
            if claim is not None:
                write_file(self._state / "claim", claim, 0o400, system.owner)
            self.kit.overwrite_claim()
        if not has_content(system.unit, self.kit.read(SERVICE_NAME), 0o644) or not system.link.is_symlink():
            self._report_step(f"write and enable {SERVICE_NAME}")
            # The unit's folder is a parent of this one.
            system.link.parent.mkdir(parents=True, exist_ok=True)
            write_file(system.unit, self.kit.read(SERVICE_NAME))
            system.link.unlink(missing_ok=True)
            system.link.symlink_to(f"{UNITS_FOLDER}/{SERVICE_NAME}")
            sync_slot_folder(system.link.parent)
            if self.start:
                system.control.call_systemctl("daemon-reload")
        if self.start and (self._has_changed or not system.control.is_up):
            self._report_step(f"start {SERVICE_NAME}")
            self.system.control.call_systemctl("reset-failed", SERVICE_NAME, must=False)
            # At a first boot the network that the service waits for comes later than this.
            self.system.control.call_systemctl("restart", "--no-block", SERVICE_NAME)

    def _report_step(self, what: str) -> None:
        print(f"now: {what}", flush=True)
        self._has_changed = True

    def restart_service(self) -> None:
        """After a failure: start the service again if it was stopped here, with the slot that is whole."""
        if self._has_stopped_service:
            self.system.control.call_systemctl("start", "--no-block", SERVICE_NAME, must=False)

    def _stop_service(self) -> None:
        """Stop the service, which may write where root is about to write."""
        if self.system.control.may_run:
            self._has_stopped_service = True
            self.system.control.call_systemctl("stop", SERVICE_NAME)

    def _settings_file(self, name: str) -> bytes:
        """The content of a file of settings: the kit's, with the board's name in place of the kit's."""
        content = self.kit.read(name)
        if name == ENVIRONMENT_FILE and self.device is not None:
            content = _DEVICE_LINE.sub(f"FEDPRUNE_DEVICE={self.device}", content.decode()).encode()
        return content
