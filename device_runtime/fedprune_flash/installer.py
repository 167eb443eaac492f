"""Install fedprune on this board from the kit beside this file: no network, no package but what the kit brings.

    sudo python3 install.py             install, or go on after a power cut; a second run changes nothing
    sudo python3 install.py --dry-run   say what would be done, and how each step is undone
    sudo python3 install.py --remove    undo it; what was learnt stays in /var/lib/fedprune

This file is copied into kits and runs by itself, on Python 3.10 or newer: it imports the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*){0,3}")
"""Paths that a kit may have; the installer is the only one who knows them by heart."""

USER = "fedprune"
SERVICE = "fedprune.service"
HOME, SETTINGS, STATE = "/opt/fedprune", "/etc/fedprune", "/var/lib/fedprune"
MARKER = ".kit"
SPARE = 64 * 2**20
"""Bytes that stay free beside what is installed."""

# The exit codes of all commands of fedprune, see docs/exit-codes.md.
USAGE, FULL, STORAGE, RUNTIME, KIT = 2, 30, 31, 51, 60


class InstallError(Exception):
    """What is wrong and what to do, and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Step(NamedTuple):
    """One thing that is done: in words, how it is undone in words, whether it is done, and both as functions."""

    what: str
    reverse: str
    done: Callable[[], bool]
    do: Callable[[], None]
    undo: Callable[[], None]


