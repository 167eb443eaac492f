"""What the tests of boards with Arm processors share: wheels for them, fetched as a kit fetches them."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedprune_flash.kit import wheelhouse
from support.processes.arm_userland import BOOKWORM, CACHE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.arm64)


@pytest.fixture(autouse=True)
def sbin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mosquitto is, which is not on everybody's path."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture(scope="session")
def own_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fedprune's own wheel, built from this checkout."""
    return wheelhouse.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def broken_wheel() -> Path:
    """onnxruntime 1.21.0, alone in its folder: it takes instructions for granted that a Cortex-A53 and A72 lack.

    https://github.com/microsoft/onnxruntime/issues/23957
    """
    folder = CACHE / "onnxruntime-1.21.0"
    if not folder.is_dir():
        # Beside it first: what is cut off must not pass for the whole.
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            partial_folder = Path(place) / folder.name
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            command += [
                "-d",
                str(partial_folder),
                "--python-version",
                BOOKWORM.python,
                "--platform",
                "manylinux_2_28_aarch64",
            ]
            subprocess.run([*command, "onnxruntime==1.21.0"], check=True)
            with contextlib.suppress(OSError):  # another run was sooner
                partial_folder.rename(folder)
    (wheel,) = folder.glob("*.whl")
    return wheel
