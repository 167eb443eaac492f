"""The container images, built without a registry and run: `make image-check`.

Their base is not the one that deploy/Dockerfile names but Debian 13 with its own Python, made from Debian's packages,
so that no registry is asked. Needs root, and Debian's buildah, mmdebstrap, qemu-user-static and proot.
"""

import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.paths import ROOT
from support.processes.arm_board import Board
from support.processes.arm_userland import TRIXIE, userland

MISSING = [n for n in ("buildah", "mmdebstrap", "qemu-aarch64-static", "proot") if shutil.which(n) is None]
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Buildah mounts images' files as root"),
]

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
        assert done.returncode == 0, f"buildah {words[0]}: {(done.stdout + done.stderr)[-3000:]}"
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
        words = ["bud", "--isolation", "chroot", "--layers", "--pull-never", "--format", "docker"]
        words += ["-f", "deploy/Dockerfile"]
        words += ["--target", target, "--platform", f"linux/{architecture}", "--build-arg", f"BASE={BASE}"]
        # Debian 12's Buildah has them in steps, but not in the lines that name a base.
        words += ["--build-arg", f"BUILDPLATFORM=linux/{PLATFORMS['server']}"]
        words += ["--build-arg", f"TARGETPLATFORM=linux/{architecture}"]
        # The machine's authorities and pip's settings, which may name a mirror.
        authorities = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        words += ["-v", f"{pip_settings}:/etc/pip.conf:ro", "-v", f"{authorities}:/run/authorities.pem:ro"]
        self(*words, "-t", f"fedprune-{target}", ".")


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """Buildah with both images."""
    work = tmp_path_factory.mktemp("images")
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    settings = subprocess.run(asked, capture_output=True, text=True, check=False)
    index = f"index-url = {settings.stdout.strip()}\n" if settings.returncode == 0 else ""
    (work / "pip.conf").write_text(f"[global]\ncert = /run/authorities.pem\ntimeout = 120\n{index}")
    images, archive = Buildah(work), work / "base.tar"
    images("manifest", "create", BASE)
    debian = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3-venv", TRIXIE.name, str(archive)]
    subprocess.run(debian, check=True)
    images.add_base(PLATFORMS["server"], archive)
    images.add_base(PLATFORMS["board"], userland(TRIXIE))
    for target in PLATFORMS:
        images.build(target, work / "pip.conf")
    yield images
    images("rmi", "--all", "--force")


def test_the_servers_image_runs_the_demo_as_its_user_and_exports_a_bundle(buildah: Buildah) -> None:
    with buildah.container("fedprune-server", PLATFORMS["server"]) as (name, root):
        output = buildah("run", "--isolation", "chroot", name, "--", "sh", "-c", ON_SERVER)
        assert json.loads((root / "tmp/demo/metrics.json").read_text())["rounds"]
    assert "density " in output


def test_the_boards_image_finds_the_profile_of_an_emulated_board(buildah: Buildah) -> None:
    with buildah.container("fedprune-board", PLATFORMS["board"]) as (_, root):
        config = json.loads(buildah("inspect", "--type", "image", "fedprune-board"))["Docker"]["config"]
        board = Board(root, environment=dict(row.split("=", 1) for row in config["Env"]))
        done = board.run("/bin/sh", "-c", 'exec "$@"', "sh", *config["Entrypoint"], "identify")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("generic-aarch64:")
