"""A release as its maintainer makes it and as a user gets it: `make release-check`.

Two clones of the latest commit, in different places, time zones and umasks, make a release each; all files must be the
same bytes. Then the wheel is installed in bare Debian userlands, offline, with a sha256 for every package, and runs the
demo as a plain user. A wheel with one more byte must be refused there.

Needs Debian's mmdebstrap, and root or user namespaces.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.synthetic_nets import setting, write

ROOT = Path(__file__).resolve().parents[1]
LOCKS = (ROOT / "deploy/locks/server.txt", ROOT / "device_runtime/fedprune_flash/kit/board_wheels.txt")
"""What the demo needs: the packages of a server and of a board."""

CLONES = {"one": ("UTC", 0o022), "another/place": ("Asia/Tokyo", 0o077)}
"""Time zone and umask by the clone's folder."""

SYSTEMS = {"bookworm": ("Debian 12", "3.11"), "trixie": ("Debian 13", "3.13")}
"""Name and Python by the suite."""

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
began=$(date +%s)
$pip install -q --no-index --find-links wheels --require-hashes -r server.txt -r board_wheels.txt -r own.txt
echo "installed in $(($(date +%s) - began)) s"
$pip --version
python3 --version
echo "packages $($pip list --format freeze | grep -vc -e ^pip= -e ^setuptools=)"
useradd --create-home user
began=$(date +%s)
runuser -u user -- env OMP_NUM_THREADS=1 /opt/fedprune/bin/fedprune-server demo --out /home/user/demo-run
echo "demo in $(($(date +%s) - began)) s"
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*words: str | Path, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, umask: int = -1) -> str:
    """Run a command to its end and return its output; end with the last of it if it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd, env={**os.environ, **(environment or {})}, umask=umask, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,  # where mmdebstrap puts what its hooks print
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def release(folder: Path, commit: str, zone: str, umask: int) -> dict[str, str]:
    """Make a release of a commit in a fresh clone; returns its files' sha256 by name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    run("git", "clone", "-q", ROOT, folder, umask=umask)
    run("git", "checkout", "-q", commit, cwd=folder, umask=umask)
    run("make", "release", f"PYTHON={sys.executable}", cwd=folder, environment={"TZ": zone}, umask=umask)
    return {path.name: sha256(path) for path in sorted((folder / "dist").iterdir())}


def wheelhouse(folder: Path, python: str) -> None:
    """Fetch the wheels of the lock files for a Python."""
    platforms = [word for tag in GLIBC for word in ("--platform", f"{tag}_{platform.machine()}")]
    words = [sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "--require-hashes", "--no-deps"]
    locks = [word for lock in LOCKS for word in ("-r", str(lock))]
    run(*words, *platforms, "--python-version", python, "-d", folder, *locks)


def bare_debian(suite: str, dist: Path, work: Path) -> dict[str, Any]:
    """Install a release in a fresh userland of a suite and run the demo there; returns what it printed about both."""
    name, python = SYSTEMS[suite]
    given = work / suite / "release"
    given.mkdir(parents=True)
    wheelhouse(given / "wheels", python)
    (wheel,) = dist.glob("fedprune-*.whl")
    for path in (wheel, *LOCKS, dist / "SHA256SUMS"):
        shutil.copy(path, given / "wheels" if path is wheel else given)
    shutil.copy(wheel, given)
    own = f"fedprune[board,server]=={wheel.name.split('-')[1]} --hash=sha256:{sha256(wheel)}\n"
    (given / "own.txt").write_text(own)
    (given / "install.sh").write_text(IN_USERLAND)
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3-venv", "--format=null"]
    command += [f"--customize-hook=copy-in {given} /", '--customize-hook=chroot "$1" sh /release/install.sh']
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    said = run(*command, suite, "/dev/null", environment={"PATH": path, "TMPDIR": str(work)})
    shutil.rmtree(work / suite)
    numbers = {what: int(found) for what, found in re.findall(r"^(installed|demo) in (\d+) s$", said, re.MULTILINE)}
    (packages,) = re.findall(r"^packages (\d+)$", said, re.MULTILINE)
    (demo,) = re.findall(r"^ +fedprune +FedAvg +difference\n.*^PASS: .*?$", said, re.MULTILINE | re.DOTALL)
    return {
        "system": name,
        "python": re.findall(r"^Python (.*)$", said, re.MULTILINE)[0],
        "pip": re.findall(r"^pip (\S+)", said, re.MULTILINE)[0],
        "packages": int(packages),
        "seconds": numbers,
        "demo": demo.splitlines(),
    }


def page(result: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = [
        "# A release, made twice and installed",
        "",
        f"{result['date']}, commit {result['commit'][:12]}, {result['cpu']}, {result['cores']} cores (load",
        f"{result['load']} from neighbours at the end), {result['system']}; Python {result['python']}, fedprune",
        f"{result['fedprune']}. Written by `make release-check`.",
        "",
        "Two clones of the commit, in different folders, time zones and umasks, made a release each. The files were",
        "the same bytes:",
        "",
        "| file | sha256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in result["files"].items()),
        "",
        "The wheel was installed in bare userlands of Debian (minbase and `python3-venv`), without a network, with a",
        "sha256 for every package, and a plain user ran the demo. pip refused a wheel with one byte more.",
        "",
        "| system | Python | pip | packages | installed in | demo in |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in result["userlands"]:
        seconds = row["seconds"]
        lines.append(
            f"| {row['system']} | {row['python']} | {row['pip']} | {row['packages']} | {seconds['installed']} s "
            f"| {seconds['demo']} s |"
        )
    for row in result["userlands"]:
        lines += ["", f"The demo on {row['system']}:", "", "```text", *row["demo"], "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "release.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "release-check")
    arguments = parser.parse_args()
    if shutil.which("mmdebstrap") is None:
        raise SystemExit("mmdebstrap is not installed (apt install mmdebstrap)")
    work = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    commit = run("git", "rev-parse", "HEAD").strip()
    made = {name: release(work / name, commit, zone, umask) for name, (zone, umask) in CLONES.items()}
    one, other = made.values()
    if one != other:
        raise SystemExit(f"the releases differ: {json.dumps(made, indent=1)}")
    print(f"the same bytes twice: {', '.join(one)}", flush=True)
    userlands = [bare_debian(suite, work / "one" / "dist", work) for suite in SYSTEMS]
    result = {**setting(), "commit": commit, "files": one, "userlands": userlands}
    shutil.rmtree(work)
    write(arguments.output, result, page(result))


if __name__ == "__main__":
    main()
