"""The installer of releases: unpacks one into the slot that doesn't run, and marks it for its trial.

The running slot is never touched. The other slot counts as empty until its record is written last. Wheels are unpacked
from where they are: a folder, or the store of downloaded files, which survive until the release is staged. The files of
a wheel that the running slot has, too, are copied from there, so that only what has changed is downloaded.
"""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess  # nosec B404  # lists of words, never a shell
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import file_lock, read_file, storage_errors
from fedprune.core.errors import ReleaseError, StorageError, StorageFullError
from fedprune.releases.release import FILES, MANIFEST, MAX_FILE_BYTES, SIGNATURE, Release, ReleaseFile, verified_release
from fedprune.security.keys import VerifyingKey
from fedprune.wire.fleet_messages import MAX_MANIFEST_BYTES
from fedprune_device.launcher.launcher import VERSION
from fedprune_device.launcher.slot_store import SlotRecord, SlotStore, digest_and_size, files_digest
from fedprune_device.launcher.state import MAX_ATTEMPT_S, STABLE, STAGED, TRIAL, DamagedError, LauncherState
from fedprune_device.releases.wheel import InstalledWheel, Wheel, WheelFiles, check_distinct, install_wheels, modules_of

_PYTHON_TIMEOUT_S = 120.0  # for a question to the board's Python, which may take a minute from a slow card


@dataclass(frozen=True)
class ReleaseSource:
    """A release's files. `manifest` is as it was signed; `path` gives the path of a file by its sha256."""

    manifest: bytes
    signature: bytes
    path: Callable[[str], Path]

    @classmethod
    def of_folder(cls, folder: Path) -> ReleaseSource:
        """A folder on a stick or a share, as `fedprune.releases.release.write_release` makes it."""
        return cls(_read(folder / MANIFEST), _read(folder / SIGNATURE), lambda sha256: folder / FILES / sha256)


def _read(path: Path) -> bytes:
    with storage_errors(f"can't read {path}"):
        return read_file(path, MAX_MANIFEST_BYTES)


_LOG = logging.getLogger("fedprune.device")

LAUNCHER_FILE = "launcher.pyz"
MAX_STAGED_STARTS = 10  # starts of the service after which a staged release is dropped if it isn't armed
TRIAL_ATTEMPTS, ATTEMPT_S = 3, 600.0  # attempts of a trial, and seconds of each attempt

# Packages of JetPack, built for its GPU and for each other; a wheel must not hide them.
JETPACK_PACKAGES = ("cv2", "numpy", "onnxruntime", "tensorrt", "torch")

_FREE_MARGIN_BYTES = 32 * 2**20  # bytes that stay free beside the release