class Installation:
    """A kit and the board that it goes to.

    Args:
        kit: The kit's folder.
        root: Where the board's file system begins. Anything but / is a trial: no user is made, and nothing started.
        start: Whether the service is started.
    """

    def __init__(self, kit: Path, root: Path, *, start: bool) -> None:
        self.kit, self.root = kit, root
        self.live = root == Path("/")
        self.start = start and self.live
        self.changed = False
        raw = read(kit / "kit.json")
        self.manifest = manifest(raw)
        self.digest = hashlib.sha256(raw).hexdigest()

    def at(self, path: str) -> Path:
        """A path of the board."""
        return self.root / path.lstrip("/")

    def check(self) -> None:
        """Make sure that the kit is for this board and whole, and that there is room."""
        wanted, found = self.manifest.get("python"), f"{sys.version_info[0]}.{sys.version_info[1]}"
        if wanted != found:
            raise InstallError(
                f"this kit is for Python {wanted}, this is {found}. Make one with --python {found}.", KIT
            )
        wanted, found = self.manifest.get("architecture"), platform.machine()
        if wanted != found or sys.maxsize < 2**32:
            bits = "" if sys.maxsize > 2**32 else " with a 32-bit Python"
            raise InstallError(f"this kit is for {wanted}, this board is {found}{bits}. Make another kit.", KIT)
        if self.live and os.geteuid() != 0:
            raise InstallError("only root may install. Run it with sudo.", USAGE)
        for row in self.manifest["files"]:
            self._check_file(row)
        claim = self.manifest.get("claim")
        if claim is not None and (self.kit / "claim.txt").exists():
            self._check_file(claim)
        if not self._installed():
            self._check_room()

    def _check_file(self, row: dict[str, Any]) -> None:
        path = str(row["path"])
        if not SAFE_PATH.fullmatch(path):
            raise InstallError(
                f"the kit names a file {path[:60]!r}, which is no path of a kit. Make the kit again.", KIT
            )
        found = hashlib.sha256()
        try:
            with (self.kit / path).open("rb") as file:
                while piece := file.read(2**20):
                    found.update(piece)
        except OSError as error:
            raise InstallError(f"can't read {path} of the kit: {error.strerror}. Copy the kit again.", KIT) from error
        if found.hexdigest() != row["sha256"]:
            raise InstallError(f"{path} of the kit is damaged. Copy the kit again.", KIT)

    def _check_room(self) -> None:
        needed = SPARE
        for wheel in self._wheels():
            with zipfile.ZipFile(wheel) as archive:
                # Compiled modules take about as much again as their sources.
                needed += sum(i.file_size * (2 if i.filename.endswith(".py") else 1) for i in archive.infolist())
        there = self.at(HOME)
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if free < needed:
            raise InstallError(f"{there} has {free >> 20} MB free, {needed >> 20} MB are needed. Free some.", FULL)

    def steps(self) -> list[Step]:
        """All that is to be done, in order."""
        unit = self.at(f"/etc/systemd/system/{SERVICE}")
        link = self.at(f"/etc/systemd/system/multi-user.target.wants/{SERVICE}")
        steps = [
            Step("make the system user fedprune", "userdel fedprune", self._has_user, self._add_user, self._drop_user),
            Step(
                f"install the kit's {len(self._wheels())} wheels in {HOME}",
                f"rm -r {HOME}",
                self._installed,
                self._install,
                lambda: self._drop(HOME),
            ),
            Step(
                f"write {SETTINGS}/board.env",
                f"rm -r {SETTINGS}",
                self._configured,
                self._configure,
                lambda: self._drop(SETTINGS),
            ),
        ]
        if self.manifest.get("claim") is not None:
            steps.append(
                Step(
                    f"hand the claim over to {SETTINGS}/claim, and delete it here",
                    "none: a claim is good for one board",
                    lambda: not (self.kit / "claim.txt").exists(),
                    self._hand_over,
                    lambda: None,
                )
            )
        steps.append(
            Step(
                f"write and enable {SERVICE}",
                f"systemctl disable --now {SERVICE}; rm {unit}",
                lambda: holds(unit, self._text(SERVICE), 0o644) and link.is_symlink(),
                lambda: self._enable(unit, link),
                lambda: self._disable(unit, link),
            )
        )
        if self.start:
            steps.append(
                Step(
                    f"start {SERVICE}",
                    f"systemctl stop {SERVICE}",
                    lambda: (
                        not self.changed
                        and self._systemctl("is-enabled", "--quiet", SERVICE, check=False) == 0
                        and self._systemctl("is-failed", "--quiet", SERVICE, check=False) != 0
                    ),
                    lambda: self._begin(),
                    lambda: None,
                )
            )
        return steps

    def _has_user(self) -> bool:
        if not self.live:
            return True
        try:
            pwd.getpwnam(USER)
        except KeyError:
            return False
        return True

    def _add_user(self) -> None:
        call(["useradd", "--system", "--no-create-home", "--home-dir", STATE, "--shell", "/usr/sbin/nologin", USER])

    def _drop_user(self) -> None:
        if self.live and self._has_user():
            call(["userdel", USER])

    def _wheels(self) -> list[Path]:
        names = [str(row["path"]) for row in self.manifest["files"]]
        return [self.kit / n for n in sorted(names) if n.endswith(".whl")]

    def _installed(self) -> bool:
        try:
            return (self.at(HOME) / MARKER).read_text(encoding="ascii").strip() == self.digest
        except (OSError, ValueError):
            return False

    def _install(self) -> None:
        home = self.at(HOME)
        if self.live and home.exists():
            self._systemctl("stop", SERVICE, check=False)
        if home.exists():  # an older kit's, or what a power cut left
            (home / MARKER).unlink(missing_ok=True)
            shutil.rmtree(home)
        home.parent.mkdir(parents=True, exist_ok=True)
        # The board's own pip may be missing; and a Jetson's onnxruntime-gpu and TensorRT are the system's.
        venv.create(home, system_site_packages=bool(self.manifest.get("jetson")), with_pip=False, symlinks=True)
        python = home / "bin" / "python"
        wheels = self._wheels()
        (pip,) = [w for w in wheels if w.name.startswith("pip-")]
        call(
            [
                *(str(python), str(pip / "pip"), "--isolated", "install", "--quiet", "--no-index", "--no-deps"),
                *("--no-cache-dir", "--disable-pip-version-check", "--ignore-installed", "--no-warn-script-location"),
                *(str(w) for w in wheels if w != pip),
            ]
        )
        for name in self.manifest.get("imports", []):
            probe(python, str(name))
        write(home / MARKER, self.digest + "\n", 0o644)

    def _settings(self) -> list[str]:
        there = {str(row["path"]) for row in self.manifest["files"]}
        return [name for name in ("board.env", "ca.pem") if name in there]

    def _configured(self) -> bool:
        return all(holds(self.at(SETTINGS) / name, self._text(name), 0o644) for name in self._settings())

    def _configure(self) -> None:
        for name in self._settings():
            write(self.at(SETTINGS) / name, self._text(name), 0o644)

    def _text(self, name: str) -> str:
        return read(self.kit / name).decode("utf-8")

    def _hand_over(self) -> None:
        source, owner = self.kit / "claim.txt", None
        if self.live:
            entry = pwd.getpwnam(USER)
            owner = entry.pw_uid, entry.pw_gid
        text = read(source).decode("ascii")
        write(self.at(SETTINGS) / "claim", text, 0o400, owner)
        with source.open("r+b") as file:  # FAT writes in place, so that the claim doesn't stay on the card
            file.write(b"\0" * len(text))
            file.flush()
            os.fsync(file.fileno())
        source.unlink()
        sync(source.parent)

    def _enable(self, unit: Path, link: Path) -> None:
        write(unit, self._text(SERVICE), 0o644)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"/etc/systemd/system/{SERVICE}")
        if self.start:
            self._systemctl("daemon-reload")

    def _disable(self, unit: Path, link: Path) -> None:
        if self.live:
            self._systemctl("stop", SERVICE, check=False)
        link.unlink(missing_ok=True)
        unit.unlink(missing_ok=True)
        if self.live:
            self._systemctl("daemon-reload", check=False)

    def _begin(self) -> None:
        # At a first boot the network that the service waits for comes later than this.
        self._systemctl("restart", "--no-block", SERVICE)

    def _systemctl(self, *arguments: str, check: bool = True) -> int:
        return call(["systemctl", *arguments], check=check)

    def _drop(self, path: str) -> None:
        if self.at(path).exists():
            shutil.rmtree(self.at(path))


