"""What a server sends to a fleet of 100 devices of five widths: `python benchmarks/distribution.py`.

Devices are the real pulls, stores and connections, 25 to a process, with a Mosquitto between them and the server's own
way out (slabs, sharing, downloads, post). Counted is every payload byte that the server publishes: offers, chunks, and
answers. Graphs are on the boards already, as in every round but the first. *Slow* devices read through a narrow pipe,
so that the broker has to wait for them; *late* ones connect when the others are nearly done; *lossy* ones throw chunks
away at random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mosquitto import mosquitto, needed
from synthetic_nets import resnet18, setting, weights, write

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress, Task
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.selection import Selection
from fedprune.strategies.methods.plain import plain
from fedprune.strategies.values import Submodel
from fedprune.wire.chunk import Chunk
from fedprune.wire.link import Link
from fedprune.wire.messages import Birth, BlobRequest, Offer, parse
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import EVERYONE, Topics
from fedprune.wire.transfer import BlobSender
from fedprune_device.network.blob_download import BlobDownloads
from fedprune_server.executor.slab_chains import SlabChains
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.transfer.downloads import Downloads as Answers
from fedprune_server.transfer.multicast import Audience, Multicast

DEVICES, PROCESSES = 100, 4
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
TOPICS, JOB = Topics("bench"), "job"
SLOW_BYTES = 400_000
LATE_S = (4.0, 20.0)
GRAPH = b"graph"


@dataclass(frozen=True)
class Case:
    """A fleet: which share of it is slow or late, and how many chunks get lost."""

    name: str
    slabs: bool = True
    slow: float = 0.0
    late: float = 0.0
    loss: float = 0.0


CASES = (
    Case("each device alone", slabs=False),
    Case("slabs"),
    Case("slabs, 10 % slow", slow=0.1),
    Case("slabs, 10 % late", late=0.1),
    Case("slabs, 2 % of chunks lost", loss=0.02),
)


class Board:
    """One device: pulls what it is offered."""

    def __init__(self, name: str, url: str, folder: Path, start_at: float, loss: float) -> None:
        self.name, self.loss, self.start_at = name, loss, start_at
        self.store = BlobStore(folder / name, durable=False)
        self.store.put(GRAPH)
        self.link = Link(url, name)
        self.link.subscribe(TOPICS.device_subscriptions(name))
        self.random = random.Random(name)
        self.started = False
        self.downloads: BlobDownloads | None = None
        self.heard: frozenset[str] = frozenset()
        self.done_at = 0.0
        self.tick_at = 0.0

    def turn(self, now: float) -> bool:
        """Take what came; whether something did."""
        if not self.started:
            if now >= self.start_at:
                self.started = True
                self.link.start(patient=True)
            return False
        item = self.link.get()
        if isinstance(item, ConnectionUp):
            self.link.publish(TOPICS.up(self.name), Birth(self.name, 1, "board", 1, "bench").to_bytes())
        elif isinstance(item, tuple):
            self.take(item[0], item[1], now)
        if now >= self.tick_at and self.downloads is not None and not self.done_at:
            self.tick_at = now + 0.25
            self.ask(self.downloads.tick(now))
        return item is not None

    def take(self, topic: str, payload: bytes, now: float) -> None:
        address = TOPICS.parse(topic)
        if address.channel == "down/blob":
            if self.downloads is not None and not self.done_at and self.random.random() >= self.loss:
                self.ask(self.downloads.chunk(Chunk.parse(payload), now, shared=address.device == EVERYONE))
        elif isinstance(offer := parse(payload), Offer) and self.downloads is None:
            self.downloads = BlobDownloads(self.store, offer, now)
            self.ask(self.downloads.start(now))

    def ask(self, wants: list[BlobRequest]) -> None:
        assert self.downloads is not None
        if (topics := self.downloads.listens(TOPICS)) != self.heard:
            self.heard = topics
            self.link.listen(topics)
        for want in wants:
            self.link.publish(TOPICS.up(self.name, JOB), want.to_bytes())
        if self.downloads.done:
            self.done_at = time.monotonic()

    def right(self) -> bool:
        """Whether it holds exactly what it was offered."""
        assert self.downloads is not None
        sha256 = self.downloads.offer.weights.sha256
        return tensorfile.digest(self.store.read(sha256)) == sha256


def boards(plan: list[tuple[str, str, float, float]], folder: str, pipe: Connection) -> None:
    """A process of devices, by name, broker, time of joining and loss."""
    began = time.monotonic()
    fleet = [Board(name, url, Path(folder), began + late, loss) for name, url, late, loss in plan]
    while any(not b.done_at for b in fleet) and not pipe.poll():
        now = time.monotonic()
        if not sum(b.turn(now) for b in fleet):
            time.sleep(0.002)
    pipe.send([(b.name, b.done_at - b.start_at if b.done_at else None, bool(b.done_at) and b.right()) for b in fleet])
    for b in fleet:
        b.link.close()


class Narrow:
    """A port that leads to the broker, and lets few bytes a second through on the way back."""

    def __init__(self, port: int, rate: int) -> None:
        self._target, self._rate = port, rate
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.socket()
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                far.connect(("127.0.0.1", self._target))
                for a, b, rate in ((near, far, 0), (far, near, self._rate)):
                    threading.Thread(target=self._carry, args=(a, b, rate), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, rate: int) -> None:
        with suppress(OSError):
            while data := source.recv(16384):
                target.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


class Counter:
    """A link that counts what it sends."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.messages = self.alone = self.shared = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        address = TOPICS.parse(topic)
        if address.channel == "down":
            self.messages += len(payload)
        elif address.device == EVERYONE:
            self.shared += len(payload)
        else:
            self.alone += len(payload)
        return self._link.publish(topic, payload, qos)


