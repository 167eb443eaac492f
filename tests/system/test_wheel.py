"""The wheel carries everything that it needs and works without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    # The environment's own (editable) fedprune comes later on the path than the unpacked wheel.
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *args], env=env, cwd=site, capture_output=True, text=True, check=False)


def test_packages_come_from_the_wheel(unpacked: Path) -> None:
    code = (
        "import fedprune, fedprune_export, fedprune_device, fedprune_flash, fedprune_server as s;"
        "print(*(m.__file__ for m in (fedprune, fedprune_export, fedprune_device, fedprune_flash, s)))"
    )
    done = run(unpacked, "-c", code)

    assert done.returncode == 0, done.stderr
    assert all(p.startswith(str(unpacked)) for p in done.stdout.split())


def test_profiles_are_inside(unpacked: Path) -> None:
    done = run(
        unpacked, "-c", "from fedprune_export.cli.main import main; import sys; sys.exit(main(['profiles', 'list']))"
    )

    assert done.returncode == 0, done.stderr
    for name in ("raspberry-pi-zero-2w", "raspberry-pi-4b", "raspberry-pi-5", "jetson-orin-nano", "generic-aarch64"):
        assert name in done.stdout


def test_every_file_of_the_packages_is_inside(unpacked: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wings = {"toolkit", "export", "device_runtime", "server"}
    expected = {str(Path(*Path(p).parts[1:])) for p in tracked if Path(p).parts[0] in wings}
    expected |= {f"fedprune/{p}" for p in tracked if p.startswith("hardware_profiles/")}
    inside = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}

    assert expected - inside == set()


def test_types_are_marked(unpacked: Path) -> None:
    for package in (
        "fedprune",
        "fedprune_start",
        "fedprune_export",
        "fedprune_device",
        "fedprune_flash",
        "fedprune_server",
    ):
        assert (unpacked / package / "py.typed").exists()
