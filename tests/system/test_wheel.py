"""The wheel carries everything that it needs and works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = out.glob("fedprune-*.whl")
    site = out / "site"
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


@pytest.mark.soak  # four builds; what `make release` says of its bytes is not for every push
def test_the_same_files_make_the_same_bytes_anywhere(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    made = []
    for name, umask, zone in (("one", 0o022, "UTC"), ("another/place", 0o077, "Asia/Tokyo")):
        folder = tmp_path / name
        for path in map(Path, tracked):
            if (ROOT / path).exists() and path.parts[0] not in (
                "tests",
                "benchmarks",
            ):  # they are many
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, folder / path)
                (folder / path).chmod((0o777 if os.access(ROOT / path, os.X_OK) else 0o666) & ~umask)
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "TZ": zone, "PYTHONHASHSEED": str(umask)}
        subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder)],
            check=True, capture_output=True, env=environment, umask=umask,
        )  # fmt: skip
        made.append({p.name: p.read_bytes() for p in (folder / "dist").iterdir()})
    assert sorted(n.rpartition(".")[2] for n in made[0]) == ["gz", "whl"]
    assert made[0] == made[1]
    (source,) = (n for n in made[0] if n.endswith(".gz"))
    command = ["tar", "-tzf", str(folder / "dist" / source)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    inside = {name.partition("/")[2] for name in listed.splitlines()}
    wanted = {p for p in tracked if (ROOT / p).exists() and Path(p).parts[0] not in ("tests", "benchmarks")}
    assert inside == wanted | {"PKG-INFO"}


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
