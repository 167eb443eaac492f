"""What a board gets of a model through a broker, beside what bare paho gets through the same broker.

    python -m benchmarks.goodput [--repeats 9]

A run is a transfer of 46 MB to one device. *Ours* is what happens in the field: `Outbox` and `Downloads` of the server
answer the wants of the board's `BlobDownloads` and `Uplink`, through a `Link` each; each leaf is verified and written,
the whole is flushed to the disk. *Bare* is paho that publishes the same bytes in chunks of the same size at QoS 0 as
fast as it can, and paho that counts what arrives. *Stored* is bare paho that hashes, writes and flushes what arrives:
how much of the difference is that work. Sender, receiver and broker are processes of their own. The three take turns,
and which of them begins, in a broker that is new each time.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.bare_paho import bare
from benchmarks.harness import parser, save, setting
from benchmarks.swarm.__main__ import broker_version
from benchmarks.swarm.site import site
from fedprune.blobs.blob_ref import LEAF, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.chunk import PACKET_OVERHEAD, QOS, Chunk
from fedprune.wire.link import Link
from fedprune.wire.messages import BlobRequest, Offer, parse
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender
from fedprune_device.network.blob_download import BlobDownloads
from fedprune_device.network.connection import Channel
from fedprune_device.network.connection import Connection as BoardConnection
from fedprune_device.network.uplink import Uplink
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.transfer.downloads import Downloads

SIZE = 46_000_000
TOPICS = Topics("bench")
CHUNKS = (1, 3)
"""Leaves of a chunk: what brokers with a limit of 64 KiB let through, and what is usual."""

DEVICE = "pi"
KINDS = ("ours", "bare", "stored")


class Uncounted:
    """In the place of a registry."""

    def sent(self, device: str, size: int) -> None:
        """Bytes went to a device."""

    def note_request_of(self, device: str, want: BlobRequest, now: float) -> None:
        """A device asked for a part of a blob."""


def serve(url: str, folder: str, leaves: int, pipe: Connection) -> None:
    """A server's part, as the daemon's loop does it."""
    store = BlobStore(Path(folder))
    allowed = set(store.names())
    with Link(url, "server") as link:
        link.subscribe(TOPICS.server_subscriptions())
        link.start()
        downloads = Downloads(BlobSender(store), leaves * LEAF + PACKET_OVERHEAD)
        post = Outbox(SiteLink(link, TOPICS), Uncounted(), downloads)  # type: ignore[arg-type]
        pipe.send("ready")
        while not pipe.poll():
            item = link.get(0.0 if post.ready else 0.01 if post.waiting else 0.1)
            if isinstance(item, tuple) and isinstance(want := parse(item[1]), BlobRequest):
                post.fetched(TOPICS.parse(item[0]).device, want, allowed)
            post.send_chunks()


def receive(url: str, refs: tuple[BlobRef, BlobRef], folder: str, pipe: Connection) -> None:
    """A board's part, as the agent's loop does it; tells how long the weights took."""
    store = BlobStore(Path(folder))
    weights, graph = refs
    digest = "ab" * 32
    offer = Offer("job", 0, 0, 0, digest, digest, (1,), 2, weights, graph, graph, {})
    with Link(url, DEVICE) as link:
        link.subscribe(TOPICS.device_subscriptions(DEVICE))
        link.start()
        assert link.get(5) == ConnectionUp()
        outbox = Uplink(BoardConnection(link, Channel(DEVICE, TOPICS.site)), store)
        pipe.send("ready")
        pipe.recv()
        began = time.perf_counter()
        downloads = BlobDownloads(store, offer, time.monotonic())
        outbox.ask(offer.job, downloads.start(time.monotonic()))
        while not downloads.done:
            item = link.get(0.05)
            now = time.monotonic()
            if isinstance(item, tuple):
                TOPICS.parse(item[0])
                outbox.ask(offer.job, downloads.chunk(Chunk.parse(item[1]), now))
            outbox.ask(offer.job, downloads.tick(now))
            outbox.progress(offer, ("download", *downloads.progress), now)
        pipe.send(time.perf_counter() - began)
        assert store.size(weights.sha256) == weights.size


def ours(url: str, store: BlobStore, refs: tuple[BlobRef, BlobRef], leaves: int) -> float:
    """Seconds of a transfer as in the field."""
    with tempfile.TemporaryDirectory() as folder:
        server, theirs = multiprocessing.Pipe()
        board, theirs_too = multiprocessing.Pipe()
        processes = [
            multiprocessing.Process(target=serve, args=(url, str(store.root), leaves, theirs)),
            multiprocessing.Process(target=receive, args=(url, refs, folder, theirs_too)),
        ]
        for process in processes:
            process.start()
        assert server.recv() == board.recv() == "ready"
        board.send("go")
        assert board.poll(120)
        took: float = board.recv()
        server.send("stop")
        for process in processes:
            process.join()
    return took


def measure(repeats: int) -> list[dict[str, Any]]:
    """All rows; chunks of different sizes take turns, so that a busy moment hits all of them."""
    turns: dict[int, list[dict[str, Any]]] = {leaves: [] for leaves in CHUNKS}
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        refs = store.put(random.Random(7).randbytes(SIZE)), store.put(b"graph")
        for turn in range(repeats):
            for leaves, found in turns.items():
                with tempfile.TemporaryDirectory() as scratch, site(Path(scratch)) as place:
                    place.broker()
                    place.look()
                    url, before = f"mqtt://127.0.0.1:{place.port}", place.watched["broker"].peak
                    pair: dict[str, Any] = {}
                    for which in KINDS[turn % len(KINDS) :] + KINDS[: turn % len(KINDS)]:
                        if which == "ours":
                            pair[which] = ours(url, store, refs, leaves)
                        else:
                            pair[which] = bare(url, SIZE, leaves, QOS, stored=which == "stored")
                        place.look()
                        # What comes second finds memory that the first one left: its growth says nothing.
                        pair.setdefault("growth", {which: place.watched["broker"].peak - before})
                    found.append(pair)
            print(f"turn {turn + 1} of {repeats}: done", file=sys.stderr)
    return [row(leaves, found) for leaves, found in turns.items()]


def row(leaves: int, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    whole = [p for p in pairs if None not in (p["bare"], p["stored"])]
    if not whole:
        raise RuntimeError("the broker lost some of what paho published, every time")

    def rate(which: str) -> float:
        return round(SIZE / 1e6 / statistics.median(p[which] for p in whole), 1)

    def ratios(which: str) -> list[float]:
        return sorted(round(p[which] / p["ours"], 2) for p in whole)

    def growth(which: str) -> float | None:
        return max((round(p["growth"][which] / 2**20, 1) for p in pairs if which in p["growth"]), default=None)

    return {
        "broker": "set_tcp_nodelay", "chunk_kib": leaves * 32, "turns": len(whole), "lost": len(pairs) - len(whole),
        "mb_per_s": rate("ours"), "bare_mb_per_s": rate("bare"), "stored_mb_per_s": rate("stored"),
        "ratio": round(statistics.median(ratios("bare")), 2), "ratios": ratios("bare"),
        "stored_ratio": round(statistics.median(ratios("stored")), 2), "stored_ratios": ratios("stored"),
        "growth_mib": growth("ours"), "bare_growth_mib": growth("bare"),
    }  # fmt: skip


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--repeats", type=int, default=9)
    options = command.parse_args()
    multiprocessing.set_start_method("spawn")
    rows = measure(options.repeats)
    about = setting("paho-mqtt") | {"broker": broker_version()}
    save(options.out or "goodput", {"setting": about, "repeats": options.repeats, "rows": rows})


if __name__ == "__main__":
    main()
