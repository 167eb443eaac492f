"""The files of a fleet to begin with: samples, a model, a profile per board, a strategy and `fleet.toml`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError
from fedprune.planning import profile_store
from fedprune.wire.topics import check_device
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.digits import asset_bytes, deal_digits, digits_model, write_device_data

FLEET_FILE, STRATEGY_FILE = "fleet.toml", "my_strategy.py"

_SERVER_FILES = ("server", "calibration")  # files of the server's own samples, whose names no board may have

_FLEET_TEMPLATE = """\
# A fleet to begin with: change what is yours. Paths count from this file's folder.
#     fedprune-simulate --config fleet.toml --out run     the boards on a virtual clock
#     fedprune-server run --config fleet.toml             the same job on real boards (it looks at no [[devices]])
# docs/reference/settings.md and docs/simulate.md explain every key, docs/write-a-strategy.md my_strategy.py.

[job]
name = "{name}"
strategy = "fedprune"              # or another of docs/strategies, or, started in this folder, my_strategy:energy
seed = {seed}
rounds = 12
devices = {devices}

[job.recipe]
epochs = 2
lr = 0.03

[model]
path = "model.onnx"                # or a torch module: "package.module:factory", with input_shape

[evaluation]
data = "server.npz"                # arrays x and y

[calibration]
data = "calibration.npz"           # an array x

# A row per board: its hardware profile (edit it), and its samples: arrays x_train, y_train, x_test, y_test.
"""

_DEVICE_TEMPLATE = """
[[devices]]
name = "{name}"
profile = "profiles/{name}.toml"
data = "{name}.npz"
"""


@dataclass(frozen=True)
class StarterBoard:
    """A board of the fleet.

    Attributes:
        name: Its name in the fleet.
        profile: The shipped hardware profile that its own is a copy of.
        round_bytes: What its link carries in a round; 0 for the profile's figure.
    """

    name: str
    profile: str
    round_bytes: int = 0

    def own_profile(self) -> str:
        """The shipped profile under the board's name, as TOML. Raises `ProfileError` if it is missing."""
        name = profile_store.find_profile(self.profile).name
        text = (profile_store.shipped_profiles_folder() / f"{name}.toml").read_text("utf-8")
        # Lines are replaced rather than parsed and written: the copy keeps the profile's comments and sources.
        text = re.sub(r"(?m)^name = .*", f'name = "{self.name}"', text, count=1)
        if self.round_bytes:
            text = re.sub(r"(?m)^bytes_per_round = .*", f"bytes_per_round = {self.round_bytes:_}", text, count=1)
        return text


# Boards whose links carry models of different widths: the whole one takes 760 kB, down and up.
STARTER_BOARDS = (
    StarterBoard("attic", "raspberry-pi-zero-2w", 40_000),
    StarterBoard("yard", "raspberry-pi-4b", 150_000),
    StarterBoard("dock", "jetson-orin-nano", 1_000_000),
)


def write_starter(folder: Path, boards: Sequence[StarterBoard], seed: int = 0) -> dict[str, LocalData]:
    """Write a fleet's files into a folder; returns the boards' samples by name.

    The bundled digits are dealt out: every board has its own mixture of classes, and the server some of its own.

    Raises:
        ConfigError: A board's name is not valid, or there is something in the folder.
        ProfileError: There is no such hardware profile.
        DataError: Names repeat, or there are too many boards for the digits.
        StorageError: The folder can't be written.
    """
    for board in boards:
        if check_device(board.name, "boards", error=ConfigError) in _SERVER_FILES:
            raise ConfigError("boards", expected="names other than " + " and ".join(_SERVER_FILES), got=board.name)
    profiles = {board.name: board.own_profile() for board in boards}
    hands = deal_digits([board.name for board in boards], seed=seed)
    with storage_errors(f"can't write {folder}"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} holds something already",
                expected="an empty folder, or a new one",
                hint="Choose another name: fedprune-simulate new DIR.",
            )
        (folder / "profiles").mkdir(parents=True)
        (folder / "model.onnx").write_bytes(digits_model())
        evaluation, calibration = _SERVER_FILES
        np.savez(folder / f"{evaluation}.npz", x=hands.x, y=hands.y)
        np.savez(folder / f"{calibration}.npz", x=hands.calibration)
        for name, hand in hands.devices.items():
            write_device_data(folder / f"{name}.npz", hand)
            (folder / "profiles" / f"{name}.toml").write_text(profiles[name], "utf-8")
        (folder / STRATEGY_FILE).write_bytes(asset_bytes(STRATEGY_FILE))
        job = re.sub(r"[^a-z0-9-]+", "-", folder.resolve().name.lower()).strip("-")[:64] or "fleet"
        fleet = _FLEET_TEMPLATE.format(name=job, seed=seed, devices=len(boards))
        devices = "".join(_DEVICE_TEMPLATE.format(name=board.name) for board in boards)
        (folder / FLEET_FILE).write_text(fleet + devices, "utf-8")
    return hands.devices
