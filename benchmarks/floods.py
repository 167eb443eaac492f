"""What floods cost a fleet: rounds a second of real boards, quiet and under attack.

    python benchmarks/floods.py [--boards 10] [--windows 4] [--seconds 12]

Needs Mosquitto. A server, Mosquitto with the generated configuration and boards run on loopback. The attacker is a
process of its own on the same machine and takes its share of it. Quiet and attacked windows take turns.

- member: an enrolled board sends signed wants of blobs that don't exist.
- stranger: a client without a certificate sends messages of one byte on the listener for joining.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from synthetic_nets import setting, write

from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.joining import Claim
from fedprune.security.signed_channel import Sealer
from fedprune.wire.messages import BlobRequest
from fedprune.wire.topics import Topics
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from support.processes.real_site import Site, write_material

HOSTILE = "mallory"
SITE = Topics("default")
CONFIG = """
[job]
name = "floods"
rounds = 100000
devices = {boards}
density = 0.5
deadline_s = 30

[job.recipe]
epochs = 1
lr = 0.001
"""
ATTACKS = {"member": (2500, 4000), "stranger": (3000, 30_000)}
"""Messages a second."""

PATIENCE_S = 300.0
_BATCH = 20
"""Messages that are sent at once."""


def attack(kind: str, folder: Path, port: int, rate: int, seconds: float) -> None:
    """Send messages at a rate, as far as this machine can; print how many it were.

    What is sent is made and signed beforehand, and in MQTT 3.1.1 by hand: in the attacked windows the attacker costs
    the machine little but its sending.
    """
    if kind == "member":
        stream, messages = member(folder, port, int(rate * seconds))
    else:
        stream, messages = stranger(folder, port)
    print(flush=True)
    sys.stdin.readline()
    began, sent = time.monotonic(), 0
    while (now := time.monotonic() - began) < seconds:
        if sent < rate * now:
            stream.sendall(b"".join(next(messages) for _ in range(_BATCH)))
            sent += _BATCH
        else:
            time.sleep(0.001)
    print(sent / seconds)


def member(folder: Path, port: int, count: int) -> tuple[ssl.SSLSocket, Iterator[bytes]]:
    """An enrolled board that sends signed wants."""
    identity = DeviceIdentity(folder / HOSTILE, "default", HOSTILE)
    topic, sealer = SITE.up(HOSTILE), Sealer(identity.key, identity.epochs)
    wants = (BlobRequest(secrets.token_hex(32), "data", 0, 1).to_bytes() for _ in range(count + _BATCH))
    messages = [publish(topic, sealer.seal(topic, want)) for want in wants]
    return connect(identity.context(), port, secrets.token_hex(16)), iter(messages)


def stranger(folder: Path, port: int) -> tuple[ssl.SSLSocket, Iterator[bytes]]:
    """A client without a certificate that sends one byte."""
    context = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    context.check_hostname = False
    name = secrets.token_hex(16)
    return connect(context, port, name), repeat(publish(SITE.join(name), b"x"))


def connect(context: ssl.SSLContext, port: int, name: str) -> ssl.SSLSocket:
    """A connection to the broker under a client id."""
    stream = context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1")
    body = b"\x00\x04MQTT\x04\x02\x00\x00" + len(name).to_bytes(2, "big") + name.encode()
    stream.sendall(bytes([0x10, len(body)]) + body)
    stream.recv(4)
    return stream


def publish(topic: str, payload: bytes) -> bytes:
    """A PUBLISH of QoS 0."""
    head = topic.encode()
    body = len(head).to_bytes(2, "big") + head + payload
    left, length = len(body), b""
    while True:
        left, digit = divmod(left, 128)
        length += bytes([digit | (0x80 if left else 0)])
        if not left:
            return b"\x30" + length + body


def enrol(site: Site) -> None:
    """Let the hostile board in, before the server starts."""
    with IdentityFolder(site.state) as identity:
        claim = Claim.parse(identity.claim(HOSTILE, 3600).text)
        device = DeviceIdentity(site.folder / HOSTILE, "default", HOSTILE)
        device.admit(EnrollmentService(identity).answer(device.request(claim)), claim.pin)


def rounds(site: Site) -> int:
    """Rounds that are over."""
    state = site.saved()
    return 0 if state is None else len(state.history)


def processor_s(site: Site) -> dict[str, float]:
    """Seconds of processor that the server's, the broker's and the boards' processes have had."""
    spent = dict.fromkeys(("server", "broker", "boards"), 0.0)
    for name, process in site.processes.items():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        spent[name if name in spent else "boards"] += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return spent


def watch(site: Site, seconds: float) -> dict[str, float]:
    """Rounds a second for so long, and processors that were busy for the server, the broker and the boards."""
    spent, before, began = processor_s(site), rounds(site), time.monotonic()
    time.sleep(seconds)
    took, done, now = time.monotonic() - began, rounds(site) - before, processor_s(site)
    return {"rounds_s": done / took, **{name: (now[name] - spent[name]) / took for name in spent}}


