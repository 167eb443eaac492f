"""What a board gets of a model over HTTPS from its server, beside what it gets over MQTT: both as in the field.

    python -m benchmarks.web_blobs [--repeats 8]

A run is a transfer of 46 MB to one device: over MQTT as in `benchmarks.goodput`, which has what bare paho takes; over
HTTPS by `BlobServer` and `HttpFetch`, in processes of their own, with certificates on both sides; and over HTTP without
them. Every leaf is verified and written, and what is whole is flushed to the disk. The three take turns, and which of
them begins.
"""

from __future__ import annotations

import multiprocessing
import random
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.goodput import SIZE, ours
from benchmarks.harness import parser, save, setting
from benchmarks.mosquitto import mosquitto, needed
from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.security.certificates import make_request, make_tls_key, save_tls_key
from fedprune.security.tls import pinned_context
from fedprune.wire.urls import BlobUrl
from fedprune_device.network.http_download import HttpFetch
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.transfer.http import web_blobs
from fedprune_server.transfer.http_server import ServedJob

LEAVES = 3
"""Of a chunk over MQTT, as usual."""


def serve(state: Path, folder: Path, tls: bool, pipe: Connection) -> None:
    """A server's part: its web server, in a process that does nothing else."""
    config = ServerConfig(state=state, serve_blobs="127.0.0.1:0")
    identity = IdentityFolder(state) if tls else None
    with web_blobs(config, identity) as web:
        web.serve([ServedJob(BlobStore(folder), lambda device, sha256: True)])
        pipe.send(web.url)
        pipe.recv()


def receive(url: str, ref: BlobRef, state: Path, folder: Path, pipe: Connection) -> None:
    """A board's part; tells how long it took."""
    store = BlobStore(folder)
    identity = state / "identity"

    def context() -> ssl.SSLContext:
        return pinned_context(identity / "authority.pem", state / "board.pem", state / "board.key", lambda: 0)

    pipe.send("ready")
    pipe.recv()
    began = time.perf_counter()
    fetch = HttpFetch(store, BlobUrl.parse(url), [ref], context)
    fetch.join(120)
    pipe.send(time.perf_counter() - began)
    assert not fetch.failure, fetch.failure
    assert store.size(ref.sha256) == ref.size


def over_the_web(state: Path, store: BlobStore, ref: BlobRef, tls: bool) -> float:
    """Seconds of a transfer."""
    with tempfile.TemporaryDirectory() as folder:
        server, theirs = multiprocessing.Pipe()
        board, theirs_too = multiprocessing.Pipe()
        serving = multiprocessing.Process(target=serve, args=(state, store.root, tls, theirs))
        serving.start()
        url = server.recv()
        receiving = multiprocessing.Process(target=receive, args=(url, ref, state, Path(folder), theirs_too))
        receiving.start()
        assert board.recv() == "ready"
        board.send("go")
        assert board.poll(120)
        took: float = board.recv()
        server.send("stop")
        for process in (serving, receiving):
            process.join()
    return took


def measure(repeats: int, binary: str) -> list[dict[str, Any]]:
    """All rows."""
    found: dict[str, list[float]] = {"MQTT": [], "HTTP": [], "HTTPS": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        state, store = folder / "state", BlobStore(folder / "blobs")
        refs = store.put(random.Random(7).randbytes(SIZE)), store.put(b"graph")
        key = make_tls_key()
        with IdentityFolder.make(state, "default") as identity:
            save_tls_key(key, state / "board.key")
            (state / "board.pem").write_text(
                identity.authority.issue_device("default", "board", make_request(key, "board"))
            )

        def over_mqtt() -> float:
            with mosquitto(binary, "set_tcp_nodelay true\n") as broker:
                return ours(broker.url, store, refs, LEAVES)

        ways: dict[str, Callable[[], float]] = {
            "MQTT": over_mqtt,
            "HTTP": lambda: over_the_web(state, store, refs[0], tls=False),
            "HTTPS": lambda: over_the_web(state, store, refs[0], tls=True),
        }
        for turn in range(repeats):
            names = list(ways)
            for name in names[turn % 3 :] + names[: turn % 3]:
                found[name].append(ways[name]())
            print(f"turn {turn + 1} of {repeats}: done", file=sys.stderr)
    return [
        {
            "way": name,
            "mb_per_s": round(SIZE / 1e6 / statistics.median(times), 1),
            "all": sorted(round(SIZE / 1e6 / t, 1) for t in times),
        }
        for name, times in found.items()
    ]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--repeats", type=int, default=8)
    options = command.parse_args()
    multiprocessing.set_start_method("spawn")
    binary, its_version = needed("web_blobs")
    rows = measure(options.repeats, binary)
    about = {"mosquitto": its_version, "openssl": ssl.OPENSSL_VERSION.split()[1], "repeats": options.repeats}
    save(options.out or "web_blobs", {"setting": setting("paho-mqtt"), **about, "rows": rows})


if __name__ == "__main__":
    main()
