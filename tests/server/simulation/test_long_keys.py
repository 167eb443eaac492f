"""Keys that nobody knows are named in every file that people write, however long they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune_server.config.tables import parse_config
from fedprune_server.simulation.datasets.federation import DataPlan
from fedprune_server.simulation.fleet.virtual_device import read_devices
from fedprune_server.simulation.network_model import read_availability, read_dropouts, read_settings, read_weather
from fedprune_server.simulation.sweep import read_sweep

LONG = "k" * 100_000
FLEET = Path("fleet.toml")
TABLE = {LONG: 1}


def sweep(folder: Path) -> None:
    (folder / "sweep.toml").write_text(f"{LONG} = 1\n")
    read_sweep(folder / "sweep.toml")


@pytest.mark.parametrize(
    "read",
    [
        lambda _: parse_config(TABLE, "fleet.toml", Path()),
        lambda _: parse_config({"server": TABLE}, "fleet.toml", Path()),
        lambda _: DataPlan.from_dict({"source": "a", **TABLE}),
        lambda _: read_devices([TABLE], 0, FLEET),
        lambda _: read_weather({"weather": TABLE}, FLEET),
        lambda _: read_availability({"availability": TABLE}, FLEET),
        lambda _: read_dropouts({"dropouts": TABLE}, FLEET),
        lambda _: read_settings({"simulation": TABLE}, FLEET),
        sweep,
    ],
    ids=["tables", "server", "data", "devices", "weather", "availability", "dropouts", "simulation", "sweep"],
)
def test_long_keys_make_no_long_messages(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    assert "'kkk" in str(caught.value)
    assert len(str(caught.value)) < 1000
