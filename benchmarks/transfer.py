"""How fast a blob travels through a broker, by chunk size and window, beside the same bytes published by bare paho.

    python benchmarks/transfer.py [--output benchmarks/results/transfer.json] [--repeats 3]

Sender, receiver and broker are processes of their own on one machine, over the loopback interface. A transfer is what
happens in the field: messages that ask, chunks that answer, every leaf verified and written, the whole verified and
flushed to the disk. Bare paho publishes the same chunks at QoS 1 as fast as it can and only counts what arrives; its
receiver keeps up, so nothing is lost.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bare_paho import bare
from mosquitto import found, mosquitto
from synthetic_nets import RESULTS, setting, write

from fedprune.blobs.blob_ref import LEAF
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.chunk import PACKET_OVERHEAD, Chunk
from fedprune.wire.link import Link
from fedprune.wire.messages import BlobNotFound, BlobRequest, parse
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender, Pull
from fedprune_server.messaging.broker.embedded import EmbeddedBroker

SIZE = 20_000_000
TOPICS = Topics("bench")
CHUNKS = (1, 2, 4, 8, 16, 32)
WINDOWS = (8, 16, 32, 64, 128)


def serve(url: str, folder: str, chunk_leaves: int, qos: int, pipe: Connection) -> None:
    """Answer wants until told to stop."""
    server = BlobSender(BlobStore(Path(folder)))
    link = Link(url, "server")
    link.subscribe(TOPICS.server_subscriptions())
    link.start()
    pipe.send("ready")
    while not pipe.poll():
        item = link.get(0.05)
        if not isinstance(item, tuple):
            continue
        want = parse(item[1])
        assert isinstance(want, BlobRequest)
        answer = server.answer(want, chunk_leaves * LEAF + PACKET_OVERHEAD)
        assert not isinstance(answer, BlobNotFound)
        for raw in answer:
            link.publish(TOPICS.down_blob("pi"), raw, qos)  # what is lost is asked for again, which `stalls` counts
    link.close()


def transfer(url: str, store: BlobStore, chunk_leaves: int, window: int, qos: int) -> float:
    """Seconds that one pull takes."""
    (sha256,) = store.names()
    ref = store.ref(sha256)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(url, str(store.root), chunk_leaves, qos, theirs))
    process.start()
    assert ours.recv() == "ready"
    with tempfile.TemporaryDirectory() as folder, Link(url, "pi") as link:
        link.subscribe(TOPICS.device_subscriptions("pi"))
        link.start()
        link.get(5)
        target = BlobStore(Path(folder))
        began = time.perf_counter()
        pull = Pull(
            ref, target.partial(ref), chunk_leaves=min(chunk_leaves, window), window_leaves=window, patience_s=30
        )
        wants = pull.start(time.monotonic())
        while not pull.done:
            for want in wants:
                assert link.publish(TOPICS.up("pi"), want.to_bytes(), qos)
            item = link.get(1)
            now = time.monotonic()
            wants = pull.on_chunk(Chunk.parse(item[1]), now) if isinstance(item, tuple) else pull.on_tick(now)
        took = time.perf_counter() - began
        assert pull.stalls == 0
    ours.send("stop")
    process.join()
    return took


@contextmanager
def brokers() -> Iterator[dict[str, str]]:
    """Names and URLs of the brokers to measure."""
    with ExitStack() as stack:
        urls = {f"amqtt {version('amqtt')}": stack.enter_context(EmbeddedBroker(port=0)).url}
        if installed := found():
            binary, its_version = installed
            for name, lines in (("", ""), (", set_tcp_nodelay", "set_tcp_nodelay true\n")):
                urls[f"Mosquitto {its_version}{name}"] = stack.enter_context(mosquitto(binary, lines)).url
        yield urls


def measure(repeats: int) -> list[dict[str, Any]]:
    """All rows; the repeats of different settings take turns, so that a busy moment hits all of them."""
    settings = [(c, w, 1) for w in (32, 128) for c in CHUNKS if c <= w]
    settings += [(4, w, 1) for w in WINDOWS if w not in (32, 128)] + [(4, 32, 0), (4, 128, 0)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, brokers() as urls:
        store = BlobStore(Path(folder))
        store.put(random.Random(7).randbytes(SIZE))
        seconds: dict[tuple[Any, ...], list[float]] = {}
        for turn in range(repeats):
            for name, url in urls.items():
                for chunk in CHUNKS:
                    took = bare(url, SIZE, chunk, 1)
                    if took is None:
                        raise RuntimeError(f"{name} lost some of what bare paho published")
                    seconds.setdefault((name, "bare", chunk), []).append(took)
                for chunk, window, qos in settings:
                    took = transfer(url, store, chunk, window, qos)
                    seconds.setdefault((name, "pull", chunk, window, qos), []).append(took)
                print(f"turn {turn + 1}, {name}: done", file=sys.stderr)
    for key, values in seconds.items():
        if key[1] == "pull":
            name, _, chunk, window, qos = key
            rate, raw = (SIZE / 1e6 / statistics.median(v) for v in (values, seconds[name, "bare", chunk]))
            rows.append(
                {
                    "broker": name, "chunk_kib": chunk * 32, "window_kib": window * 32, "qos": qos,
                    "mb_per_s": round(rate, 1), "bare_mb_per_s": round(raw, 1), "ratio": round(rate / raw, 2),
                    "seconds": [round(v, 3) for v in values],
                }
            )  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about = result["setting"]
    machine = f"{about['cpu']}, {about['cores']} cores, load {about['load']} before, {about['system']}"
    lines = [
        "# Transfer of a 20 MB blob through a broker",
        "",
        f"{about['date']}, {machine}; Python {about['python']}, paho-mqtt {about['paho-mqtt']}.",
        f"Medians of {result['repeats']} runs. Sender, receiver and broker share the machine, and other work ran",
        "beside them: the ratios say more than the rates. *Bare* is paho publishing the same chunks at QoS 1 without",
        "any verification, storage or window. Written by `python benchmarks/transfer.py`.",
        "",
        "| broker | chunk, KiB | window, KiB | QoS | MB/s | bare, MB/s | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        "| {broker} | {chunk_kib} | {window_kib} | {qos} | {mb_per_s} | {bare_mb_per_s} | {ratio} |".format(**row)
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "transfer.json")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    result = {
        "setting": setting("paho-mqtt"),
        "repeats": arguments.repeats,
        "rows": measure(arguments.repeats),
    }
    write(arguments.output, result, table(result))


if __name__ == "__main__":
    main()
