"""What goes wrong for users ends in one clear line with a documented exit code, in the real commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.simulation.digits import deal_digits, digits_model, write_device_data
from support.processes import machine

pytestmark = pytest.mark.system


def run(command: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of our commands as a user does."""
    program = Path(sys.executable).with_name(command)
    return subprocess.run(
        [str(program), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "FEDPRUNE_DEBUG"},
    )


def expect(done: subprocess.CompletedProcess[str], code: ExitCode, *words: str) -> None:
    """The command failed with this code, in one error line that has these words, and without a traceback."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "digits.onnx"
    path.write_bytes(digits_model())
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "a.npz"
    write_device_data(path, deal_digits(["a", "b", "c"], seed=0).devices["a"])
    return path


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    done = run("fedprune-export", model, "--target", "raspberry-pi-4b", "--density", "0.5", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((2, 1, 8, 8), np.float32))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    with machine.small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_wrong_model_file(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    done = run("fedprune-export", bad, "--target", "raspberry-pi-4b", "--out", tmp_path / "out")

    expect(done, ExitCode.MODEL, "bad.onnx")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_whole_bundle_predicts(bundle: Path, images: Path) -> None:
    done = run("fedprune-device", "predict", "--bundle", bundle, "--input", images)

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_a_truncated_bundle(bundle: Path, images: Path) -> None:
    path = bundle / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = run("fedprune-device", "predict", "--bundle", bundle, "--input", images)

    expect(done, ExitCode.BUNDLE, path.name, "expected", "got")


def test_a_full_disk_at_export(model: Path, small_disk: Path) -> None:
    done = run("fedprune-export", model, "--target", "raspberry-pi-4b", "--out", small_disk / "bundle")

    expect(done, ExitCode.STORAGE_FULL)
    assert not (small_disk / "bundle").exists()


def test_a_full_disk_at_the_server(model: Path, small_disk: Path) -> None:
    done = run("fedprune-server", "run", "--insecure", "--model", model, "--state", small_disk / "state", "--port", "0")

    expect(done, ExitCode.STORAGE_FULL)


def test_a_broker_that_a_device_cannot_reach(data: Path, tmp_path: Path) -> None:
    closed_port = machine.free_port()
    url = f"mqtt://127.0.0.1:{closed_port}"
    args = ["--device", "a", "--data", data, "--state", tmp_path / "state", "--no-probe"]
    done = run("fedprune-device", "run", "--insecure", "--broker", url, *args, "--profile", "generic-x86-64")

    expect(done, ExitCode.BROKER, "127.0.0.1", str(closed_port))
