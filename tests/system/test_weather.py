"""The benchmark `benchmarks/weather`: its proxy does what it says, and a fleet behind it comes to the same model."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.weather import proxy, run
from support.processes.machine import find_mosquitto

pytestmark = pytest.mark.system

CONNECT = bytes.fromhex("1010 00044d515454 04 02 001e 0004") + b"here"


def message(number: int, qos: int = 0) -> bytes:
    """A PUBLISH packet of its own length and content."""
    body = b"\0\x01t" + (b"\0\x07" if qos else b"") + str(number).encode() * (1 + number % 40)
    return bytes((0x30 | qos << 1, len(body))) + body


async def pass_through(weather: proxy.Weather, said: list[bytes]) -> tuple[list[bytes], Any]:
    """What comes out at the broker's end of all that a board says."""
    heard, enough = bytearray(), asyncio.Event()

    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            heard.extend(data)
            if heard.endswith(said[-1]):
                enough.set()
        writer.close()

    server = await asyncio.start_server(broker, "127.0.0.1", 0)
    between = proxy.Proxy(weather, server.sockets[0].getsockname()[1])
    await between.start()
    _, writer = await asyncio.open_connection("127.0.0.1", between.port)
    stream = b"".join(said)
    for at in range(0, len(stream), 700):  # not at the borders of packets
        writer.write(stream[at : at + 700])
        await writer.drain()
    await asyncio.wait_for(enough.wait(), 60)
    writer.close()
    await between.stop()
    server.close()
    out, at = [], 0
    for _, end in proxy.packets(bytes(heard)):
        out.append(bytes(heard[at:end]))
        at = end
    assert at == len(heard)
    return out, between.tally


def test_loss_and_delay_change_no_byte() -> None:
    said = [CONNECT, *(message(n) for n in range(300)), b"\xe0\0"]
    out, tally = asyncio.run(pass_through(proxy.Weather(round_trip_s=0.002, loss=0.3, bytes_s=1e6), said))
    assert out == said
    assert tally.events["connections"] == 1
    assert tally.events["lost"] > 0


def test_repeats_and_swaps_lose_nothing_and_touch_publishes_alone() -> None:
    said = [CONNECT, *(message(n, n % 2) for n in range(400)), b"\xc0\0", b"\xe0\0"]
    out, tally = asyncio.run(pass_through(proxy.Weather(round_trip_s=0.002, repeats=0.2, swaps=0.2), said))
    # A repeated packet of QoS 1 says so in its header; take that off again.
    plain = Counter(bytes((p[0] & ~0x08, *p[1:])) if p[0] >> 4 == 3 else p for p in out)
    assert plain.keys() == set(said)
    assert sum(plain.values()) - len(said) == tally.events["repeated"] > 0
    assert [p for p in out if p[0] >> 4 != 3] == [CONNECT, b"\xc0\0", b"\xe0\0"]
    assert tally.events["swapped"] > 0
    assert [p for p in out if p[0] >> 4 == 3] != said[1:-2]


@pytest.mark.soak
@pytest.mark.mosquitto
@pytest.mark.timeout(4 * 3600)
def test_a_fleet_in_a_storm_comes_to_the_same_models(tmp_path: Path) -> None:
    find_mosquitto()
    found = run.compare(tmp_path, 20, 1800.0)
    assert run.verdict(found, 0.03, 1.3) == []
    assert found["rounds"] >= 1
