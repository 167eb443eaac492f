"""The kit's runtime in a slot: installed like a release, and tested before the launcher may start it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from fedprune.core.errors import StorageFullError
from fedprune_device.launcher.slot_store import KEY_FILE, Owner, SlotRecord, SlotStore, digest_and_size, write_file
from fedprune_device.launcher.state import SLOTS, STABLE, DamagedError, LauncherState
from fedprune_device.releases.wheel import Wheel, check_distinct, install_wheels
from fedprune_flash.on_board.board_files import give_to_owner
from fedprune_flash.on_board.kit_folder import LAUNCHER_FILE, KitFolder
from fedprune_flash.on_board.module_probe import gpu_failure, load_module

ENTRY_POINT = "fedprune_start:device"
# The release number of every kit. Those of a server are higher, so that a kit never replaces one.
KIT_RELEASE_NUMBER = 0

SPARE_BYTES = 64 * 2**20  # bytes that stay free

_FOLDERS = ("state", "incoming", *SLOTS)


class RuntimeSlot:
    """The runtime of a kit, and the folder that it is installed in.

    The folder is laid out once launcher and empty slots are there, and filled once a slot has this runtime or a newer.
    `owner` is the service's user, as whom the kit's modules are tested; None for the installing user. `key` signed the
    kit, and the launcher is to trust it; None for an unsigned kit. `folders` belong to the service's user, whose
    updates write there; the launcher stays root's.
    """

    def __init__(
        self, kit: KitFolder, root: Path, python: str, owner: Owner | None = None, key: bytes | None = None
    ) -> None:
        self._kit, self._python, self._owner = kit, python, owner
        self._key = key
        self.slot_store = SlotStore(root)
        self.folders = [root / name for name in _FOLDERS]

    @property
    def is_laid_out(self) -> bool:
        """Whether the folders and this kit's launcher are there."""
        with suppress(OSError):
            launcher = (self.slot_store.root / LAUNCHER_FILE).read_bytes()
            return launcher == self._kit.read(LAUNCHER_FILE) and all(f.is_dir() for f in self.folders)
        return False

    def lay_out(self) -> None:
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        write_file(self.slot_store.root / LAUNCHER_FILE, self._kit.read(LAUNCHER_FILE))

    @property
    def is_filled(self) -> bool:
        """Whether this kit's runtime starts already, or a release of the server's, which is newer than any kit."""
        state = self._state()
        if state is None:
            return False
        try:
            record = self.slot_store.checked_record(state.stable, key=self._key)
            is_key_current = self.slot_store.key() == self._key
        except DamagedError:
            return False
        # While a release of the server is staged or on trial, the slot that it would replace stays.
        is_runtime_current = record.version > KIT_RELEASE_NUMBER or record.name == self._kit.runtime
        return is_key_current and (is_runtime_current or state.phase != STABLE)

    @property
    def has_newer_release(self) -> bool:
        """Whether a release of the server's is installed, so that the kit's runtime is left out."""
        state = self._state()
        with suppress(DamagedError):
            record = None if state is None else self.slot_store.checked_record(state.stable, key=self._key)
            return record is not None and record.version > KIT_RELEASE_NUMBER
        return False

    def check(self) -> None:
        """Make sure that the wheels can be unpacked and fit; raises `ReleaseError` or `StorageFullError`."""
        wheels = self._wheels()
        check_distinct(wheels)
        needed = SPARE_BYTES + sum(wheel.size for wheel in wheels)
        existing = self.slot_store.root
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        free += sum(p.lstat().st_blocks * 512 for p in (self.slot_store.root / self._free_slot()).rglob("*"))
        if not self.is_filled and free < needed:
            raise StorageFullError(
                f"no room in {existing}", expected=f"{needed >> 20} MB", got=f"{free >> 20} MB", hint="Free some space."
            )

    def fill(self) -> None:
        """Install the wheels in the free slot, test them, and let the launcher start that slot.

        The server's key is written once the slot is whole, so that a board always has a slot that its key has signed.
        Raises `ReleaseError` if a wheel is damaged, `RuntimeUnavailableError` if the runtime doesn't load here.
        """
        store = self.slot_store
        # The service's user may write here: root must follow none of its links.
        for path in store.folder.iterdir():
            if path.is_symlink() or path.name.endswith(".new"):
                path.unlink()
        with store.lock_service(), store.lock_slot(slot := self._free_slot()):
            state = self._state()
            store.drop_record(slot)
            # The service's user must not write there meanwhile: checked files could be replaced.
            give_to_owner([store.root / slot], (os.geteuid(), os.getegid()))
            install_wheels(store, slot, self._wheels(), lambda files: self._tested_record(slot, files), self._key)
            if self._key is not None:
                write_file(store.root / KEY_FILE, self._key.hex().encode())
            with store.lock_state():
                store.save(LauncherState(slot, highest=0 if state is None else state.highest))

    def _wheels(self) -> list[Wheel]:
        return [Wheel(path, path.name) for path in self._kit.wheels]

    def _tested_record(self, slot: str, files: dict[str, tuple[str, int]]) -> SlotRecord:
        """The record of the unpacked files, after their modules were loaded as the service's user."""
        kit = self._kit
        give_to_owner([self.slot_store.root / slot], self._owner)
        hint = "On a Jetson it is to come with JetPack; a kit brings none." if kit.jetson else "Make another kit."
        for module, min_version in kit.manifest["imports"].items():
            load_module(self.slot_store.root / slot, module, min_version, self._python, self._owner, hint)
        if kit.jetson and (reason := gpu_failure(self.slot_store.root / slot, self._python, self._owner)):
            # No error: the board takes part with its processor, and finds its GPU once the cause is mended.
            print(f"note: this Jetson's GPU isn't used: {reason}", flush=True)
        # With the wheels recorded, the first release over the air transfers only those that have changed.
        wheels = {digest_and_size(path)[0]: tuple(sorted(Wheel(path, path.name).paths)) for path in kit.wheels}
        proof = kit.signed_text, kit.signature
        return SlotRecord(KIT_RELEASE_NUMBER, kit.runtime, ENTRY_POINT, files, None, *proof, wheels)

    def _state(self) -> LauncherState | None:
        """The launcher's state; if both copies are lost, the state that the launcher would recover from the slots."""
        state = self.slot_store.load()
        if state is None:
            with suppress(DamagedError):
                state = self.slot_store.recovered_state()
        return state

    def _free_slot(self) -> str:
        """The slot that the launcher wouldn't start."""
        state = self._state()
        if state is None:
            return SLOTS[0]
        prefers_other = self._is_startable(state.stable) or not self._is_startable(state.other_slot)
        return state.other_slot if prefers_other else state.stable

    def _is_startable(self, slot: str) -> bool:
        with suppress(DamagedError):
            self.slot_store.checked_record(slot)
            return True
        return False
