"""What the daemon remembers of its devices doesn't grow with the rounds."""

from __future__ import annotations

import pytest

from fedprune.coordination import State
from fedprune.jobs.state import DeviceTask, JobDevice, Phase, Progress
from fedprune.wire.messages import BlobRequest
from fedprune_server.devices.registry import DeviceRegistry
from support.fakes.tiny_job import ARCHITECTURE, JOB


def test_the_bytes_of_all_devices_are_summed_as_they_come() -> None:
    registry = DeviceRegistry(JOB, ARCHITECTURE, State(model="m" * 64), {"a": (5, 6), "b": (1, 2)})
    registry.admit("c", "1.0", 10)
    registry.count_sent("a", 4)
    registry.count_received("c", 3)
    registry.count_received("stranger", 9)
    assert registry.total_traffic == tuple(map(sum, zip(*registry.traffic.values(), strict=True))) == (10, 21)


@pytest.mark.parametrize("end", ["gone", "born"])
def test_pieces_of_a_transfer_that_is_over_are_not_missed(end: str) -> None:
    state = State(model="m" * 64, devices={"a": JobDevice(1, True, {"name": "pi"}, None, 10)})  # type: ignore[arg-type]
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)})
    registry.admit("a", "test", 0)
    want = BlobRequest("b" * 64, "data", 0, 1)
    for now in (0.0, 5.0, 15.0):
        registry.transfers.note_upload_request("a", want, now)
        registry.transfers.note_download_request("a", want, now)
    assert registry.transfers.drop_reasons().keys() == {"a"}
    if end == "gone":
        registry.note_disconnect("a")
    else:  # it lost its power, and its broker hasn't noticed yet
        registry.note_birth("a", 2, "pi", 10, 20.0, connected=True)
    assert registry.transfers.drop_reasons() == {}


@pytest.mark.parametrize("message", ["counted", "counted in another job"])
def test_a_board_that_says_anything_is_no_longer_one_of_which_nothing_came(message: str) -> None:
    state = State(model="m" * 64, devices={"a": JobDevice(1, True, {"name": "pi"}, None, 10)})  # type: ignore[arg-type]
    state.phase, state.tasks["a"] = Phase.TRAINING, DeviceTask(1, (3,), progress=Progress.OFFERED)
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)})
    registry.admit("a", "test", 0)
    registry.note_offer("a", 0.0)
    assert registry.take_silent(100.0, patience_s=60.0) == list(registry.silence_reasons()) == ["a"]

    if message == "counted":
        registry.count_received("a", 5)
    else:
        registry.note_message("a")

    assert registry.silence_reasons() == {}