def flooded(site: Site, kind: str, messages: int, seconds: float) -> dict[str, float]:
    """One attacked window."""
    port = site.port if kind == "member" else site.join_port
    words = ["--attack", kind, str(site.folder), str(port), str(messages), str(seconds + 1)]
    process = subprocess.Popen([sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if process.stdin is None or process.stdout is None:
        raise RuntimeError
    process.stdout.readline()
    process.stdin.write(b"\n")
    process.stdin.flush()
    time.sleep(1)
    found = watch(site, seconds - 1)
    sent = float((process.communicate(timeout=60)[0] or b"0").split()[-1])
    return {**found, "sent_s": sent}


def median(windows: list[dict[str, float]], what: str) -> float:
    """Of one figure of the windows."""
    return statistics.median(window[what] for window in windows)


def named(site: Site) -> dict[str, bool]:
    """Where the culprit is named now: the log, `doctor`, and the alerts that the console shows."""
    words = [sys.executable, "-m", "fedprune_server.cli.main", "doctor", "--state", str(site.state)]
    doctor = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120).stdout
    log = (site.folder / "server.log").read_text()
    alerts = "".join(p.read_text() for p in site.state.glob("*alert*.json"))
    member, stranger = f"{HOSTILE} is in quarantine", "lately from the MQTT client"
    return {
        "log": any(mark in log for mark in (member, "floods the topic for joining")),
        "doctor": any(mark in doctor for mark in (member, stranger)),
        "alerts": HOSTILE in alerts or stranger in alerts,
    }


def measure(folder: Path, material: Path, kind: str, messages: int, options: argparse.Namespace) -> dict[str, Any]:
    """One attack at one rate, on a site of its own."""
    names = [f"board-{i}" for i in range(options.boards)]
    folder.mkdir()
    config = CONFIG.format(boards=options.boards)
    with Site(material, folder, config, names, PATIENCE_S, mosquitto=True, secure=True) as site:
        enrol(site)
        site.start_all()
        site.wait_for(lambda: rounds(site) >= 5, "five rounds")
        quiet, attacked = [], []
        for _ in range(options.windows):
            quiet.append(watch(site, options.seconds))
            attacked.append(flooded(site, kind, messages, options.seconds))
        found = named(site)
    return {
        "attack": kind,
        "messages_s": messages,
        "sent_s": median(attacked, "sent_s"),
        "quiet": quiet,
        "attacked": attacked,
        "share": median(attacked, "rounds_s") / median(quiet, "rounds_s"),
        "named": found,
    }


def page(about: dict[str, Any], body: dict[str, Any]) -> str:
    """The results."""
    lines = [
        f"| {r['attack']} | {r['messages_s']:,} | {r['sent_s']:,.0f} | {median(r['quiet'], 'rounds_s'):.2f} | "
        f"{median(r['attacked'], 'rounds_s'):.2f} | {r['share']:.0%} | "
        f"{', '.join(place for place, there in r['named'].items() if there)} |"
        for r in body["rows"]
    ]
    table = "\n".join(lines)
    return f"""# Floods

{about["date"]}, {about["cpu"]}, Python {about["python"]}, {body["mosquitto"]}.
`python benchmarks/floods.py --boards {body["boards"]}`

A server, Mosquitto with the generated configuration, {body["boards"]} boards and the attacker, all on this machine's
{os.cpu_count()} processors, medians of windows that take turns. The attacker's own work is part of what the
attacked windows cost. Load average of the machine in the last quarter of an hour, with whatever else ran on it:
{body["load_average"]:.1f}. The server's MQTT client has to read each message of a flood before it is dropped, so that
a flood costs rounds where no processor is spare.

| attacker | messages a second | sent | rounds a second, quiet | attacked | share | named in |
|---|---:|---:|---:|---:|---:|---|
{table}

`member`: an enrolled board sends signed wants of blobs that don't exist. `stranger`: a client without a certificate
sends messages of one byte on the listener for joining.
"""


def main() -> None:
    """Run all attacks."""
    if len(sys.argv) > 1 and sys.argv[1] == "--attack":
        kind, folder, port, messages, seconds = sys.argv[2:]
        attack(kind, Path(folder), int(port), int(messages), float(seconds))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--boards", type=int, default=10)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--only", choices=tuple(ATTACKS))
    options = parser.parse_args()
    rows = []
    with TemporaryDirectory() as name:
        material = Path(name) / "material"
        material.mkdir()
        write_material(material, {f"board-{i}": 100 for i in range(options.boards)})
        for kind, rates in ATTACKS.items():
            for messages in rates if options.only in (None, kind) else ():
                rows.append(measure(Path(name) / f"{kind}-{messages}", material, kind, messages, options))
                print(json.dumps(rows[-1]), flush=True)
    version = subprocess.run(["mosquitto", "-h"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    body = {"boards": options.boards, "mosquitto": version, "load_average": os.getloadavg()[2], "rows": rows}
    about = setting()
    if options.only is None:
        write("floods", {"setting": about, **body}, page(about, body))


if __name__ == "__main__":
    main()
