"""Models of several kinds that are exported and trained by a board's program on files as they are."""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.model.recipe import Recipe
from fedprune_device.cli.main import main as device
from fedprune_export.cli.main import main as export
from support.fakes.sample_files import wav

pytestmark = [pytest.mark.system, pytest.mark.torch]

MB = 2**20
BATCH = Recipe().batch_size
TRAIN = """
import resource, sys
from fedprune_device.cli.main import main
if int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
code = main(sys.argv[2:])
print("".join(line for line in open("/proc/self/status") if line.startswith(("VmHWM", "VmPeak"))))
sys.exit(code)
"""


def bundle(out: Path, net: str, *more: str) -> Path:
    assert export([f"support.nets.file_nets:{net}", "--target", "raspberry-pi-5", "--out", str(out), *more]) == 0
    return out


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("PIL.Image").fromarray(pixels.astype(np.uint8)).save(path)


def masks(root: Path) -> None:
    """Squares on noise, whose masks have an edge that counts for nothing."""
    rng = np.random.default_rng(0)
    for n in range(60):
        pixels, classes = rng.integers(0, 60, (16, 12, 3)), np.zeros((16, 12))
        kind, (top, left) = n % 2, rng.integers(0, 6, 2)
        classes[top : top + 8, left : left + 6] = 255
        classes[top + 1 : top + 7, left + 1 : left + 5] = 1 + kind
        pixels[top : top + 8, left : left + 6, kind] += 190
        picture(root / "images" / f"{n}.png", pixels)
        picture(root / "masks" / f"{n}.png", classes)


def boxes(root: Path) -> None:
    """Where a bright square is."""
    rng = np.random.default_rng(0)
    (root / "labels").mkdir(parents=True)
    for n in range(120):
        pixels, (top, left) = rng.integers(0, 60, (16, 12, 3)), rng.integers(0, 6, 2)
        pixels[top : top + 8, left : left + 6] += 190
        picture(root / "images" / f"{n}.png", pixels)
        box = (left + 3) / 12, (top + 4) / 16, 6 / 12, 8 / 16
        (root / "labels" / f"{n}.txt").write_text("0 " + " ".join(map(str, box)) + "\n")


