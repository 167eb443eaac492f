"""The remote end of `fedprune-flash ssh`: sent to a board over SSH and run by its python3 until the connection ends.

It answers one line of JSON with another, which begins with `MARK`, because a login shell may print lines of its own.
It imports the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "fedprune: "  # as in `fedprune.core.line_process`
_PIECE = 2**18
_WAIT_S = 60.0
_LOCK = ".lock"
_JOINED = ("device.pem", "tls.key", "authority.pem", "server.pub")  # files of an identity that is whole

_Body = dict[str, Any]


def probe(root: str) -> _Body:
    top, user = Path(root), os.geteuid()
    live = root == "/"
    sudo = not live or user == 0 or _runs("sudo", "-n", "true")
    state = top / "var/lib/fedprune"
    rows = dict(line.partition(":")[::2] for line in _text(top / "proc/meminfo").splitlines())
    return {
        "python": list(sys.version_info[:2]),
        "machine": platform.machine(),
        "wide": sys.maxsize > 2**32,
        "model": _text(top / "proc/device-tree/model").rstrip("\0"),
        "compatible": [e for e in _text(top / "proc/device-tree/compatible").split("\0") if e],
        "l4t": _text(top / "etc/nv_tegra_release"),
        "memory": int((rows.get("MemTotal", "").split() or ["0"])[0]) * 1024,
        "free": shutil.disk_usage(_folder(root, dry=True)).free,
        "device": _device(top),
        "sudo": sudo,
        "joined": sudo and all(_there(state / "identity" / name, live) for name in _JOINED),
        "claimed": sudo and _there(state / "claim", live),
    }


def have(root: str, files: list[tuple[str, str, int]], dry: bool) -> _Body:
    """Which files of a kit (path, sha256 and size of each) are missing, and how many bytes of each have arrived.

    Unless `dry`, files that are not of the kit are deleted.
    """
    folder = _folder(root, dry=dry)
    missing: list[tuple[str, int]] = []
    wanted = {folder / _LOCK}
    for path, sha256, size in files:
        target, partial = _inside(folder, path), folder / f".{sha256}.partial"
        wanted |= {target, partial}
        if _digest(target) != (sha256, size):
            begun = partial.stat().st_size if partial.is_file() else 0
            missing.append((path, begun if begun <= size else 0))
    if not dry:
        for found in folder.rglob("*"):
            if found not in wanted and (found.is_symlink() or not found.is_dir()):
                found.unlink()
    return {"missing": missing}


def put(root: str, path: str, sha256: str, size: int, offset: int) -> _Body:
    """Take the rest of a file, which follows the request; it gets its name once it is complete and correct."""
    folder = _folder(root)
    partial, target = folder / f".{sha256}.partial", _inside(folder, path)
    left, trouble = size - offset, ""
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:  # what has arrived stays if the connection breaks
            file.truncate(offset)
            file.seek(offset)
            while left:
                piece = _next(left)
                left -= len(piece)
                while piece:
                    piece = piece[file.write(piece) :]  # which may take less than it was given
            os.fsync(descriptor)
    except OSError as error:
        trouble = str(error)
    while left:  # the rest of the file must be read nevertheless
        left -= len(_next(left))
    if trouble:
        return {"error": trouble}
    if _digest(partial) != (sha256, size):
        partial.unlink()
        return {"put": False}
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial.replace(target)
    return {"put": True}


def install(root: str, words: list[str]) -> _Body:
    command = [sys.executable, str(_folder(root) / "install.pyz"), *words]
    if root != "/":
        command += ["--root", root]
    elif os.geteuid() != 0:
        command = ["sudo", "-n", *command]
    process = subprocess.Popen(  # noqa: S603  # nosec B603  # the installer that came over this link
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
    )
    last = ""
    for raw in process.stdout or ():
        last = raw.decode("utf-8", "replace").strip()[:2000]
        with suppress(OSError):  # the installer runs to its end even if the connection is gone
            _say({"line": last})
    return {"code": process.wait(), "last": last}


def drop(root: str) -> _Body:
    shutil.rmtree(_folder(root))
    return {}


_WORK: dict[str, Callable[..., _Body]] = {"probe": probe, "have": have, "put": put, "install": install, "drop": drop}


def main() -> None:
    """Answer requests until there are no more; those that change anything wait for other connections to end."""
    held = False
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        free = request.pop("free", False)
        try:
            if not held and not free:
                _hold(_folder(request["root"]))
                held = True
            answer = _WORK[request.pop("op")](**request)
        except OSError as error:
            answer = {"error": str(error)}
        _say(answer)


def _say(body: _Body) -> None:
    print(MARK + json.dumps(body), flush=True)


def _next(left: int) -> bytes:
    piece = sys.stdin.buffer.read(min(_PIECE, left))
    if not piece:
        raise SystemExit(1)  # the connection broke; what has arrived is kept
    return piece


def _folder(root: str, *, dry: bool = False) -> Path:
    """The folder of kits, which only this user may write to; with `dry` its nearest parent that exists."""
    home = Path.home() if root == "/" else Path(root) / "home"
    folder = home / ".cache/fedprune-kit"
    if not dry:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            raise OSError(f"{folder} is not this user's own")
        folder.chmod(0o700)
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _hold(folder: Path) -> None:
    """Keep other connections away, and wait for an installer that an earlier one has left running."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    end = time.monotonic() + _WAIT_S
    while not _locked(descriptor):
        if time.monotonic() > end:
            raise OSError("another installation is under way here")
        time.sleep(0.2)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _inside(folder: Path, path: str) -> Path:
    if path.startswith("/") or ".." in path.split("/"):
        raise OSError(f"{path} leads out of the folder")
    return folder / path


def _digest(path: Path) -> tuple[str, int]:
    found, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
                size += len(piece)
    except OSError:
        return "", -1
    return found.hexdigest(), size


def _device(top: Path) -> str:
    """The name under which this board was installed; empty if it wasn't."""
    rows = dict(line.partition("=")[::2] for line in _text(top / "etc/fedprune/device.env").splitlines())
    return rows.get("FEDPRUNE_DEVICE", "")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(65536).decode("utf-8", "replace")
    except OSError:
        return ""


def _there(path: Path, live: bool) -> bool:
    """Whether a file exists that only root may see."""
    return path.exists() if not live or os.geteuid() == 0 else _runs("sudo", "-n", "test", "-e", str(path))


def _runs(*command: str) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0  # noqa: S603  # nosec B603  # words of our own
    except OSError:
        return False


if __name__ == "__main__":
    main()
