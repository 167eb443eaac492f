"""A job on real boards' processes, once in bad weather for as long as is asked, and once in calm for as many rounds."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.swarm.site import Site, site
from benchmarks.weather.proxy import Proxy, Weather
from fedprune.core.errors import FedpruneError, StorageError
from fedprune_server.simulation.digits import deal_digits, digits_model, write_device_data
from fedprune_server.storage.storage import Storage

STORM = Weather(
    round_trip_s=2.0,
    loss=0.3,
    bytes_s=500_000,
    repeats=0.05,
    swaps=0.05,
    lifetime_s=120.0,
    cut_every_s=240.0,
    cut_s=90.0,
    cut_share=0.3,
)
SQUALL = replace(STORM, round_trip_s=0.5, lifetime_s=60.0, cut_every_s=40.0, cut_s=10.0)
"""What shows something within a minute or two."""

RESTART_S = 20.0
"""Seconds that a broker lives."""

FLEET = """\
[job]
name = "weather"
rounds = {rounds}
devices = {devices}
density = 0.5
deadline_s = 1800

[job.recipe]
epochs = 2
lr = 0.05
momentum = 0.9

[model]
path = "model.onnx"

[evaluation]
data = "evaluation.npz"

[server]
broker = "mqtt://127.0.0.1:{port}"
state = "state"
"""

ENDLESS = 100_000
_POLL_S = 0.5


def compare(folder: Path, devices: int, seconds: float, weather: Weather = STORM, seed: int = 0) -> dict[str, Any]:
    """Both runs, side by side, in an empty folder. After `seconds` the round that continues is the last one in bad
    weather; `seed` keys the weather. Raises `FedpruneError` if a process died that should live, or the last round
    doesn't end in four times that time and ten minutes."""
    names = [f"board-{i:02}" for i in range(devices)]
    material = folder / "material"
    material.mkdir()
    hands = deal_digits(names, seed=0)
    (material / "model.onnx").write_bytes(digits_model())
    np.savez(material / "evaluation.npz", x=hands.x, y=hands.y)
    for name in names:
        write_device_data(material / f"{name}.npz", hands.devices[name])
    storm, stormy = _run(folder / "storm", material, names, weather, seconds, None, seed)
    calm, peaceful = _run(folder / "calm", material, names, Weather(), seconds, len(storm), seed)
    rounds = {"storm": storm, "calm": calm}
    return {
        **stormy,
        "devices": devices,
        "weather": asdict(weather),
        "restart_s": RESTART_S,
        "rounds": len(storm),
        "counted": [sum(d["progress"] == "folded" for d in r["devices"].values()) for r in storm],
        "same_model": [a["model"] == b["model"] for a, b in zip(storm, calm, strict=True)],
        "accuracy": {kind: [r["metrics"].get("accuracy") for r in found] for kind, found in rounds.items()},
        "seconds": {"storm": stormy["seconds"], "calm": peaceful["seconds"]},
    }


def _run(
    folder: Path, material: Path, names: list[str], weather: Weather, seconds: float, rounds: int | None, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder.mkdir()
    for path in material.iterdir():
        (folder / path.name).symlink_to(path)
    with site(folder) as place:
        return asyncio.run(_weathered(place, names, weather, seconds, rounds, seed))


async def _weathered(
    place: Site, names: list[str], weather: Weather, seconds: float, rounds: int | None, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run until as many rounds are over, or the first that ends after so many seconds. Returns the server's summaries;
    and how long it took, what the proxy did, how many brokers were killed, and by way the bytes that were asked for,
    sent and that arrived per byte of the blobs: of all, of the worst."""
    proxy, began, restarts = Proxy(weather, place.port, seed), time.monotonic(), 0
    await proxy.start()
    config = place.folder / "fleet.toml"
    config.write_text(FLEET.format(rounds=rounds or ENDLESS, devices=len(names), port=place.port))
    place.broker()
    await asyncio.to_thread(place.server, config)
    for name in names:
        place.board(name, "raspberry-pi-4b", place.folder / f"{name}.npz", proxy.port)
    killed, done, enough = time.monotonic(), 0, 0
    while True:
        await asyncio.sleep(_POLL_S)
        lived = time.monotonic() - began
        if rounds is None and time.monotonic() - killed > RESTART_S:
            killed, restarts = time.monotonic(), restarts + 1
            place.kill("broker")
            await asyncio.to_thread(place.broker)
        dead = [n for n in ("server", *names) if not place.is_alive(n)]
        done = len(_finished(place.folder / "state"))
        if rounds is not None and done >= rounds:
            break
        if rounds is None and lived > seconds:
            enough = enough or done + 1  # the round that continues now must end, too
            if done >= enough:
                break
        if dead or lived > 4 * seconds + 600:
            who = ", ".join(dead) or f"round {done + 1}"
            raise FedpruneError(
                f"{who} came to no good end", hint=place.log_text(dead[0] if dead else "server")[-2000:]
            )
    for name in (*names, "server"):
        place.stop(name)
    await proxy.stop()
    done_by = {"events": dict(proxy.tally.events), "restarts": restarts, "ratios": proxy.tally.table()}
    return _finished(place.folder / "state"), {"seconds": lived, **done_by}


def _finished(state: Path) -> list[dict[str, Any]]:
    try:
        with Storage.open_existing(state) as storage:
            return storage.rounds()
    except StorageError:
        return []  # it is just being made


def verdict(found: dict[str, Any], noise: float, most: float) -> list[str]:
    """What is not as it should be: accuracies may differ by `noise` where not every update counted, and the bytes of a
    blob may be fetched `most` times."""
    faults = []
    short = [i + 1 for i, n in enumerate(found["counted"]) if n < found["devices"]]
    if short:
        faults.append(f"rounds {short} went without some boards")
    last = found["accuracy"]["storm"][-1], found["accuracy"]["calm"][-1]
    if abs(last[0] - last[1]) > noise:
        faults.append(f"the last round's accuracy is {last[0]:.3f}, and {last[1]:.3f} in calm weather")
    for way in ("down", "up"):
        _, worst = found["ratios"][f"{way} arrived"]
        if worst > most:
            faults.append(f"the bytes of a blob on the way {way} were fetched {worst:.2f} times")
    return faults
