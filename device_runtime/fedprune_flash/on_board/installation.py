"""The installation of a kit, which skips every step whose result is there already, and its removal."""

from __future__ import annotations

import os
import platform
import pwd
import re
import stat
import sys
from contextlib import suppress
from pathlib import Path

from fedprune.core.errors import BoardError, JoinError, KitError, UsageError, shown
from fedprune.core.text import decode_text
from fedprune.wire.topics import check_device
from fedprune_device.launcher.slot_store import KEY, Owner, sync_folder, write_file
from fedprune_flash.on_board.board_files import drop, give, holds, owned
from fedprune_flash.on_board.kit_folder import AUTHORITY, CLAIM, ENVIRONMENT, SERVICE, KitFolder
from fedprune_flash.on_board.runtime_slot import RuntimeSlot
from fedprune_flash.on_board.service_control import ServiceControl, call

USER = "fedprune"
HOME, SETTINGS, STATE = "/opt/fedprune", "/etc/fedprune", "/var/lib/fedprune"
TEGRA = "/etc/nv_tegra_release"
PYTHON = "/usr/bin/python3"  # the Python of the service

# The unit that an image customised for cloud-init makes at every boot, until the kit is installed.
FIRST_BOOT = "/run/systemd/system/fedprune-install.service"

_HEX = re.compile(r"[0-9a-f]{64}")
_CLAIM = re.compile(rb"FP1[A-Z0-9]{56}")
# Bytes that are read of a claim: its text with dashes and blanks, also in UTF-16 as Windows writes it.
_MOST_OF_CLAIM = 400
# The last file of an identity that a board writes as it joins.
_JOINED = f"{STATE}/identity/tls.key"
_UNITS = "/etc/systemd/system"
_WANTS = f"{_UNITS}/multi-user.target.wants"
# The board's name in its environment.
_NAME = re.compile(r"^FEDPRUNE_DEVICE=(.*)$", re.MULTILINE)
_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


class BoardSystem:
    """The board that a kit is installed on or removed from.

    A `root` other than / is a trial: no user is made, and systemctl is only called if it is in the root's usr/bin.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.live = root == Path("/")
        self.control = ServiceControl(root)
        self.unit = self.at(f"{_UNITS}/{SERVICE}")
        self.link = self.at(f"{_WANTS}/{SERVICE}")

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    @property
    def owner(self) -> Owner | None:
        """The service's user; None in trials and before it is made."""
        if not self.live:
            return None
        try:
            entry = pwd.getpwnam(USER)
        except KeyError:
            return None
        return entry.pw_uid, entry.pw_gid

    def server_key(self) -> bytes | None:
        """The server's key that this board knows: root's own file, else that of the identity with which it joined."""
        for path in (f"{HOME}/{KEY}", f"{STATE}/identity/{KEY}"):
            if os.path.lexists(self.at(path)):
                # The second file is the service's: its user could put a link or a pipe there, which root must not open.
                return read_key(str(self.at(path)), os.O_NOFOLLOW | os.O_NONBLOCK)
        return None

    def check_root(self) -> None:
        """Raise `UsageError` if this is neither root nor a trial."""
        if self.live and os.geteuid() != 0:
            raise UsageError("only root may do this", hint="Run it with sudo.")


