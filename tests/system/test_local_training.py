"""A model that is exported, trained without a server, checked, and predicts from whatever trains."""

from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.runtime.bundle import WEIGHTS, open_bundle
from fedprune_device.cli.main import main as device
from fedprune_export.cli.main import main as export
from fedprune_server.simulation.digits import digits_model, load_digits

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle at half of the channels, with all lower precisions."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "digits.onnx").write_bytes(digits_model())
    x, y = samples()
    np.savez(folder / "some.npz", x=x[:64], y=y[:64])
    more = ("--precision", "folded,float16,int8", "--data", str(folder / "some.npz"))
    words = [str(folder / "digits.onnx"), "--target", "raspberry-pi-5", "--density", "0.5", "--out", str(folder / "b")]
    assert export([*words, *more]) == ExitCode.OK
    return folder / "b"


def samples() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits()
    return x[:600], y[:600]


def test_a_folder_of_images_trains_and_is_predicted(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    for i, (x, y) in enumerate(zip(*samples(), strict=True)):
        path = tmp_path / "images" / str(y) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray((x[0] * 255).round().astype(np.uint8)).save(path)
    data, out = ["--data", str(tmp_path / "images")], tmp_path / "trained"

    assert device(["train", "--bundle", str(bundle), *data, "--out", str(out), "--epochs", "6"]) == ExitCode.OK
    said = capsys.readouterr().out
    assert export(["verify", str(out)]) == ExitCode.OK
    assert device(["predict", "--bundle", str(out), "--input", str(tmp_path / "images")]) == ExitCode.OK

    trained = open_bundle(out)
    assert trained.precisions == ("folded", "float16", "int8")
    assert trained.path(WEIGHTS).read_bytes() != open_bundle(bundle).path(WEIGHTS).read_bytes()
    after = next(line.split()[2].rstrip(",") for line in said.splitlines() if line.startswith("after: "))
    assert float(after) > 0.8
    assert f"accuracy {after} on" in capsys.readouterr().err  # the same test samples
