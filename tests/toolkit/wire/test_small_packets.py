"""Brokers that let less through than usual: a model arrives and an update returns, without a word of configuration."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, PACKET_OVERHEAD_BYTES, Chunk, ChunkLimit, leaves_per_chunk
from fedprune.wire.link import BrokerLink
from fedprune.wire.messages import BlobRequest, Offer, UpdateAnnouncement, parse_message
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Pull
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.update_sender import UpdateSender
from fedprune_device.network.uplink import Uplink
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.transfer.downloads import Downloads
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.upload_place import ArrivedUpdate
from fedprune_server.transfer.uploads import Uploads
from support.waiting import attempts

TOPICS = Topics("lab")
USUAL = leaves_per_chunk(DEFAULT_MAX_PACKET)
DIGEST = "ab" * 32


def chunks(serve: BlobSender, want: BlobRequest, max_packet: int = DEFAULT_MAX_PACKET) -> list[Chunk]:
    answer = serve.answer(want, max_packet)
    assert isinstance(answer, Iterator)
    return [Chunk.parse(raw) for raw in answer]


@given(limit=st.integers(1, USUAL), first_leaves=st.integers(1, USUAL))
def test_a_limit_is_found_out_by_halving(limit: int, first_leaves: int) -> None:
    """A broker that lets through chunks of `limit` leaves; nothing of what is larger comes."""
    chunk_limit = ChunkLimit(first_leaves * LEAF_BYTES + PACKET_OVERHEAD_BYTES)
    for _ in range(10):
        if chunk_limit.leaves <= limit:
            chunk_limit.note_arrival(chunk_limit.leaves)
        else:
            chunk_limit.note_silence()
    assert min(first_leaves, max(1, limit // 2)) <= chunk_limit.leaves <= min(first_leaves, limit)


def test_a_blob_comes_through_where_larger_chunks_get_lost_and_the_next_one_at_once(tmp_path: Path) -> None:
    store, target = (BlobStore(tmp_path / name, durable=False) for name in "ab")
    limit, now, stalls = ChunkLimit(), 0.0, []
    for seed in range(2):
        ref = store.put(bytes([seed]) * (50 * LEAF_BYTES))
        pull = Pull(ref, target.partial(ref), limit=limit)
        wants, count = pull.start(now), 0
        while not pull.is_done:
            arrived = [c for w in wants for c in chunks(BlobSender(store), w) if len(c.payload) <= LEAF_BYTES]
            wants = [w for c in arrived for w in pull.on_chunk(c, now)]
            if not arrived:
                now += 6
                count += 1
                wants = pull.on_tick(now)
            assert count < 10
        stalls.append(count)
    assert stalls == [1, 0]


@pytest.mark.mosquitto
@pytest.mark.system
@pytest.mark.parametrize("setting", ["message_size_limit 65536", "max_packet_size 65536"])
def test_a_model_arrives_and_an_update_returns_through_a_broker_with_a_limit_of_64_kib(
    setting: str, start_mosquitto: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of the settings drops what is larger without a word, the other one the connection with it."""
    monkeypatch.setitem(Pull.__init__.__kwdefaults__, "patience_s", 0.5)
    broker = start_mosquitto(settings="listener {port} 127.0.0.1\nallow_anonymous true\n" + setting + "\n")
    here, there = BlobStore(tmp_path / "server", durable=False), BlobStore(tmp_path / "pi", durable=False)
    weights, graph = here.put(bytes(range(256)) * 8000), here.put(b"graph")
    trained = there.put(bytes(range(255)) * 8000)
    offer = Offer("job", 1, 1, 0, DIGEST, DIGEST, (1,), 2, weights, graph, graph, {})
    update = UpdateAnnouncement("pi", "job", 1, 1, DIGEST, trained, 1, 1)
    with ExitStack() as stack:
        server, board = BrokerLink(broker.url, "server"), BrokerLink(broker.url, "pi")
        server.subscribe(TOPICS.server_subscriptions())
        board.subscribe(TOPICS.device_subscriptions("pi"))
        for link in (server, board):
            stack.callback(link.close)
            link.start()
        registry: Any = SimpleNamespace(
            count_sent=lambda *_: None,
            transfers=SimpleNamespace(note_download_request=lambda *_: None, note_upload_request=lambda *_: None),
        )
        post = Outbox(SiteLink(server, TOPICS), registry, Downloads(BlobSender(here)))
        connection = BoardConnection(board, MessageChannel("pi", TOPICS.site))
        uplink = Uplink(connection)
        outbox = UpdateSender(connection, uplink, there)
        uploads = Uploads(BucketSync(here))
        pulls = Downloader(there, connection, uplink)
        pulls.begin(offer, time.monotonic(), is_connected=False)
        arrived: list[Any] = []
        for _ in attempts("the pull", pause_s=0.0):
            if pulls.offer is None and arrived:
                break
            now = time.monotonic()
            item = server.get(0.01)
            if isinstance(item, ConnectionUp):
                uploads.on_reconnect(now)
            elif isinstance(item, tuple) and item[0].endswith("/blob"):
                post.send_requests(uploads.on_chunk("pi", Chunk.parse(item[1]), now))
            elif isinstance(item, tuple):
                message = parse_message(item[1])
                if isinstance(message, BlobRequest):
                    post.serve_request("pi", message, {weights.sha256, graph.sha256})
                elif isinstance(message, UpdateAnnouncement):
                    post.send_requests(uploads.add("pi", 1, 1, message.weights, now))
            post.send_requests(uploads.on_tick(now))
            post.deliver()
            post.send_chunks()
            arrived += [o for o in uploads.take_outcomes() if isinstance(o, ArrivedUpdate)]
            item = board.get(0.01)
            if isinstance(item, ConnectionUp):
                outbox.announce_soon(now)
                pulls.on_connect(now)
            elif isinstance(item, ConnectionDown):
                outbox.drop_chunks()
                uploads.drop("pi")  # as at the board's death
            elif isinstance(item, tuple) and item[0].endswith("/blob"):
                pulls.on_chunk(Chunk.parse(item[1]), now)
            elif isinstance(item, tuple):
                request = parse_message(item[1])
                assert isinstance(request, BlobRequest)
                outbox.on_blob_request(request, update, now)
            pulls.turn(now)
            outbox.send_chunks()
            if pulls.offer is None:
                outbox.announce(update, now)

    assert there.read(weights.sha256) == bytes(range(256)) * 8000
    assert here.read(trained.sha256) == bytes(range(255)) * 8000


def test_a_message_that_the_broker_would_drop_is_refused_by_name(tmp_path: Path) -> None:
    link: Any = SimpleNamespace(publish=lambda *_: True)
    registry: Any = SimpleNamespace(
        count_sent=lambda *_: None,
        transfers=SimpleNamespace(note_download_request=lambda *_: None, note_upload_request=lambda *_: None),
    )
    store = BlobStore(tmp_path, durable=False)
    ref = store.put(b"x")
    offer = Offer("job", 0, 0, 0, DIGEST, DIGEST, (1,) * 40_000, 2, ref, ref, ref, {})

    Outbox(SiteLink(link, TOPICS), registry, Downloads(BlobSender(store))).send("pi", offer, "job")
    limited = Outbox(SiteLink(link, TOPICS, max_packet=65_536), registry, Downloads(BlobSender(store), 65_536))
    with pytest.raises(ProtocolError, match="max_packet"):
        limited.send("pi", offer, "job")