class ReleaseInstaller:
    """Installs releases. Methods raise `StorageError` if the disk fails, and `StorageFullError` if there is no room.

    The server's `key` must have signed them. `keep` are packages of the board's own Python that no release may hide.
    `running_slot` is the service's, where this process is the service.
    """

    def __init__(self, root: Path, key: VerifyingKey, *, keep: Collection[str] = (), running_slot: str = "") -> None:
        self.home = SlotStore(root)
        self.running_slot = running_slot
        self._incoming = root / "incoming"
        self._key = key
        self._keep = frozenset(keep)
        self._damaged = set[str]()

    @property
    def downloads(self) -> BlobStore:
        """The files of the next release that have arrived over the network."""
        return BlobStore(self._incoming, max_size=MAX_FILE_BYTES)

    def examine(self, source: ReleaseSource) -> Release:
        """Check by its manifest whether this board would install a release; nothing is changed. Raises `ReleaseError`.

        Only `stage` checks the board's own packages, because that takes long.
        """
        release, state = verified_release(source.manifest, source.signature, self._key), self._load_state()
        self._check_launcher()
        check_release(release, state.highest)
        with storage_errors(f"can't read {self.home.root}"):
            names = {f.sha256 for f in release.files}
            present_bytes = sum(p.stat().st_size for p in self._incoming.rglob("*") if p.name in names and p.is_file())
        present_bytes += sum(f.size for f in self.installed_files(release))
        self._check_room(release, state.other_slot, max(release.size - present_bytes, 0))
        return release

    def installed_files(self, release: Release) -> list[ReleaseFile]:
        """Wheels of a release that are in the running slot, from where `stage` copies their files."""
        wheels = self._installed_wheels(self._load_state().stable)
        return [f for f in release.files if f.sha256 in wheels]

    def distrust(self, sha256: str) -> None:
        """From now on download this wheel, because the running slot has a damaged file of it."""
        self._damaged.add(sha256)

    def _installed_wheels(self, slot: str) -> dict[str, dict[str, tuple[str, int]]]:
        """sha256 and size by path of the files of each wheel in a slot, by the wheel's sha256."""
        try:
            record = self.home.record(slot)
            wheels = {sha256: {path: record.files[path] for path in paths} for sha256, paths in record.wheels.items()}
        except (DamagedError, KeyError):
            return {}
        return {sha256: files for sha256, files in wheels.items() if sha256 not in self._damaged}

    def drop(self, number: int, reason: str) -> None:
        """Give up a staged release of this number; one on trial is left alone."""
        with storage_errors(f"can't write {self.home.root}"), self.home.lock_state():
            state = self._load_state()
            if state.phase == STAGED and state.highest == number:
                self.home.save(state.roll_back(reason))

    def stage(self, source: ReleaseSource) -> Release:
        """Install a release in the slot that doesn't run, where it waits until `arm`; called again, it goes on.

        Raises `ReleaseError` if it is refused, `StorageError` if a trial is under way.
        """
        with self._lock_updates(), storage_errors(f"can't write {self.home.root}"):
            state = self._load_state()
            if state.phase != STABLE:
                release = verified_release(source.manifest, source.signature, self._key)
                if release.number == state.highest:
                    return release
                if state.phase == TRIAL:
                    raise StorageError(f"release {state.highest} is on trial", hint="Wait until it is over.")
                state = self._change_state(lambda s: replace(s, phase=STABLE, left=0))
            release = self._install(source, state)
            self._change_state(lambda s: s.stage(release.number, MAX_STAGED_STARTS))
        _LOG.info("release %d (%s) is staged in slot %s", release.number, release.version, state.other_slot)
        return release

    def arm(self, attempts: int = TRIAL_ATTEMPTS, seconds: float = ATTEMPT_S) -> None:
        """Try the staged release at the service's next start, in `attempts` of `seconds` each until healthy."""
        if not 1 <= attempts <= 100 or not 1 <= seconds <= MAX_ATTEMPT_S:
            raise StorageError("a trial", expected=f"1 to 100 attempts of 1 to {MAX_ATTEMPT_S:g} s each")
        with storage_errors(f"can't write {self.home.root}"), self.home.lock_state():
            state = self._load_state()
            if state.phase == STABLE:
                raise StorageError("no release is staged", hint="Stage one first.")
            if state.phase == STAGED:
                self.home.save(state.arm(attempts, seconds))

    def _lock_updates(self) -> AbstractContextManager[None]:
        lock = self.home.folder / "update.lock"
        if not self.home.folder.is_dir():
            raise StorageError(f"{self.home.root} has no runtime", hint="A kit of `fedprune-flash` sets a board up.")
        return file_lock(lock, f"another process updates {self.home.root}", "Wait until it is done.")

    def _load_state(self) -> LauncherState:
        state = self.home.load()
        if state is None:
            raise StorageError(
                f"{self.home.root} has no state that is whole",
                hint="Restart the service: its launcher mends it. A kit of `fedprune-flash` sets a new board up.",
            )
        return state

    def _change_state(self, change: Callable[[LauncherState], LauncherState]) -> LauncherState:
        with self.home.lock_state():
            state = change(self._load_state())
            self.home.save(state)
            return state

    def _check_launcher(self) -> None:
        """Make sure that the launcher would start what the server's key has signed."""
        try:
            launcher_key = self.home.key()
        except DamagedError as error:
            raise ReleaseError(str(error), hint="Write the server's key there, as root.") from error
        if launcher_key is not None and self._key.raw != launcher_key:
            raise ReleaseError(
                "the launcher starts only what another key has signed",
                expected=f"key {VerifyingKey(launcher_key).fingerprint}",
                got=f"key {self._key.fingerprint}",
                hint="Where the server has a new key, install the runtime again (docs/update-the-fleet.md).",
            )

    def _install(self, source: ReleaseSource, state: LauncherState) -> Release:
        release, slot = verified_release(source.manifest, source.signature, self._key), state.other_slot
        self._check_launcher()
        check_release(release, state.highest)
        check_packages_on_board(release)
        _LOG.info(
            "release %d (%s): %d files, %d bytes", release.number, release.version, len(release.files), release.size
        )
        self._check_room(release, slot)
        installed = self._installed_wheels(state.stable)
        wheels = [
            InstalledWheel(self.home.root / state.stable, file.name, installed[file.sha256], file.sha256)
            if file.sha256 in installed and not source.path(file.sha256).exists()
            else self._checked_wheel(source, file)
            for file in release.files
        ]
        self._check_wheels(release, wheels)
        paths = {file.sha256: tuple(sorted(w.paths)) for file, w in zip(release.files, wheels, strict=True)}

        def make_record(files: dict[str, tuple[str, int]]) -> SlotRecord:
            if files_digest(files) != release.contents:
                raise ReleaseError(
                    "the unpacked files are not those of the release's manifest", hint="Have the release made again."
                )
            manifest_and_signature = source.manifest.decode(), source.signature.hex()
            return SlotRecord(
                release.number, release.version, release.entry, files, release.system, *manifest_and_signature, paths
            )

        with self.home.lock_slot(slot):
            if self._load_state().stable == slot:  # the other one was found damaged meanwhile
                raise StorageError(f"slot {slot} serves now", hint="Restart the service, and try it again.")
            install_wheels(self.home, slot, wheels, make_record)
        return release

    def _check_room(self, release: Release, slot: str, download_bytes: int = 0) -> None:
        """Raise `StorageFullError` if download and unpacked release don't fit, in place of what the slot has."""
        with storage_errors(f"can't read {self.home.root}"):
            replaced_bytes = sum(p.lstat().st_size for p in (self.home.root / slot).rglob("*"))
            free_bytes = shutil.disk_usage(self.home.root).free + replaced_bytes
        needed_bytes = download_bytes + release.unpacked + _FREE_MARGIN_BYTES
        if needed_bytes > free_bytes:
            raise StorageFullError(
                f"no room for release {release.number}",
                expected=f"{needed_bytes / 1e6:.0f} MB",
                got=f"{free_bytes / 1e6:.0f} MB",
                hint="Free some space; what runs is untouched.",
            )

    def _checked_wheel(self, source: ReleaseSource, file: ReleaseFile) -> Wheel:
        path = source.path(file.sha256)
        if digest_and_size(path) != (file.sha256, file.size):
            raise ReleaseError(f"{file.name} is not what the release says it is", hint="Copy or download it again.")
        return Wheel(path, file.name)

    def _check_wheels(self, release: Release, wheels: Sequence[WheelFiles]) -> None:
        size = sum(w.size for w in wheels)
        if size > release.unpacked:
            raise ReleaseError("a release's files unpacked", expected=f"at most {release.unpacked} bytes", got=size)
        board_packages = {*release.system} | packages_on_board(self._keep)
        check_distinct(wheels)
        for wheel in wheels:
            hidden = sorted(modules_of(wheel) & board_packages)
            if hidden:
                raise ReleaseError(
                    f"{wheel.name} would hide the board's own {', '.join(hidden)}",
                    hint="Leave it out of the release and name it in `system`.",
                )


