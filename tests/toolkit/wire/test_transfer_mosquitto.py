"""Why there is a window: a slow reader behind a Mosquitto with its default limits."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.link import BrokerLink
from fedprune.wire.messages import BlobNotFound, BlobRequest, parse_message
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Pull
from support.waiting import attempts

pytestmark = [pytest.mark.mosquitto, pytest.mark.system]

TOPICS = Topics("test")
MB = 1_000_000


def connect(url: str, name: str, topics: list[str]) -> closing[BrokerLink]:
    link = BrokerLink(url, name)
    link.subscribe(topics)
    link.start()
    assert link.get(5) == ConnectionUp()
    return closing(link)


@pytest.fixture(params=[0, 1], ids=["QoS 0", "QoS 1"])
def serving(request: pytest.FixtureRequest, mosquitto: Any, tmp_path: Path) -> Iterator[BlobStore]:
    """A store behind a server that answers wants until the test ends."""
    store, stop = BlobStore(tmp_path / "server"), threading.Event()

    def serve() -> None:
        server = BlobSender(store)
        with connect(mosquitto.url, "server", TOPICS.server_subscriptions()) as link:
            ready.set()
            while not stop.is_set():
                item = link.get(0.05)
                if not isinstance(item, tuple):
                    continue
                want = parse_message(item[1])
                assert isinstance(want, BlobRequest)
                answer = server.answer(want, 64 * 1024)
                assert not isinstance(answer, BlobNotFound)
                for raw in answer:
                    assert link.publish(TOPICS.down_blob("pi"), raw, request.param)

    ready = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    yield store
    stop.set()
    thread.join()


def test_a_slow_reader_gets_a_blob_whole_and_the_broker_never_holds_more_than_about_a_window(
    mosquitto: Any, serving: BlobStore, tmp_path: Path
) -> None:
    data = random.Random(1).randbytes(20 * MB)
    ref = serving.put(data)
    target = BlobStore(tmp_path / "device")
    window = 32
    pull = Pull(ref, target.partial(ref), chunk_leaves=4, window_leaves=window)
    before, count = mosquitto.memory(), 0
    with connect(mosquitto.url, "pi", TOPICS.device_subscriptions("pi")) as link:
        wants = pull.start(time.monotonic())
        for _ in attempts("the pull", pause_s=0.0):
            if pull.is_done:
                break
            for want in wants:
                assert link.publish(TOPICS.up("pi"), want.to_bytes())
            item = link.get(1)
            if isinstance(item, tuple):
                count += 1
                time.sleep(0.002)
                wants = pull.on_chunk(Chunk.parse(item[1]), time.monotonic())
            else:
                wants = pull.on_tick(time.monotonic())

    assert target.read(ref.sha256) == data
    assert count == ref.leaf_count + 1  # one leaf per message at a limit of 64 KiB, and the table: nothing came twice
    assert mosquitto.memory("VmHWM") - before < 2 * window * LEAF_BYTES + 2 * MB