def probe(python: Path, module: str) -> None:
    """Load a module in a process of its own: a wheel with instructions that the processor lacks kills it."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]{0,80}", module):
        raise InstallError(f"the kit names a module {module[:60]!r}. Make the kit again.", KIT)
    done = subprocess.run([str(python), "-I", "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGILL:
        raise InstallError(
            f"{module} uses instructions that this processor lacks. Take another version of it.", RUNTIME
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InstallError(f"{module} can't be loaded: {said[:300]}. On a Jetson it comes with JetPack.", RUNTIME)


def call(command: list[str], *, check: bool = True) -> int:
    """Run a program; if it must succeed and doesn't, its last line is the error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    except OSError as error:
        raise InstallError(f"can't run {command[0]}: {error.strerror}", STORAGE) from error
    if check and done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InstallError(f"{Path(command[0]).name} failed: {said[:300]}", STORAGE)
    return done.returncode


def write(path: Path, text: str, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Replace a file's content: after a power cut it has the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.partial")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, mode)
        if owner is not None:
            os.fchown(descriptor, *owner)
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    new.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make renames and deletions in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds(path: Path, text: str, mode: int) -> bool:
    """Whether a file has this content and these permissions."""
    try:
        return path.read_text(encoding="utf-8") == text and stat.S_IMODE(path.stat().st_mode) == mode
    except (OSError, ValueError):
        return False


def read(path: Path) -> bytes:
    """A small file of the kit."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InstallError(f"can't read {path}: {error.strerror}. This is no whole kit; copy it again.", KIT) from error


def manifest(raw: bytes) -> dict[str, Any]:
    """What kit.json says."""
    try:
        body = json.loads(raw)
        if isinstance(body, dict) and isinstance(body["files"], list) and isinstance(body["data"], str):
            return body
    except (ValueError, KeyError, RecursionError):
        pass
    raise InstallError("kit.json is not that of a kit. Make the kit again.", KIT)


def install(work: Installation, *, dry: bool) -> None:
    """Do what is not done yet, step by step."""
    work.check()
    for step in work.steps():
        if step.done():
            print(f"already: {step.what}", flush=True)
        elif dry:
            print(f"would: {step.what} (undone by: {step.reverse})", flush=True)
        else:
            print(f"now: {step.what}", flush=True)
            step.do()
            work.changed = True
    data = str(work.manifest["data"])
    if not dry and data.startswith("/") and not work.at(data).exists():
        print(f"The samples are to come: put them at {data}, readable to {USER}, then `systemctl start {SERVICE}`.")


def remove(work: Installation, *, dry: bool) -> None:
    """Undo the steps, the last one first."""
    if work.live and os.geteuid() != 0:
        raise InstallError("only root may remove it. Run it with sudo.", USAGE)
    for step in reversed(work.steps()):
        print(f"{'would undo' if dry else 'undo'}: {step.what}", flush=True)
        if not dry:
            step.undo()
    print(f"What was learnt stays in {STATE}, samples stay where they are.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--remove", action="store_true", help="undo an installation")
    parser.add_argument("--no-start", action="store_true", help="don't start the service: the board reboots next")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="for trials: all paths begin here")
    arguments = parser.parse_args(argv)
    os.umask(0o022)
    try:
        work = Installation(Path(__file__).resolve().parent, arguments.root.resolve(), start=not arguments.no_start)
        (remove if arguments.remove else install)(work, dry=arguments.dry_run)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        return FULL if error.errno == 28 else STORAGE
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: the kit is damaged ({error}). Make it again.", file=sys.stderr)
        return KIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
