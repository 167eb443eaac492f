"""The demo's data: 1,797 images of digits, split unevenly among the devices.

Images and labels are part of the package (`assets/README.md` names source and licence), so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune.core.metrics import TEST_SHARE
from fedprune.core.rng import keyed_generator
from fedprune_device.data.dataset import LocalData

CLASS_COUNT = 10
ALPHA = 0.5  # concentration of the Dirichlet shares: the smaller, the more uneven the split
SERVER_SHARE = 0.25  # share of all images on which the server evaluates the global model
CALIBRATION_SHARE = 0.05  # share on which the server measures batch-norm statistics; its labels are not used

_MAX_PIXEL = 16
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class Digits:
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.float32]
    devices: dict[str, LocalData]


def load_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """All images, float32 [1797, 1, 8, 8] from 0 to 1, and their labels."""
    with np.load(BytesIO(asset_bytes("digits.npz")), allow_pickle=False) as file:
        x, y = file["x"], file["y"]
    return (x.astype(np.float32) / _MAX_PIXEL)[:, None], y.astype(np.int64)


# The data set's name in reports.
DIGITS_TITLE = "handwritten digits, 8 × 8 (UCI)"


def digits_model() -> bytes:
    return asset_bytes("digits_net.onnx")


def deal_digits(devices: Sequence[str], *, seed: int = 0, alpha: float = ALPHA, min_samples: int = 0) -> Digits:
    """Split the digits among devices, with Dirichlet shares of each class (Hsu et al., arXiv:1909.06335).

    A fifth of each device's samples is its own test data. Raises `DataError` if there are too many devices for the
    images, or names repeat.

    Args:
        alpha: Concentration of the shares.
        min_samples: Minimum samples per device, test data included; half of a fair share by default. Splits are redrawn
            until it holds.
    """
    if not devices or len(set(devices)) != len(devices):
        raise DataError("devices to deal digits to", expected="one or more different names", got=list(devices))
    if not alpha > 0:
        raise DataError("alpha of the Dirichlet shares", expected="above 0", got=alpha)
    x, y = load_digits()
    server_order = keyed_generator(seed, "digits", "server").permutation(len(y))
    server_count = int(len(y) * SERVER_SHARE)
    reserved_count = server_count + int(len(y) * CALIBRATION_SHARE)
    server_rows, calibration_rows, device_rows = map(np.sort, np.split(server_order, [server_count, reserved_count]))
    min_samples = min_samples or len(device_rows) // (2 * len(devices))
    if min_samples < 2 or min_samples * len(devices) > len(device_rows):
        raise DataError(f"samples for {len(devices)} devices", expected="at least 2 for each", got=len(device_rows))
    hands = _draw_hands(y[device_rows], len(devices), seed, alpha, min_samples)
    return Digits(
        x[server_rows],
        y[server_rows],
        x[calibration_rows],
        {name: _device_data(x, y, device_rows[hand], seed, name) for name, hand in zip(devices, hands, strict=True)},
    )


def write_device_data(path: Path, data: LocalData) -> None:
    """Write a device's data as an `.npz` file for `fedprune-device --data`."""
    np.savez(path, x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)


def _draw_hands(
    labels: npt.NDArray[np.int64], devices: int, seed: int, alpha: float, min_samples: int
) -> list[npt.NDArray[np.int64]]:
    for attempt in range(_MAX_DRAWS):
        # Keyed by attempt: a split that is too uneven is drawn again, not mended, so that shares stay Dirichlet's.
        rng = keyed_generator(seed, "digits", "hands", attempt)
        pieces_by_device: list[list[npt.NDArray[Any]]] = [[] for _ in range(devices)]
        for label in range(CLASS_COUNT):
            rows = rng.permutation(np.flatnonzero(labels == label))
            cut_points = (np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * len(rows)).astype(np.int64)
            for device_pieces, class_rows in zip(pieces_by_device, np.split(rows, cut_points), strict=True):
                device_pieces.append(class_rows)
        hands = [np.sort(np.concatenate(device_pieces)) for device_pieces in pieces_by_device]
        if min(map(len, hands)) >= min_samples:
            return hands
    raise DataError(
        f"no hands with {min_samples} samples for each of {devices} devices in {_MAX_DRAWS} draws",
        hint="Take a larger alpha or fewer devices.",
    )


def _device_data(
    x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], seed: int, name: str
) -> LocalData:
    permutation = keyed_generator(seed, "digits", "own test", name).permutation(len(rows))
    test_count = max(1, round(len(rows) * TEST_SHARE))
    test, train = rows[np.sort(permutation[:test_count])], rows[np.sort(permutation[test_count:])]
    return LocalData(x[train], y[train], x[test], y[test])


def asset_bytes(name: str) -> bytes:
    """A file of the package's `assets`."""
    return (files("fedprune_server") / "assets" / name).read_bytes()