def read_key(option: str, flags: int = 0) -> bytes:
    """A server's key from 64 hex digits, or from a file with them, opened with `flags`; else `KitError`."""
    digits = option
    try:
        if not _HEX.fullmatch(option):
            with os.fdopen(os.open(option, os.O_RDONLY | flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise KitError(f"the server's key {shown(option)}", expected="a plain file", got="something else")
                digits = file.read(200).decode("ascii", "replace").strip()
    except OSError as error:
        raise KitError(f"can't read the server's key {option}: {error.strerror}") from error
    if not _HEX.fullmatch(digits):
        raise KitError(f"the server's key {shown(option)}", expected="64 hex digits, or a file with them")
    return bytes.fromhex(digits)


def read_claim(option: str) -> bytes:
    """A claim from a file, or from standard input for -; else `JoinError`. The service verifies its check."""
    try:
        with open(0 if option == "-" else option, "rb", closefd=option != "-") as file:
            raw = file.read(_MOST_OF_CLAIM)
    except OSError as error:
        raise JoinError(f"can't read the claim {option}: {error.strerror}") from error
    with suppress(UnicodeError):
        raw = decode_text(raw).encode()
    claim = raw.strip()
    if not _CLAIM.fullmatch(re.sub(rb"[\s-]", b"", claim).upper()):
        raise JoinError(
            f"the claim {option}",
            expected="FP1- and 7 groups of 8 characters",
            # Not the text itself, which may be a key.
            got=f"another text of {len(claim)} bytes",
            hint="`fedprune-server claim` makes one.",
        )
    return claim


def trusted_key(kit: KitFolder, system: BoardSystem, option: str | None, *, unsigned: bool) -> bytes | None:
    """The key that this board trusts with a kit; None for a kit that may be installed unsigned.

    Raises `KitError` if the kit is not signed, or by another key than the one that the operator names or the board
    knows.
    """
    known_key = system.server_key() if option is None else read_key(option)
    if kit.signature or (known_key is not None and not unsigned):
        return kit.authenticate(known_key)
    if not unsigned:
        raise KitError("the kit is not signed", hint="Make it with --signing-key, or install it with --unsigned.")
    if system.at(f"{HOME}/{KEY}").exists():
        raise KitError(
            "the kit is not signed, and this board's launcher starts only what its server has signed",
            hint="Make the kit with --signing-key, or --remove the installation first.",
        )
    return None


class Installation:
    """A kit and the board that it is installed on.

    `key` is the trusted one, None for a kit that is not signed. `claim` is one that didn't come with the kit. `device`
    is the board's name, None for the kit's.
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
        self.kit, self.place, self.key, self.claim, self.device = kit, system, key, claim, device
        self.start = start and system.control.there
        self._changed = False
        self._stopped = False
        self._state = system.at(STATE)

    @property
    def runtime(self) -> RuntimeSlot:
        python = PYTHON if self.place.live else sys.executable
        return RuntimeSlot(self.kit, self.place.at(HOME), python, self.place.owner, self.key)

    def check(self) -> None:
        if self.kit.claimed and self.claim is not None:
            raise UsageError("this kit has a claim of its own", hint="Leave --claim out.")
        self._check_name()
        required, actual = self.kit.manifest.get("python"), self._python()
        if required != actual:
            raise KitError(
                f"this kit is for Python {required}, this board has {actual}", hint=f"Make one with --python {actual}."
            )
        required, actual = self.kit.manifest.get("architecture"), platform.machine()
        if required != actual or sys.maxsize < 2**32:
            bits = "" if sys.maxsize > 2**32 else " with a 32-bit Python"
            raise KitError(f"this kit is for {required}, this board is {actual}{bits}", hint="Make another kit.")
        if self.kit.jetson != self.place.at(TEGRA).exists():
            kinds = ("a Jetson", "no Jetson") if self.kit.jetson else ("a board that is no Jetson", "one")
            raise KitError(
                f"this kit is for {kinds[0]}, this board is {kinds[1]}",
                hint="On a Jetson JetPack's own packages must not be hidden: `fedprune-flash kit --jetson`.",
            )
        self.runtime.check()

    def _check_name(self) -> None:
        """Raise `BoardError` if the board has another name: an operator of many may have mixed up their addresses."""
        if self.device is None:
            return
        check_device(self.device, "--device", error=UsageError)
        environment = self.place.at(SETTINGS) / ENVIRONMENT
        name = _NAME.search(environment.read_text(encoding="utf-8", errors="replace")) if environment.exists() else None
        if name is not None and name[1] != self.device:
            raise BoardError(
                "this board is installed under another name", expected=self.device, got=name[1],
                hint="Is its address right? To give it another name, undo its installation first: --remove --purge.",
            )  # fmt: skip

    def _python(self) -> str:
        if not self.place.live:
            return f"{sys.version_info[0]}.{sys.version_info[1]}"
        return call([PYTHON, "-c", _VERSION]).strip()

    def install(self) -> None:
        """Do all steps that aren't done yet, in an order in which a power cut leaves nothing half trusted."""
        system, runtime = self.place, self.runtime
        if runtime.newer:
            print("already: a release of the server's, which is newer than any kit's: it stays", flush=True)
        if system.live and system.owner is None:
            self._say("make the system user fedprune")
            self._add_user()
            runtime = self.runtime  # whose files are that user's
        if not runtime.laid_out:
            self._say(f"lay out {HOME}: launcher.pyz, slots a and b")
            runtime.lay_out()
        if not runtime.filled:
            key = ", write the key" if self.key else ""
            self._say(f"unpack the kit's {len(self.kit.wheels)} wheels into a slot{key}")
            self._stop()
            runtime.fill()
        # A state folder on another disk may be a link, which is root's.
        service_paths = [*runtime.folders, self._state.resolve()]
        if not self._state.is_dir() or not owned(service_paths, system.owner):
            self._say(f"give slots and {STATE} to {USER}")
            self._stop()
            self._state.mkdir(parents=True, exist_ok=True)
            give(service_paths, system.owner)
        for name in (ENVIRONMENT, AUTHORITY):
            path = system.at(SETTINGS) / name
            if name in self.kit.names and not holds(path, self._setting(name), 0o644):
                self._say(f"write {SETTINGS}/{name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, self._setting(name))
        if not self._handed_over():
            self._say(f"hand the claim over to {STATE}/claim{', and delete it here' if self.claim is None else ''}")
            self._hand_over()
        if not holds(system.unit, self.kit.read(SERVICE), 0o644) or not system.link.is_symlink():
            self._say(f"write and enable {SERVICE}")
            self._enable()
        if self.start and (self._changed or not system.control.up):
            self._say(f"start {SERVICE}")
            self._begin()

    def _say(self, what: str) -> None:
        print(f"now: {what}", flush=True)
        self._changed = True

    def _add_user(self) -> None:
        call(["useradd", "--system", "--no-create-home", "--home-dir", STATE, "--shell", "/usr/sbin/nologin", USER])

    def resume(self) -> None:
        """After a failure: start the service again if it was stopped here, with the slot that is whole."""
        if self._stopped:
            self.place.control.tell("start", "--no-block", SERVICE, must=False)

    def _stop(self) -> None:
        """Stop the service, which may write where root is about to write."""
        if self.place.control.running:
            self._stopped = True
            self.place.control.tell("stop", SERVICE)

    def _setting(self, name: str) -> bytes:
        """The content of a file of settings: the kit's, with the board's name in place of the kit's."""
        content = self.kit.read(name)
        if name == ENVIRONMENT and self.device is not None:
            content = _NAME.sub(f"FEDPRUNE_DEVICE={self.device}", content.decode()).encode()
        return content

    def _handed_over(self) -> bool:
        """Whether no claim is left to hand over: there is none, or the board has joined and needs none."""
        joined = os.path.lexists(self.place.at(_JOINED))
        return not self.kit.claimed and not self.kit.spent and (self.claim is None or joined)

    def _hand_over(self) -> None:
        claim = self.kit.read(CLAIM) if self.kit.claimed else self.claim
        if claim is not None:
            write_file(self._state / "claim", claim, 0o400, self.place.owner)
        self.kit.blacken_claim()

    def _enable(self) -> None:
        system = self.place
        # The unit's folder is a parent of this one.
        system.link.parent.mkdir(parents=True, exist_ok=True)
        write_file(system.unit, self.kit.read(SERVICE))
        system.link.unlink(missing_ok=True)
        system.link.symlink_to(f"{_UNITS}/{SERVICE}")
        sync_folder(system.link.parent)
        if self.start:
            system.control.tell("daemon-reload")

    def _begin(self) -> None:
        self.place.control.tell("reset-failed", SERVICE, must=False)
        # At a first boot the network that the service waits for comes later than this.
        self.place.control.tell("restart", "--no-block", SERVICE)


def remove(system: BoardSystem, *, purge: bool) -> None:
    """Undo an installation, without a kit; `purge` deletes the board's state, its identity and the user, too."""
    if system.unit.exists() or system.link.is_symlink():
        print(f"now: stop and remove {SERVICE}", flush=True)
        _remove_service(system)
    for path in (SETTINGS, HOME, *([STATE] if purge else [])):
        if os.path.lexists(system.at(path)):
            print(f"now: delete {path}", flush=True)
            drop(system.at(path))
    if purge and system.owner is not None:
        print(f"now: remove the user {USER}", flush=True)
        call(["userdel", USER])
    if not purge:
        print(f"What was learnt stays in {STATE}, and so do the board's identity, its user and its samples.")


def _remove_service(system: BoardSystem) -> None:
    if system.control.running:
        system.control.tell("stop", SERVICE)
    # Else the boot partition's unit would install the kit again at the next boot.
    if system.at(FIRST_BOOT).exists():
        mask = system.at(f"{_UNITS}/{Path(FIRST_BOOT).name}")
        mask.unlink(missing_ok=True)
        mask.symlink_to("/dev/null")
    for path in (system.link, system.unit):
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)
    system.control.tell("daemon-reload", must=False)
