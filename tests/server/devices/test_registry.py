"""What the daemon remembers of its devices doesn't grow with the rounds."""

from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.coordination import State
from fedprune.jobs.state import DeviceTask, JobDevice, Phase, Progress
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.messages import BlobRequest, Offer
from fedprune.wire.topics import Topics
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.transfer.downloads import Downloads
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
    now = [0.0]
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)}, listening=lambda: now[0])
    registry.admit("a", "test", 0)
    want = BlobRequest("b" * 64, "data", 0, 1)
    for now[0] in (0.0, 5.0, 75.0):
        registry.transfers.note_upload_request("a", want)
        registry.transfers.note_download_request("a", want)
    assert registry.transfers.drop_reasons().keys() == {"a"}
    if end == "gone":
        registry.note_disconnect("a")
    else:  # it lost its power, and its broker hasn't noticed yet
        registry.note_birth("a", 2, "pi", 10, 20.0, connected=True)
    assert registry.transfers.drop_reasons() == {}


@pytest.mark.parametrize("sent", ["this offer", "the offer before", "nothing"])
def test_a_board_is_silent_only_since_the_offer_that_it_was_really_sent(sent: str) -> None:
    state = State(model="m" * 64, devices={"a": JobDevice(1, True, {"name": "pi"}, None, 10)})  # type: ignore[arg-type]
    state.phase, state.round = Phase.TRAINING, 4
    state.tasks["a"] = DeviceTask(1, (3,), progress=Progress.OFFERED)
    now = [0.0]
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, {"a": (0, 0)}, listening=lambda: now[0])
    registry.admit("a", "test", 0)
    if sent != "nothing":
        registry.note_offer("a", (4 if sent == "this offer" else 3, 1), 0.0)
    now[0] = 100.0
    silent = ["a"] if sent == "this offer" else []
    assert registry.take_silent(60.0) == list(registry.silences()) == silent
    assert registry.unreached(4, ["a"]) == (frozenset() if silent else {"a"})
    registry.note_activity("a")
    assert registry.silences() == {}


def test_an_offer_that_waits_for_the_connection_is_not_sent() -> None:
    registry = DeviceRegistry(JOB, ARCHITECTURE, State(model="m" * 64), {"a": (0, 0)})
    link: Any = SimpleNamespace(publish=lambda *_: link.room, connected=True, room=False)
    outbox = Outbox(SiteLink(link, Topics("default")), registry, Downloads(BlobSender()))
    ref = BlobRef("b" * 64, 1, "c" * 64)
    outbox.send("a", Offer("job", 4, 1, 0, "d" * 64, "e" * 64, (1,), 2, ref, ref, ref, {}), "job")
    for link.room, unreached in ((False, {"a"}), (True, set())):
        outbox.deliver()
        assert registry.unreached(4, ["a"]) == unreached
