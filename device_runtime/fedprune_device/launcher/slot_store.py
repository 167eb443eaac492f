"""The folder of the launcher: slots, their records and the state of updates.

Every file is written next to its old version, flushed and renamed. The launcher includes this module, so it imports
only the standard library.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedprune_device.launcher.ed25519 import verify_signature
from fedprune_device.launcher.state import ROLLED_BACK, SLOTS, DamagedError, LauncherState, UpdateOutcome

FORMAT = 1  # format of state and records. A launcher is installed once, and reads what later releases write.

KEY_FILE = "server.pub"
# The prefix of a signed manifest, as in `fedprune.releases.release`, which the launcher can't import.
SIGNATURE_PREFIX = b"fedprune release 1\n"

Owner = tuple[int, int]  # numbers of a user and its group

_KEY_BYTES = 32
_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class SlotRecord:
    """The contents of an installed release.

    Attributes:
        version: Its number.
        name: Its version for people.
        entry: What to run, `module:function`.
        files: sha256 and size by path within the slot.
        system: Modules that it takes from the board's own Python; None if they were not recorded.
        manifest: The signed manifest that it was installed from; empty if it is not signed.
        signature: The manifest's signature, as hex.
        wheels: Paths of the files that each wheel brought, by the wheel's sha256. Nothing is started by them: the next
            release copies the files of wheels that it shares, and is checked as a whole.
    """

    version: int
    name: str
    entry: str
    files: dict[str, tuple[str, int]]
    system: tuple[str, ...] | None = None
    manifest: str = ""
    signature: str = ""
    wheels: dict[str, tuple[str, ...]] = field(default_factory=dict)


class SlotStore:
    """The folder of launcher, slots and state. Methods that write raise `OSError` if the disk fails or is full.

    server.pub        the server's key as hex, root's alone: only what it has signed is started
    a, b              the slots
    state/state.json  the state, with a checksum; state/copy.json is a second copy
    state/a.json      the record of slot a, written last and removed first; likewise state/b.json
    state/*lock       files for locks on the state and the service; a slot's lock is one on its folder
    incoming/         files of the next release (`releases.installer`)
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "state"

    def key(self) -> bytes | None:
        """The key that must have signed what is started; None if the board has none. Raises `DamagedError`."""
        path = self.root / KEY_FILE
        try:
            key = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            key = b""
        if len(key) != _KEY_BYTES:
            raise DamagedError(f"{path} holds no key")
        return key

    def lock_state(self) -> AbstractContextManager[None]:
        """Lock the state while it is read and written; other processes wait."""
        return _hold_lock(self.folder / "lock", fcntl.LOCK_EX)

    def lock_service(self) -> AbstractContextManager[None]:
        """Be the only one that chooses the service's slot, and runs it; `BlockingIOError` if another process does."""
        path = self.folder / "service.lock"
        return _hold_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, "another process runs the service")

    def lock_slot(self, slot: str, operation: int = fcntl.LOCK_EX) -> AbstractContextManager[None]:
        """Keep processes from running from a slot that is written, and with `LOCK_SH` from writing one that runs.

        Raises `BlockingIOError` if another process does.
        """
        return _hold_lock(self.root / slot, operation | fcntl.LOCK_NB, f"a process runs from slot {slot}", folder=True)

    @contextmanager
    def use_slot(self, slot: str, *, damaged: bool = False) -> Iterator[SlotRecord]:
        """A record of a slot that stays as it is meanwhile, `damaged` without a check. Raises `DamagedError`."""
        with ExitStack() as locks:
            try:
                locks.enter_context(self.lock_slot(slot, fcntl.LOCK_SH))
            except OSError as error:
                raise DamagedError(f"slot {slot} is missing, or being written ({error.strerror})") from error
            yield self.record(slot) if damaged else self.checked_record(slot)

    def load(self) -> LauncherState | None:
        states = []
        for name in ("state.json", "copy.json"):
            with suppress(DamagedError):
                states.append(LauncherState.from_document(_read_document(self.folder / name)))
        return max(states, key=lambda s: s.sequence, default=None)

    def save(self, state: LauncherState) -> LauncherState:
        """Write both copies of a state, and return it as written; after a power cut the old or the new one counts."""
        state = replace(state, sequence=state.sequence + 1)
        # One after the other, each synced: a power cut damages at most one of them.
        for name in ("copy.json", "state.json"):
            _write_document(self.folder / name, asdict(state))
        return state

    def record(self, slot: str) -> SlotRecord:
        """The record of a slot; raises `DamagedError` if nothing is installed there, or the record is damaged."""
        body = _read_document(self.folder / f"{slot}.json")
        try:
            files = {str(path): (str(sha256), int(size)) for path, (sha256, size) in body["files"].items()}
            system_modules = body.get("system")
            system = None if system_modules is None else tuple(map(str, system_modules))
            proof = str(body.get("manifest", "")), str(body.get("signature", ""))
            wheels = {str(sha256): tuple(map(str, paths)) for sha256, paths in body.get("wheels", {}).items()}
            names = str(body["name"]), str(body["entry"])
            record = SlotRecord(int(body["version"]), *names, files, system, *proof, wheels)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise DamagedError(f"the record of slot {slot} is not one") from error
        if not _ENTRY.fullmatch(record.entry):
            raise DamagedError(f"the record of slot {slot} names no module:function")
        return record

    def write_record(self, slot: str, record: SlotRecord) -> None:
        """Write a slot's record; from then on it counts as installed."""
        _write_document(self.folder / f"{slot}.json", asdict(record))

    def drop_record(self, slot: str) -> None:
        with suppress(FileNotFoundError):
            (self.folder / f"{slot}.json").unlink()
        sync_slot_folder(self.folder)

    def checked_record(self, slot: str, *, from_disk: bool = False, key: bytes | None = None) -> SlotRecord:
        """A slot's record, after checking that the server (or `key`) signed it, every file matches and none is added.

        `from_disk` reads synced files from the disk instead of the page cache, which hides write errors. Raises
        `DamagedError`.
        """
        record, folder = self.record(slot), self.root / slot
        key = self.key() if key is None else key
        if key is not None and not _is_signed(record, key):
            raise DamagedError(f"slot {slot}: the server's key has not signed what is in it")
        paths = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
        present_paths = {str(p.relative_to(folder)) for p in paths}
        for path in sorted(present_paths ^ set(record.files)):
            what = "is missing" if path in record.files else "doesn't belong there"
            raise DamagedError(f"slot {slot}: {path} {what}")
        for path, (sha256, size) in record.files.items():
            if (folder / path).is_symlink() or digest_and_size(folder / path, from_disk=from_disk) != (sha256, size):
                raise DamagedError(f"slot {slot}: {path} is damaged")
        return record

    def recovered_state(self) -> LauncherState:
        """Make a state in place of a lost one. The lower version becomes stable, since the other may never have run.

        Raises `DamagedError` if no slot is whole.
        """
        versions = {}
        for slot in SLOTS:
            with suppress(DamagedError):
                versions[slot] = self.checked_record(slot).version
        if not versions:
            raise DamagedError("neither the launcher's state nor a slot is whole")
        highest, stable = max(versions.values()), min(versions, key=lambda s: versions[s])
        reason = f"both copies of the launcher's state were damaged; version {versions[stable]} serves"
        return LauncherState(stable, highest=highest, outcome=UpdateOutcome(highest, ROLLED_BACK, reason))


def running_slot_text(environment: Mapping[str, str] = os.environ) -> str:
    root, slot = environment.get("FEDPRUNE_ROOT", ""), environment.get("FEDPRUNE_SLOT", "")
    if not root or slot not in SLOTS:
        return ""
    try:
        return f"slot {slot} with release {SlotStore(Path(root)).record(slot).version}"
    except (DamagedError, OSError):
        return f"slot {slot}"


def files_digest(files: Mapping[str, tuple[str, int]]) -> str:
    """sha256 of a slot's files, each by path, sha256 and size, as in a release's manifest."""
    rows = [[path, *files[path]] for path in sorted(files)]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _is_signed(record: SlotRecord, key: bytes) -> bool:
    """Whether the owner of a key signed the manifest of a record."""
    try:
        signature, manifest = bytes.fromhex(record.signature), record.manifest.encode()
        body = json.loads(manifest) if verify_signature(key, signature, SIGNATURE_PREFIX + manifest) else {}
        signed_facts = body["number"], body["entry"], body["contents"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(signed_facts == (record.version, record.entry, files_digest(record.files)))


def digest_and_size(path: Path, *, from_disk: bool = False) -> tuple[str, int]:
    """sha256 and size of a file; ("", -1) if it can't be read."""
    sha256, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            if from_disk:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := file.read(2**20):
                sha256.update(chunk)
                size += len(chunk)
    except OSError:
        return "", -1
    return sha256.hexdigest(), size


def _read_document(path: Path) -> Any:
    try:
        outer = json.loads(path.read_bytes())
        text = outer["body"]
        if outer["format"] != FORMAT or hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("another format or digest")
        return json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path.name} is missing or damaged") from error


def write_file(path: Path, data: bytes, mode: int = 0o644, owner: Owner | None = None) -> None:
    """Replace a file's content; after a power cut it has the old content or the new one.

    It has the permissions from its first byte on, and by default this user as its owner. No link is followed: root may
    write where others may, too.
    """
    new_path = path.with_name(f".{path.name}.new")
    # O_EXCL below follows no link, but fails on what an interrupted write has left.
    if os.path.lexists(new_path):
        new_path.unlink()
    descriptor = os.open(new_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.fchmod(descriptor, mode)
        if owner is not None:
            os.fchown(descriptor, *owner)
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new_path.replace(path)
    sync_slot_folder(path.parent)


@contextmanager
def _hold_lock(path: Path, operation: int, busy_message: str = "", *, folder: bool = False) -> Iterator[None]:
    """Lock a file or folder, and no target of a link, while the body runs.

    A lock that isn't waited for is held by the programs, too, that this process becomes or starts: until they all end.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT
    # For this user alone: whoever can open a file can lock it, and keep the service from starting.
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    try:
        os.set_inheritable(descriptor, bool(operation & fcntl.LOCK_NB))
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, busy_message, str(path)) from None
        yield
    finally:
        os.close(descriptor)


def _write_document(path: Path, body: Any) -> None:
    text = json.dumps(body, sort_keys=True)
    document = {"format": FORMAT, "body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_file(path, json.dumps(document).encode())


def sync_slot_folder(folder: Path) -> None:
    """Make renames and deletions in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
