"""What the daemon remembers of its devices doesn't grow with the rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedprune.coordination import State
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import Device, Phase, Progress, Task
from fedprune.planning import profile_store
from fedprune.planning.plan import plan
from fedprune.wire.messages import BlobRequest
from fedprune_server.devices.registry import DeviceRegistry, parameters
from support.fakes.tiny_job import ARCHITECTURE, JOB


def test_the_numbers_of_submodels_are_remembered_for_some_widths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedprune_server.devices.registry._WIDTHS", 2)
    state = State(model="m" * 64, devices={"a": Device(1, True, {"name": "pi"}, None, 10)})  # type: ignore[arg-type]
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)})
    sizes = ARCHITECTURE.sizes
    for cut in range(min(sizes)):
        widths = tuple(size - cut for size in sizes)
        state.devices["a"].widths = widths
        (row,) = registry.snapshot(0.0, True, {}).rows
        assert row.parameters == parameters(ARCHITECTURE, widths)
    assert registry._parameters.cache_info().currsize == 2
    state.devices["a"].widths = ()
    assert registry.snapshot(0.0, True, {}).rows[0].parameters == 0


def test_a_plan_that_devices_share_is_described_once(caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"a": ({"name": "pi"}, 10), "b": ({"name": "pi"}, 10), "c": ({"name": "nano"}, 20)}
    devices = {n: Device(1, True, profile, None, samples) for n, (profile, samples) in kinds.items()}
    for device in devices.values():
        device.widths, device.density = ARCHITECTURE.sizes, 1.0
    state = State(model="m" * 64, devices=devices)  # type: ignore[arg-type]
    registry = DeviceRegistry(replace(JOB, density=1.0), ARCHITECTURE, state, dict.fromkeys(devices, (0, 0)))
    with caplog.at_level("INFO", "fedprune.server"):
        for name in devices:
            registry.introduce(name)
            registry.introduce(name)
    first, line, *others = [r.getMessage() for r in caplog.records]
    assert first == "device a is connected: pi, 10 samples, ?"
    assert line.startswith("  density 1, as the ")
    assert others == ["device b is connected: pi, 10 samples, ?", "device c is connected: nano, 20 samples, ?"]


def test_a_plan_is_one_line_and_only_other_widths_are_another(caplog: pytest.LogCaptureFixture) -> None:
    board = profile_store.find("raspberry-pi-5")
    device = Device(1, True, board.to_dict(), None, 100)
    state = State(model="m" * 64, devices={"a": device})  # type: ignore[arg-type]
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)})
    with caplog.at_level("INFO", "fedprune.server"):
        for samples in (100, 200, 300):  # as its applications add some
            made = plan(ARCHITECTURE, board, JOB.recipe, samples)
            device.samples, device.plan, device.widths = samples, PackedJson(made.to_dict()), made.widths
            registry.introduce("a")
    assert len(caplog.records) == 2


def test_the_bytes_of_all_devices_are_summed_as_they_come() -> None:
    registry = DeviceRegistry(JOB, ARCHITECTURE, State(model="m" * 64), {"a": (5, 6), "b": (1, 2)})
    registry.admit("c", "1.0", 10)
    registry.sent("a", 4)
    registry.received("c", 3)
    registry.received("stranger", 9)
    assert registry.total == tuple(map(sum, zip(*registry.traffic.values(), strict=True))) == (10, 21)


@pytest.mark.parametrize("end", ["gone", "born"])
def test_pieces_of_a_transfer_that_is_over_are_not_missed(end: str) -> None:
    state = State(model="m" * 64, devices={"a": Device(1, True, {"name": "pi"}, None, 10)})  # type: ignore[arg-type]
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)})
    registry.admit("a", "test", 0)
    want = BlobRequest("b" * 64, "data", 0, 1)
    for now in (0.0, 5.0, 15.0):
        registry.note_request_to("a", want, now)
        registry.note_request_of("a", want, now)
    assert registry.drop_reasons().keys() == {"a"}
    if end == "gone":
        registry.gone("a")
    else:  # it lost its power, and its broker hasn't noticed yet
        registry.born("a", 2, "pi", 10, 20.0, connected=True)
    assert registry.drop_reasons() == {}


@pytest.mark.parametrize("message", ["counted", "counted in another job"])
def test_a_board_that_says_anything_is_no_longer_one_of_which_nothing_came(message: str) -> None:
    state = State(model="m" * 64, devices={"a": Device(1, True, {"name": "pi"}, None, 10)})  # type: ignore[arg-type]
    state.phase, state.tasks["a"] = Phase.TRAINING, Task(1, (3,), progress=Progress.OFFERED)
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)})
    registry.admit("a", "test", 0)
    registry.offered("a", 0.0)
    assert registry.silent(100.0, patience_s=60.0) == list(registry.silence_reasons()) == ["a"]

    if message == "counted":
        registry.received("a", 5)
    else:
        registry.note_message("a")

    assert registry.silence_reasons() == {}