class Traffic:
    """In the registry's place."""

    def sent(self, device: str, size: int) -> None:
        pass


class Server:
    """The server's way out, with the submodels of one round."""

    def __init__(self, link: Counter, folder: Path, architecture: Architecture, case: Case, names: list[str]) -> None:
        self.link, self.case = link, case
        self.store = BlobStore(folder, durable=False)
        self.full = weights(architecture)
        self.selections = [Selection.of(architecture, widths_at(architecture, d)) for d in DENSITIES]
        basis = do.Basis(1, "0" * 64, "1" * 64)
        self.commands = {
            name: do.Extract(basis, do.Part(name, 1, self.selections[i % len(DENSITIES)].widths, 1.0, 1, None))
            for i, name in enumerate(names)
        }
        self.files = {s.widths: tensorfile.encode(s.gather(self.full)) for s in self.selections}
        self.chains = SlabChains(plain(Job()), self.store, self.submodel)
        self.chains.expect(list(self.commands.values()))
        self.state = State(model="0" * 64)
        self.state.tasks = {n: Task(1, c.part.widths) for n, c in self.commands.items()}
        sharing = Multicast(self.store, Audience(self.state))
        wire: Any = link
        registry: Any = Traffic()
        self.post = Outbox(SiteLink(wire, TOPICS), JOB, registry, Answers(BlobSender(self.store)), sharing)
        self.here: set[str] = set()
        self.left = list(names)

    def submodel(self, command: do.Extract) -> Submodel:
        selection = next(s for s in self.selections if s.widths == command.part.widths)
        return Submodel(selection, selection.gather(self.full))

    def extract(self) -> None:
        """Make the next device's offer, as a worker does: one after the other."""
        name = self.left.pop(0)
        command, graph = self.commands[name], self.store.put(GRAPH).to_dict()
        ref = self.store.put(self.files[command.part.widths])
        offer = {"weights": ref.to_dict(), "training": graph, "inference": graph}
        if self.case.slabs:
            offer |= self.chains.named(command, ref.sha256)
        task = self.state.tasks[name]
        task.offer, task.progress = offer, Progress.OFFERED
        if name in self.here:
            self.offer(name)

    def offer(self, name: str) -> None:
        offer = self.state.tasks[name].offer
        if offer is not None:
            widths = self.commands[name].part.widths
            offer = {**offer, "slabs": tuple(offer["slabs"])} if "slabs" in offer else offer
            fields = {"architecture": "0" * 64, "selection": "1" * 64, "widths": widths, "classes": 10, "recipe": {}}
            self.post.send(name, Offer(JOB, 1, 1, 1, **fields, **offer), JOB)
            self.post.deliver()

    def turn(self) -> None:
        item = self.link.get(0.0 if self.post.ready or self.left else 0.01)
        if isinstance(item, tuple):
            device = TOPICS.parse(item[0]).device
            message = parse(item[1])
            if isinstance(message, Birth):
                self.here.add(device)
                self.offer(device)
            elif isinstance(message, BlobRequest):
                offer = self.state.tasks[device].offer or {}
                allowed = {r["sha256"] for r in (offer["weights"], *offer.get("slabs", ()))}
                self.post.fetched(device, message, allowed)
        if self.left and len(self.here) >= 0.8 * DEVICES:
            self.extract()
        self.post.send_chunks()


