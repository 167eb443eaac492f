"""CPU time of the server's process for the bytes of updates, with and without upload workers.

A Mosquitto, a process that answers wants as boards do, and the part of a server that takes in updates: its connection,
its pulls and its upload workers, without a coordinator. Every update has random bytes of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.swarm.site import find_mosquitto, free_port
from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.chunk import MAX_PACKET, Chunk
from fedprune.wire.link import Link
from fedprune.wire.messages import TO, BlobNotFound, BlobRequest, parse
from fedprune.wire.queues import HIGH_WATER
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender
from fedprune_server.transfer.upload_workers.messages import Begin
from fedprune_server.transfer.upload_workers.workers import UploadWorkers
from fedprune_server.transfer.uploads import Wants

_TOPICS = Topics("default")
_LIMIT_S = 120.0


def boards(port: int, folder: Path) -> None:
    """Answer wants for any board until this process is ended."""
    serve = BlobSender(BlobStore(folder, durable=False))
    with closing(Link(f"mqtt://127.0.0.1:{port}", "boards")) as link:
        link.subscribe(["fedprune/1/default/+/-/down"])
        link.start(patient=True)
        print("ready", flush=True)
        while True:
            item = link.get(1.0)
            if not isinstance(item, tuple):
                continue
            want = parse(item[1])
            chunks = serve.answer(want) if isinstance(want, BlobRequest) else None
            if not isinstance(want, BlobRequest) or chunks is None or isinstance(chunks, BlobNotFound):
                continue
            for chunk in chunks:
                while link.unsent >= HIGH_WATER:
                    time.sleep(0.0005)
                topic = _TOPICS.up_to(_TOPICS.parse(item[0]).device, want.to)
                link.publish(topic, chunk, 0)


def measure(port: int, folder: Path, refs: list[BlobRef], count: int) -> dict[str, float]:
    """Seconds, and CPU seconds of this process, for all updates with so many upload workers."""
    url, store = f"mqtt://127.0.0.1:{port}", BlobStore(folder)
    root = str(store.root)
    link = Link(url, f"server-{count}")
    link.subscribe(_TOPICS.server_subscriptions())

    def begin(tag: str) -> Begin:
        return Begin(url, "default", tag, root, 4, MAX_PACKET, None, None, None, 0, os.getpid())

    def ask(wants: Wants) -> None:
        for device, want in wants:
            link.publish(_TOPICS.down(device), want.to_bytes())

    with closing(link), UploadWorkers(store, begin, count, link.wake, time.monotonic) as uploads:
        link.start()
        time.sleep(3.0)  # upload workers start
        began, cpu = time.monotonic(), time.process_time()
        for number, ref in enumerate(refs):
            uploads.born(f"d{number}", 1, 0.0, began, (TO,))
            ask(uploads.add(f"d{number}", 1, 1, ref, began))
        left, ticked = len(refs), began
        while left:
            item, now = link.get(0.1), time.monotonic()
            if isinstance(item, tuple):
                ask(uploads.chunk(_TOPICS.parse(item[0]).device, Chunk.parse(item[1]), now))
            ask(uploads.collect(now))
            if now - ticked > 0.5:
                ticked = now
                ask(uploads.tick(now))
            left -= len(uploads.outcomes())
            if now - began > _LIMIT_S:
                raise TimeoutError(f"{left} updates are missing")
        result = {"upload_workers": count, "seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    check_all(store, refs)
    return result


def check_all(store: BlobStore, refs: list[BlobRef]) -> None:
    """Make sure that every update is there, whole."""
    for ref in refs:
        if len(store.read(ref.sha256)) != ref.size:
            raise ValueError(ref.sha256)


def main() -> None:
    """Measure each number of upload workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upload-workers", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--updates", type=int, default=16, metavar="N")
    parser.add_argument("--mib", type=float, default=16.0, help="size of an update")
    parser.add_argument("--boards", nargs=2, metavar=("PORT", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.boards is not None:
        boards(int(options.boards[0]), Path(options.boards[1]))
    with TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        configuration = folder / "mosquitto.conf"
        configuration.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n")
        store = BlobStore(folder / "boards", durable=False)
        refs = [store.put(os.urandom(int(options.mib * 2**20))) for _ in range(options.updates)]
        broker = subprocess.Popen([find_mosquitto(), "-c", str(configuration)], stderr=subprocess.DEVNULL)
        command = [sys.executable, __file__, "--boards", str(port), str(store.root)]
        answering = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
        )
        try:
            if answering.stdout is not None:
                answering.stdout.readline()
            for count in options.upload_workers:
                row = measure(port, folder / f"server-{count}", refs, count)
                size = sum(r.size for r in refs) / 1e6
                dear, fast = 1e3 * row["cpu_s"] / size, size / row["seconds"]
                print(f"{count} upload workers: {dear:.2f} ms of CPU time per MB, {fast:.0f} MB/s", flush=True)
        finally:
            for process in (answering, broker):
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
