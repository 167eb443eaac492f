"""The container images, built without a registry and run: `make image-check`.

Their base is not the one that deploy/Dockerfile names but Debian 13 with its own Python, made from Debian's packages,
so that no registry is asked. The image of a server runs the demo as its own user and exports a bundle; the image of an
arm64 board, in an emulator, finds its hardware profile.

Needs root, and Debian's buildah, mmdebstrap, qemu-user-static and proot.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from benchmarks.synthetic_nets import setting, write
from support.paths import ROOT
from support.processes.arm_board import Board
from support.processes.arm_userland import TRIXIE, userland

TOOLS = {"buildah": "buildah", "mmdebstrap": "mmdebstrap", "qemu-aarch64-static": "qemu-user-static", "proot": "proot"}
BASE = "localhost/base"
PLATFORMS = {"server": "amd64", "board": "arm64"}

ON_SERVER = """
set -eu
cd /tmp
test "$(id -u)" = 10001
fedprune-server demo --quick --out demo >demo.txt
fedprune-export demo/model.onnx --target raspberry-pi-zero-2w --bytes-per-round 300000 --out bundle
"""


class Buildah:
    """Buildah with images and containers in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._own = ["--root", str(folder / "images"), "--runroot", str(folder / "run"), "--storage-driver", "overlay"]

    def __call__(self, *words: str | Path) -> str:
        done = subprocess.run(
            ["buildah", *self._own, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"buildah {words[0]} ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout.strip()

    @contextmanager
    def container(self, image: str, architecture: str) -> Iterator[tuple[str, Path]]:
        """A container of an image, and its mounted file system."""
        name = self("from", "--pull-never", "--arch", architecture, image)
        try:
            yield name, Path(self("mount", name))
        finally:
            self("rm", name)

    def add_base(self, architecture: str, files: Path) -> None:
        """Make an image of a folder or archive, and part of the base image for all platforms."""
        name = self("from", "--arch", architecture, "scratch")
        self("add", "--quiet", name, files, "/")
        self("config", "--arch", architecture, "--os", "linux", name)
        self("commit", "--quiet", "--rm", name, f"{BASE}-{architecture}")
        self("manifest", "add", "--arch", architecture, BASE, f"{BASE}-{architecture}")

    def build(self, target: str, pip_settings: Path) -> None:
        architecture = PLATFORMS[target]
        words = [
            "bud",
            "--isolation",
            "chroot",
            "--layers",
            "--pull-never",
            "--format",
            "docker",
            "-f",
            "deploy/Dockerfile",
        ]
        words += ["--target", target, "--platform", f"linux/{architecture}", "--build-arg", f"BASE={BASE}"]
        # Debian 12's Buildah has them in steps, but not in the lines that name a base.
        words += ["--build-arg", f"BUILDPLATFORM=linux/{PLATFORMS['server']}"]
        words += ["--build-arg", f"TARGETPLATFORM=linux/{architecture}"]
        # The machine's authorities and pip's settings, which may name a mirror.
        authorities = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        words += ["-v", f"{pip_settings}:/etc/pip.conf:ro", "-v", f"{authorities}:/run/authorities.pem:ro"]
        self(*words, "-t", f"fedprune-{target}", ".")


def megabytes(folder: Path) -> int:
    done = subprocess.run(["du", "-sm", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def run_server(buildah: Buildah) -> dict[str, Any]:
    """Run the demo in the server's image, as its user, and export a bundle."""
    with buildah.container("fedprune-server", PLATFORMS["server"]) as (name, root):
        size = {"all": megabytes(root), "fedprune and its packages": megabytes(root / "opt/fedprune")}
        said = buildah("run", "--isolation", "chroot", name, "--", "sh", "-c", ON_SERVER)
        rounds = re.findall(r"^rounds +(\d+) ", (root / "tmp/demo.txt").read_text(), re.MULTILINE)
    (plan,) = re.findall(r"^density .*", said, re.MULTILINE)
    return {"MB": size, "rounds of the demo": int(rounds[0]), "bundle": plan}


def run_board(buildah: Buildah) -> dict[str, Any]:
    """Find the profile of an emulated Cortex-A72 in the board's image."""
    with buildah.container("fedprune-board", PLATFORMS["board"]) as (_, root):
        size = {"all": megabytes(root), "fedprune and its packages": megabytes(root / "opt/fedprune")}
        config = json.loads(buildah("inspect", "--type", "image", "fedprune-board"))["Docker"]["config"]
        board = Board(root, environment=dict(row.split("=", 1) for row in config["Env"]))
        began = time.monotonic()
        done = board.run("/bin/sh", "-c", 'exec "$@"', "sh", *config["Entrypoint"], "identify")
    if done.returncode:
        raise SystemExit(
            f"the board's image ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return {"MB": size, "seconds": round(time.monotonic() - began), "profile": done.stdout.partition(":")[0]}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    server, board = result["server"], result["board"]
    lines = [
        "# Container images",
        "",
        f"{result['date']}, {result['cpu']}, {result['cores']} cores (load {result['load']} from neighbours at the",
        f"end), {result['system']}; Python {result['python']}, fedprune {result['fedprune']}, Buildah",
        f"{result['buildah']}. Written by `make image-check`.",
        "",
        "Built from `deploy/Dockerfile` by Buildah. The base was not `python:3.12-slim` but Debian 13 with its own",
        "Python 3.13, made from Debian's packages: no registry was asked.",
        "",
        "| image | platform | MB, unpacked | of these fedprune and its packages |",
        "|---|---|---:|---:|",
        *(_row(name, result[name]["MB"]) for name in PLATFORMS),
        "",
        f"- The server's image ran the demo for {server['rounds of the demo']} rounds as user 10001, and exported",
        f"  a bundle ({server['bundle']}).",
        f"- The board's image, on an emulated Cortex-A72, found its profile ({board['profile']}) in",
        f"  {board['seconds']} s. Nothing was trained in it.",
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, size: dict[str, int]) -> str:
    return f"| {name} | linux/{PLATFORMS[name]} | {size['all']} | {size['fedprune and its packages']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "images.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "image-check")
    arguments = parser.parse_args()
    for name, package in TOOLS.items():
        if shutil.which(name) is None:
            raise SystemExit(f"{name} is not installed (apt install {package})")
    if os.geteuid():
        raise SystemExit("images are built by root here: Buildah mounts their files")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    )
    index = f"index-url = {settings.stdout.strip()}\n" if settings.returncode == 0 else ""
    (work / "pip.conf").write_text(f"[global]\ncert = /run/authorities.pem\ntimeout = 120\n{index}")
    buildah = Buildah(work)
    buildah("manifest", "create", BASE)
    archive = work / "base.tar"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3-venv", TRIXIE.name, str(archive)], check=True
    )
    buildah.add_base(PLATFORMS["server"], archive)
    buildah.add_base(PLATFORMS["board"], userland(TRIXIE))
    for target in PLATFORMS:
        buildah.build(target, work / "pip.conf")
    result = {
        **setting(),
        "buildah": buildah("--version").split()[2],
        "server": run_server(buildah),
        "board": run_board(buildah),
    }
    buildah("rmi", "--all", "--force")
    shutil.rmtree(work)
    write(arguments.output, result, page(result))


if __name__ == "__main__":
    main()