def run(case: Case, limit_s: float) -> dict[str, Any]:
    """One distribution to the whole fleet."""
    names = [f"board-{i:03}" for i in range(DEVICES)]
    luck = random.Random(1)
    odd = luck.sample(names, round(DEVICES * (case.slow + case.late)))
    program, _ = needed("distribution")
    with mosquitto(program, "set_tcp_nodelay true\n") as broker, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        narrow = [Narrow(broker.port, SLOW_BYTES) for n in names if case.slow and n in odd]
        pipes, processes, slow = [], [], iter(narrow)
        plan = {n: (n, broker.url, 0.0, case.loss) for n in names}
        for name in odd:
            if case.late:
                plan[name] = (*plan[name][:2], luck.uniform(*LATE_S), case.loss)
            else:
                plan[name] = (name, f"mqtt://127.0.0.1:{next(slow).port}", 0.0, case.loss)
        with Link(broker.url, "server") as link:
            link.subscribe(TOPICS.server_subscriptions())
            link.start()
            counter = Counter(link)
            server = Server(counter, Path(folder, "server"), resnet18(10), case, names)
            for i in range(PROCESSES):
                ours, theirs = multiprocessing.Pipe()
                mine = [plan[n] for n in names[i::PROCESSES]]
                processes.append(multiprocessing.Process(target=boards, args=(mine, folder, theirs)))
                processes[-1].start()
                pipes.append(ours)
            began, ended = time.monotonic(), 0.0
            while not all(p.poll() for p in pipes) and not ended:
                server.turn()
                if time.monotonic() - began > limit_s:
                    ended = time.monotonic()
                    for p in pipes:
                        p.send("stop")
            seconds = time.monotonic() - began
            rows = [row for p in pipes for row in p.recv()]
            for process in processes:
                process.join()
            memory = broker.memory("VmHWM")
        for way in narrow:
            way.close()
    largest = max(len(f) for f in server.files.values())
    sent = counter.messages + counter.alone + counter.shared
    return {
        "case": case.name,
        "right": sum(ok for _, _, ok in rows),
        "largest_bytes": largest,
        "each_alone_bytes": sum(len(server.files[c.part.widths]) for c in server.commands.values()),
        "sent_bytes": sent,
        "message_bytes": counter.messages,
        "alone_bytes": counter.alone,
        "shared_bytes": counter.shared,
        "ratio": round(sent / largest, 3),
        "seconds": round(seconds, 1),
        "broker_bytes": memory,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    rows = result["rows"]
    widths, largest, alone = (
        ", ".join(f"{d:g}" for d in DENSITIES),
        rows[0]["largest_bytes"] / 1e6,
        rows[0]["each_alone_bytes"] / 1e6,
    )
    columns = (
        "fleet", "right digests", "sent by the server, MB", "of the largest model", "to all, MB", "to one, MB",
        "messages, MB", "seconds", "broker's memory at most, MB",
    )  # fmt: skip
    lines = [
        "# Distribution of a round's submodels",
        "",
        f"{result['setting']['date']}, {result['setting']['cpu']}. {DEVICES} devices of five widths of ResNet-18,",
        f"{widths} of the channels; the largest submodel is {largest:.1f} MB, and what the devices get is",
        f"{alone:.0f} MB together. Slow devices read {SLOW_BYTES / 1e6:g} MB/s; late ones connect {LATE_S[0]:g} to",
        f"{LATE_S[1]:g} s after the others.",
        "Broker, server and devices share the machine: bytes say a lot, seconds little. Written by",
        "`python benchmarks/distribution.py`.",
        "",
        f"| {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
    ]
    for r in rows:
        mb = {k: f"{v / 1e6:.1f}" for k, v in r.items() if k.endswith("_bytes")}
        lines.append(
            f"| {r['case']} | {r['right']} of {DEVICES} | {mb['sent_bytes']} | {r['ratio']:.2f} × "
            f"| {mb['shared_bytes']} | {mb['alone_bytes']} | {mb['message_bytes']} "
            f"| {r['seconds']:.0f} | {mb['broker_bytes']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run; nothing is written then")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds after which a case ends")
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    rows = []
    for number, case in enumerate(CASES):
        if arguments.only is None or number in arguments.only:
            rows.append(run(replace(case), arguments.limit))
            print(json.dumps(rows[-1]), flush=True)
    result = {"setting": setting("paho-mqtt"), "devices": DEVICES, "densities": DENSITIES, "rows": rows}
    if arguments.only is None:
        write("distribution", result, table(result))


if __name__ == "__main__":
    main()
