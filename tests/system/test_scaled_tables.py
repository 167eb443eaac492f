"""A model trained on numbers as measured is the one that is trained on scaled ones, and predicts as measured."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.runtime.bundle import open_bundle
from fedprune_device.cli.main import main as device
from fedprune_export.cli.main import main as export

pytestmark = [pytest.mark.system, pytest.mark.torch]

NET = "support.nets.file_nets:forecaster"
PLACE, SPREAD = np.array([21.5, 1013.0]), np.array([4.0, 0.5])


def write(path: Path, rows: Any) -> Path:
    path.write_text("Heat,Pressure\n" + "".join(f"{a:.5f},{b:.5f}\n" for a, b in rows))
    return path


@pytest.mark.parametrize("scaling", ["board", "heat:21.5:4,pressure:1013:0.5"])
def test_a_table_is_scaled_for_the_model_and_its_predictions_back(
    scaling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = np.sin(np.arange(800)[:, None] / 5 + np.array([0, np.pi / 2])) * np.sqrt(2)
    tables = {
        "scaled": write(tmp_path / "scaled.csv", scaled),
        "raw": write(tmp_path / "raw.csv", scaled * SPREAD + PLACE),
    }
    outputs, found = {}, {}
    for name, path in tables.items():
        bundle, out, values = (tmp_path / f"{name}{kind}" for kind in ("", ".out", ".npy"))
        words = ["--set", f"scaling={scaling}"] if name == "raw" else []
        made = export([NET, "--target", "raspberry-pi-5", "--out", str(bundle), "--labels", "values", *words])
        assert made == ExitCode.OK
        capsys.readouterr()
        command = ["train", "--bundle", str(bundle), "--data", str(path), "--out", str(out), "--epochs", "3"]
        assert device(command) == ExitCode.OK
        losses = re.findall(r"^(?:before|after): .*loss ([0-9.e+-]+)", capsys.readouterr().out, re.MULTILINE)
        found[name] = [float(number) for number in losses]
        command = ["predict", "--bundle", str(out), "--input", str(path), "--output", str(values), "--split", "test"]
        assert device(command) == ExitCode.OK
        outputs[name] = np.load(values)
    tolerance = 0.05 if scaling == "board" else 1e-3  # its mean and deviation are those of its training samples
    np.testing.assert_allclose(found["raw"], found["scaled"], atol=tolerance)
    np.testing.assert_allclose((outputs["raw"] - PLACE) / SPREAD, outputs["scaled"], atol=2 * tolerance)
    kept = open_bundle(tmp_path / "raw.out").recipe.scaling
    assert [entry.split(":")[0] for entry in kept] == ["heat", "pressure"]


def test_a_bundle_without_the_boards_scale_predicts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", np.ones((50, 2)))
    words = ["--labels", "values", "--set", "scaling=board"]
    assert export([NET, "--target", "raspberry-pi-5", "--out", str(tmp_path / "b"), *words]) == ExitCode.OK
    assert device(["predict", "--bundle", str(tmp_path / "b"), "--input", str(path)]) != ExitCode.OK
    assert "--state" in capsys.readouterr().err