def table(root: Path) -> None:
    """Two waves of one length."""
    root.mkdir()
    with (root / "waves.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["time", "sine", "cosine"])
        out.writerows([n, np.sin(n / 5), np.cos(n / 5)] for n in range(1500))


@pytest.mark.parametrize(
    ("net", "write", "source", "words"),
    [
        ("painter", masks, "", ("--set", "ignore_label=255")),
        ("finder", boxes, "", ("--loss", "support.nets.file_nets:box_loss")),
        ("forecaster", table, "waves.csv", ("--labels", "values")),
    ],
)
def test_a_model_learns_from_files(
    net: str,
    write: Callable[[Path], None],
    source: str,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, data, out = bundle(tmp_path / "bundle", net, *words), str(tmp_path / "data" / source), tmp_path / "out"
    write(tmp_path / "data")
    capsys.readouterr()
    command = ["train", "--bundle", str(made), "--data", data, "--out", str(out), "--epochs", "20", "--seed", "1"]
    assert device(command) == ExitCode.OK
    said = capsys.readouterr().out
    before, after = (
        float(next(line for line in said.splitlines() if line.startswith(when)).rpartition("loss ")[2])
        for when in ("before: ", "after: ")
    )
    assert after < 0.5 * before
    assert device(["predict", "--bundle", str(out), "--input", data]) == ExitCode.OK
    judged = capsys.readouterr().err
    assert ("accuracy" in judged) == (net == "painter")
    assert ("root of the mean squared error" in judged) == (net == "forecaster")


def pictures(root: Path, count: int) -> None:
    """PNG and JPEG in turn."""
    from PIL import Image

    root.mkdir()
    rng = np.random.default_rng(0)
    for n in range(count):
        name, how = (f"{n}.jpg", {"quality": 90}) if n % 2 else (f"{n}.png", {"compress_level": 0})
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(root / name, **how)


def recordings(root: Path, count: int, least: int = 16_000) -> None:
    rng = np.random.default_rng(0)
    for n in range(count):
        length = int(rng.integers(least, 16_001))
        (root / str(n % 2)).mkdir(parents=True, exist_ok=True)
        (root / str(n % 2) / f"{n}.wav").write_bytes(wav(rng.integers(-9999, 9999, length).astype("<i2").tobytes()))


def rows(root: Path, count: int) -> None:
    """A table with as many windows of 2,000 rows and the row that follows, none of which is across two blocks."""
    length, blocks = 0, 0
    while count > 0:  # a block has a fifth of the windows before it, from 2 to 8
        size = min(8, max(2, blocks // 5))
        windows = min(count, size * 2001 - 2000)
        length += windows + 2000
        count, blocks = count - windows, blocks + size
    waves = np.arange(length) / 5
    root.mkdir()
    (root / "set.csv").write_text("sine,cosine\n" + "".join(f"{np.sin(t):.4f},{np.cos(t):.4f}\n" for t in waves))


def pairs(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    sound, view = rng.random((count, 1, 8000), np.float32), rng.random((count, 3, 32, 32), np.float32)
    save(root, sound=sound, view=view, y=rng.integers(0, 2, count))


def texts(root: Path, count: int) -> None:
    """Token ids, and a class for each."""
    rng = np.random.default_rng(0)
    x, lengths = rng.integers(0, 50, (count, 1000), np.int32), rng.integers(1, 1001, count)
    root.mkdir()
    np.savez_compressed(root / "packed.npz", x=x, y=(x % 3).astype(np.uint8), lengths=lengths)


def save(root: Path, **found: np.ndarray) -> None:
    root.mkdir()
    np.savez(root / "set.npz", **found)


@pytest.mark.parametrize(
    ("net", "write", "source", "numbers", "words"),
    [
        pytest.param("autoencoder", pictures, "", 3 * 96 * 96, ("--labels", "values"), marks=pytest.mark.soak),
        pytest.param("listener", recordings, "", 16_000, (), marks=pytest.mark.soak),
        pytest.param("gathered", partial(recordings, least=400), "", 16_000, (), marks=pytest.mark.soak),
        ("seer", rows, "set.csv", 2 * 2001, ("--labels", "values")),
        ("pair", pairs, "set.npz", 8000 + 3 * 32 * 32, ()),
        pytest.param("tagger", texts, "packed.npz", 2 * 1000, ("--set", "ignore_label=-1"), marks=pytest.mark.soak),
    ],
)
@pytest.mark.at_push(1)
def test_a_set_ten_times_as_large_as_its_memory_trains_in_it(
    net: str, write: Callable[[Path, int], None], source: str, numbers: int, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Memory is what a set of a hundred samples takes, and the limit, which the kernel enforces for addresses."""
    limit = 12 * MB
    many = 10 * limit // (4 * numbers)
    made = bundle(tmp_path / "bundle", net, *words)
    peaks: dict[int, int] = {}
    room = 0  # no limit
    for count in (100, many):
        folder = tmp_path / f"data{count}"
        write(folder, count)
        command = ["train", "--bundle", made, "--data", folder / source, "--out", tmp_path / f"out{count}"]
        more = ["--threads", "1", "--epochs", "1", "--samples-most", str(many)]
        run = subprocess.run(
            [sys.executable, "-c", TRAIN, str(room), *map(str, command), *more],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr
        assert "left out" not in run.stderr
        training, testing = map(int, re.findall(r"([\d,]+) (?:training|test) samples?", run.stdout.replace(",", "")))
        assert training + testing == count
        assert f"trained: {-(-training // BATCH)} steps" in run.stdout
        kilobytes = dict(re.findall(r"(VmHWM|VmPeak):\s+(\d+)", run.stdout))
        peaks[count], room = 1024 * int(kilobytes["VmHWM"]), 1024 * int(kilobytes["VmPeak"]) + limit
    assert peaks[many] - peaks[100] < limit