def check_release(release: Release, highest: int) -> None:
    """Make sure that a release is for this board and above the `highest` staged number; otherwise `ReleaseError`."""
    required = {"python": f"cp{sys.version_info.major}{sys.version_info.minor}", "machine": platform.machine()}
    for name, value in required.items():
        if getattr(release, name) != value:
            raise ReleaseError(f"release {release.number}: {name}", expected=value, got=getattr(release, name))
    if release.number <= highest:
        raise ReleaseError(
            f"release {release.number}",
            expected=f"a number above {highest}",
            hint="To go back, release the earlier one again under a new number.",
        )
    if release.launcher > VERSION:
        raise ReleaseError(
            f"release {release.number}: launcher",
            expected=f"at most {VERSION}",
            got=release.launcher,
            hint="Set this board up again.",
        )


def check_packages_on_board(release: Release) -> None:
    """Make sure that the board's own Python has what a release takes from it; this may take minutes."""
    lacking = sorted(set(release.system) - packages_on_board(release.system))
    if lacking:
        raise ReleaseError(
            f"release {release.number} needs {', '.join(lacking)} of the board's own Python, which lacks it",
            hint="Install it there, or make a release that brings it.",
        )


def packages_on_board(names: Collection[str]) -> frozenset[str]:
    """The packages among `names` that the board's own Python has. This may take minutes."""
    if not names:
        return frozenset()
    code = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    # -I ignores PYTHONPATH, which names the running slot: only the board's own packages count.
    command = [sys.executable, "-I", "-c", code, *sorted(names)]
    message = f"can't ask {sys.executable} for its packages"
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_PYTHON_TIMEOUT_S, check=False)  # noqa: S603  # nosec B603  # our own line, in this Python; the names are arguments
    except subprocess.TimeoutExpired as error:
        raise StorageError(message, expected=f"an answer within {_PYTHON_TIMEOUT_S:g} s", got="none") from error
    except (OSError, UnicodeError) as error:
        raise StorageError(message, got=error) from error
    if process.returncode:
        raise StorageError(message, got=process.stderr[-200:])
    return frozenset(process.stdout.split())
