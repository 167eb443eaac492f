"""A release as its maintainer makes it and as a user gets it: `make release-check`.

Needs Debian's mmdebstrap, and root or user namespaces.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3600)]

LOCKS = (ROOT / "deploy/locks/server.txt", ROOT / "device_runtime/fedprune_flash/kit/board_wheels.txt")
# Time zone and umask by the clone's folder.
CLONES = {"one": ("UTC", 0o022), "another/place": ("Asia/Tokyo", 0o077)}
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")

IN_USERLAND = """
set -eu
cd /release
sha256sum --check --quiet --ignore-missing SHA256SUMS
python3 -m venv /opt/fedprune
pip="/opt/fedprune/bin/pip --disable-pip-version-check"
mkdir /tmp/changed
cp wheels/paho_mqtt-*.whl /tmp/changed
printf x >>"$(echo /tmp/changed/*.whl)"
awk '/^paho-mqtt==/ {on = 1; print; next} on && /^ / {print; next} {on = 0}' server.txt >/tmp/changed/one.txt
if $pip install -q --no-index --no-deps --find-links /tmp/changed --require-hashes -r /tmp/changed/one.txt 2>/tmp/said
then echo 'a changed wheel was installed' >&2; exit 1; fi
grep -q 'DO NOT MATCH THE HASHES' /tmp/said
$pip install -q --no-index --find-links wheels --require-hashes -r server.txt -r board_wheels.txt -r own.txt
useradd --create-home user
runuser -u user -- env OMP_NUM_THREADS=1 /opt/fedprune/bin/fedprune-server demo --out /home/user/demo-run
"""


def run(*words: str | Path, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, umask: int = -1) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd, env={**os.environ, **(environment or {})}, umask=umask, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,  # where mmdebstrap puts what its hooks print
    )  # fmt: skip
    assert done.returncode == 0, f"{words[0]} ended with {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two releases of the latest commit, made in different places, time zones and umasks."""
    work, dist_folders = tmp_path_factory.mktemp("releases"), []
    for name, (zone, umask) in CLONES.items():
        folder = work / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        run("git", "clone", "-q", ROOT, folder, umask=umask)
        run("make", "release", f"PYTHON={sys.executable}", cwd=folder, environment={"TZ": zone}, umask=umask)
        dist_folders.append(folder / "dist")
    return dist_folders


def test_a_release_made_twice_has_the_same_bytes(releases: list[Path]) -> None:
    assert digests(releases[0]) == digests(releases[1])


@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed")
@pytest.mark.parametrize("suite", PYTHONS)
def test_a_release_is_installed_with_hashes_in_a_bare_debian_and_runs_the_demo(
    releases: list[Path], suite: str, tmp_path: Path
) -> None:
    """Offline, as a plain user; a wheel with one more byte is refused there."""
    release = tmp_path / "release"
    release.mkdir()
    platforms = [word for tag in GLIBC for word in ("--platform", f"{tag}_{platform.machine()}")]
    locks = [word for lock in LOCKS for word in ("-r", str(lock))]
    words = [sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "--require-hashes", "--no-deps"]
    run(*words, *platforms, "--python-version", PYTHONS[suite], "-d", release / "wheels", *locks)
    (wheel,) = releases[0].glob("fedprune-*.whl")
    for path in (wheel, *LOCKS, releases[0] / "SHA256SUMS"):
        shutil.copy(path, release)
    shutil.copy(wheel, release / "wheels")
    digest = digests(releases[0])[wheel.name]
    (release / "own.txt").write_text(f"fedprune[board,server]=={wheel.name.split('-')[1]} --hash=sha256:{digest}\n")
    (release / "install.sh").write_text(IN_USERLAND)
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3-venv", "--format=null"]
    command += [f"--customize-hook=copy-in {release} /", '--customize-hook=chroot "$1" sh /release/install.sh']
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    output = run(*command, suite, "/dev/null", environment={"PATH": path, "TMPDIR": str(tmp_path)})
    assert output.count("\nPASS: ") == 2
