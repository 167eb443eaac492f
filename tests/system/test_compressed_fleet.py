"""Real processes on a real Mosquitto: updates in every codec arrive, count, and are as small as they should be."""

from pathlib import Path
from typing import Any

import pytest

from fedprune.output.tables import ignore_progress
from fedprune_server.maintenance.state_check import check_state
from fedprune_server.storage.storage import Storage
from support.processes.real_site import Site, job_config

pytestmark = pytest.mark.system

DEVICES = ("north", "south")


@pytest.mark.parametrize(
    ("setting", "down"), [("top-k:0.1", "int4"), pytest.param("int8", "int8", marks=pytest.mark.soak)]
)
def test_a_fleet_trains_with_what_travels_in_a_codec(material: Path, tmp_path: Path, setting: str, down: str) -> None:
    codecs: dict[str, Any] = {"compression": setting, "compression_down": down}
    config = job_config("compressed", rounds=2, density=0.9, recipe={"epochs": 2}, **codecs)
    with Site(material, tmp_path, config, DEVICES, 120, mosquitto=True) as site:
        site.start_all()
        state = site.finish_complete()
    for task in state.tasks.values():
        assert task.offer is not None
        assert task.update is not None
        assert task.offer.get("codec") == (None if setting == "none" else setting)
        size, plain = task.update["size"], task.offer["weights"]["size"]
        assert size == plain if setting == "none" else size < plain
        if down != "none":
            assert task.offer["coded"]["size"] < plain
            assert task.offer["held"]
    for device in state.devices.values():
        assert device.codecs
        assert (device.held is None) == (setting == "none")
    with Storage.open_existing(site.state) as storage:
        assert all(up > 0 for _, up in storage.traffic().values())
    assert [f for f in check_state(site.state, ignore_progress, running=False) if "log" in f.message] == []
