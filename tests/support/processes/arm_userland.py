"""arm64 userlands: Debian's own packages, unpacked on this machine without running one line of theirs.

No maintainer script runs, which would take minutes under emulation: what they would have made and a board's runtime
needs (the users) is made here.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.paths import ROOT

CACHE = ROOT / "build" / "arm64"  # userlands are made once; `make clean` removes them

_PACKAGES = (
    *("base-files", "base-passwd", "bash", "ca-certificates", "coreutils", "dash", "grep", "login", "passwd", "sed"),
    *("libgomp1", "libstdc++6", "python3", "systemd"),
)
_HOOKS = "/usr/share/mmdebstrap/hooks/merged-usr"
_SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class System:
    """A release of Debian or Ubuntu as boards have it; `keyring` signs packages where this machine's own don't do."""

    name: str
    python: str
    mirror: str = "http://deb.debian.org/debian"
    keyring: str = ""


BOOKWORM = System("bookworm", "3.11")  # raspberry Pi OS 12 is made from it

TRIXIE = System("trixie", "3.13")  # raspberry Pi OS 13 is made from it

JAMMY = System(
    "jammy", "3.10", "http://ports.ubuntu.com/ubuntu-ports", "/usr/share/keyrings/ubuntu-archive-keyring.gpg"
)
"""JetPack 6 is made from it."""


def tool(name: str, package: str) -> str:
    """Where a program is; skips the test where it isn't installed."""
    path = shutil.which(name, path=_SBIN)
    if path is None:
        pytest.skip(f"{name} is not installed (apt install {package})")
    return path


def userland(system: System, packages: Sequence[str] = ()) -> Path:
    """A folder with a system's files; it is kept, so copy it before something runs in it.

    `packages` are wanted beside Python and what a runtime needs.
    """
    packages_needed = sorted({*_PACKAGES, *packages})
    key = hashlib.sha256(f"1 {system} {packages_needed}".encode()).hexdigest()[:12]
    place = CACHE / f"{system.name}-{key}"
    if place.is_dir():
        return place
    program = tool("mmdebstrap", "mmdebstrap")
    if system.keyring and not Path(system.keyring).is_file():
        pytest.skip(f"Python {system.python} ({system.name}) can't be had here: there is no {system.keyring}")
    _ask(system)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{system.name}.") as folder:
        new = Path(folder) / "root"
        mode = "root" if os.geteuid() == 0 else "fakechroot"
        command = [program, "--quiet", f"--mode={mode}", "--arch=arm64", "--variant=extract", f"--hook-dir={_HOOKS}"]
        command += [f"--keyring={system.keyring}"] if system.keyring else []
        command += [f"--include={','.join(packages_needed)}", system.name, str(new), system.mirror]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": _SBIN, "TMPDIR": folder}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        _add_users(new)
        # The device files that root's mode makes: a board gets this machine's, and a copy of /dev/zero has no end.
        shutil.rmtree(new / "dev")
        (new / "dev").mkdir()
        try:
            new.rename(place)
        except OSError:
            assert place.is_dir()  # another run was faster
    return place


def _ask(system: System) -> None:
    """Skip where the mirror can't be reached, which is no fault of what is tested."""
    url = f"{system.mirror}/dists/{system.name}/InRelease"
    try:
        urllib.request.urlopen(url, timeout=20).close()  # noqa: S310 - one of three addresses above
    except (OSError, urllib.error.URLError) as error:
        pytest.skip(f"Python {system.python} ({system.name}) can't be had here: {url} doesn't answer ({error})")


def _add_users(root: Path) -> None:
    """What base-passwd's script does."""
    for name in ("passwd", "group"):
        shutil.copyfile(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
    rows = (root / "etc/passwd").read_text().splitlines()
    (root / "etc/shadow").write_text("".join(f"{row.partition(':')[0]}:*:19000:0:99999:7:::\n" for row in rows))
    (root / "etc/shadow").chmod(0o640)
