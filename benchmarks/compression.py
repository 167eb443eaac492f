"""Codecs of what travels: what each costs in accuracy and saves in bytes, and how long it takes.

    OMP_NUM_THREADS=1 python benchmarks/compression.py

A simulated fleet on real data, the demo's 8×8 digits. Every setting has the same devices, data, seeds and rounds;
server and boards run their own code. With `--minutes` the program ends after so many, writes what is whole by then, and
continues where it was when it is called again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune.updates import Codec, decode, encode
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "build/compression.json"
KIND = "raspberry-pi-4b"
SETTINGS = (
    ("none", "none"),
    ("zlib", "zlib"),
    ("float16", "none"),
    ("int8", "none"),
    ("top-k:0.2", "none"),
    ("top-k:0.05", "none"),
    ("top-k:0.01", "none"),
    ("none", "float16"),
    ("none", "int8"),
    ("int8", "int8"),
    ("int4", "int4"),
    ("ternary", "ternary"),
    ("top-k:0.05", "int8"),
)
"""Codecs of updates and of weights."""

LAST = 3
"""Accuracy is the mean over so many of the last rounds: single rounds of unequal devices go up and down."""


def digits(seed: int) -> tuple[Model, list[VirtualDevice], Any, Job]:
    """Six devices with the demo's digits."""
    names = [f"d{i}" for i in range(6)]
    data = deal(names, seed=seed)
    devices = [VirtualDevice(n, find(KIND), data.devices[n]) for n in names]
    recipe = Recipe(epochs=2, batch_size=16, lr=0.02)
    job = Job(name="digits", seed=seed, rounds=25, devices=6, density=0.75, recipe=recipe)
    return import_onnx(digits_model(), "digits"), devices, (data.x, data.y), job


SETS: dict[str, tuple[Callable[[int], tuple[Model, list[VirtualDevice], Any, Job]], int]] = {
    "digits": (digits, 3),
}
"""How a fleet is made, and for how many seeds."""


def run(name: str, seed: int, up: str, down: str) -> dict[str, Any]:
    """Accuracy by round, and bytes of updates and of weights that a device causes per round."""
    model, devices, evaluation, job = SETS[name][0](seed)
    job = Job.from_dict({**job.to_dict(), "compression": up, "compression_down": down})
    rows: list[tuple[int, int]] = []
    known: set[tuple[int, str]] = set()

    def note(run: Simulation) -> None:
        for device, task in run.state.tasks.items():
            if task.offer is not None and (run.state.round, device) not in known:
                known.add((run.state.round, device))
                sent = task.offer.get("coded") or task.offer["weights"]
                moved = task.offer.get("moved") or {"size": 0}
                rows.append((run.state.round, int(sent["size"]) + int(moved["size"])))

    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder) / "blobs", durable=False)
        simulation = Simulation(Experiment(name, job, model, devices, evaluation), store)
        history = simulation.run(note)
        updates = [v[1] for notes in simulation._run.rounds.values() for v in notes.devices.values()]
    return {
        "set": name,
        "seed": seed,
        "update": up,
        "weights": down,
        "accuracy": [r["metrics"]["accuracy"] for r in history],
        "counted": sum(p["progress"] == "folded" for r in history for p in r["devices"].values()),
        "up": statistics.mean(updates),
        "down": statistics.mean(size for _, size in rows),
        "down_later": statistics.mean(size for number, size in rows if number > 1),
    }


def times() -> list[dict[str, Any]]:
    """Milliseconds to encode and decode an update of the CIFAR-10 net, medians."""
    from benchmarks.accuracy import nets

    model = nets.model("small_cnn", (3, 16, 16), 10, 0)
    trained = {t.name for t in model.architecture.trainable}
    rng = np.random.default_rng(0)
    sent = {n: np.asarray(v, np.float32) for n, v in model.tensors.items()}
    new = {n: (v + 0.003 * rng.standard_t(4, v.shape)).astype(np.float32) for n, v in sent.items()}
    rows = []
    for text in sorted({up for up, _ in SETTINGS} - {"none"}):
        codec = Codec.parse(text)
        if codec is None:
            continue
        raw, _ = encode(codec, new, sent, trained)
        taken: dict[str, list[float]] = {"encode_ms": [], "decode_ms": []}
        for _ in range(9):
            begin = time.process_time()
            encode(codec, new, sent, trained)
            middle = time.process_time()
            decode(codec, raw, sent, trained)
            taken["encode_ms"].append(1e3 * (middle - begin))
            taken["decode_ms"].append(1e3 * (time.process_time() - middle))
        plain = len(tensorfile.encode(new))
        rows.append(
            {"codec": text, "bytes": len(raw), "plain": plain} | {k: statistics.median(v) for k, v in taken.items()}
        )
    return rows


def row(cells: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """One setting's line of a table."""

    def final(cell: dict[str, Any]) -> float:
        return statistics.mean(cell["accuracy"][-LAST:])

    found, plain = [final(c) for c in cells], [final(c) for c in base]
    differences = [100 * (a - b) for a, b in zip(found, plain, strict=True)]
    spread = f"{min(differences):+.1f} to {max(differences):+.1f}"
    up, down = (statistics.mean(c[k] for c in cells) for k in ("up", "down_later"))
    up_plain, down_plain = (statistics.mean(c[k] for c in base) for k in ("up", "down_later"))
    return (
        f"| `{cells[0]['update']}` | `{cells[0]['weights']}` | {100 * statistics.mean(found):.1f} "
        f"| {statistics.mean(differences):+.1f} ({spread}) "
        f"| {up / 1e3:.1f} ({up / up_plain:.1%}) | {down / 1e3:.1f} ({down / down_plain:.1%}) |"
    )


def page(result: dict[str, Any]) -> str:
    """The results as a page."""
    about, tables = result["setting"], []
    for name, (make, seeds) in SETS.items():
        cells = [c for c in result["runs"] if c["set"] == name]
        base = [c for c in cells if (c["update"], c["weights"]) == SETTINGS[0]]
        of = {s: [c for c in cells if (c["update"], c["weights"]) == s] for s in SETTINGS}
        lines = [row(found, base) for found in of.values() if len(found) == seeds]
        plain = [100 * statistics.mean(c["accuracy"][-LAST:]) for c in base]
        tables.append(
            f"## {name}\n\n{(make.__doc__ or '').splitlines()[0]} {len(base[0]['accuracy'])} rounds, {seeds} seeds; "
            f"without codecs the seeds end at {min(plain):.1f} to {max(plain):.1f} %.\n\n"
            "| update | weights | accuracy, % | against none, points (seeds) | kB up | kB down |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(lines)
        )
    took = "\n".join(
        f"| `{r['codec']}` | {r['bytes'] / r['plain']:.1%} | {r['encode_ms']:.1f} | {r['decode_ms']:.1f} |"
        for r in result["times"]
    )
    return f"""# Codecs of what travels

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (one used; load {about["load"]} at the end),
Python {about["python"]}, numpy {about["numpy"]}, onnxruntime {about["onnxruntime"]}. `python benchmarks/compression.py`

Real data dealt out unevenly, simulated boards that run the boards' code, channels ranked again in every round. Accuracy
is the mean over the last {LAST} rounds on samples that nobody trains on. Bytes are those of one update, and of the
weights that a device is sent for a round after its first (in the first it holds nothing that they could be the
difference to), with what says where channels have moved; graphs, which are sent once, are not in it. `float16` rounds
the last of eleven bits of a difference; where it is off by as much as the others, chance made that, not the codec.

{chr(10).join(t + chr(10) for t in tables)}
## Time

An update of a whole net for CIFAR-10 ({result["times"][0]["plain"] / 1e3:.0f} kB plainly, moved by random steps),
processor time on one thread.

| codec | of its bytes | encode, ms | decode, ms |
|---|---|---|---|
{took}
"""


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="end after so many, to go on later")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from synthetic_nets import setting, write

    runs: list[dict[str, Any]] = json.loads(PARTS.read_text()) if PARTS.exists() else []
    done = {(c["set"], c["seed"], c["update"], c["weights"]) for c in runs}
    until = time.monotonic() + 60 * arguments.minutes
    left = [(n, seed, *s) for n, (_, seeds) in SETS.items() for s in SETTINGS for seed in range(seeds)]
    for cell in (c for c in left if c not in done):
        if time.monotonic() > until:
            print(f"{len(runs)} of {len(left)} runs are done; call it again to go on")
            break
        runs.append(run(*cell))
        print(*cell, f"{statistics.mean(runs[-1]['accuracy'][-LAST:]):.3f}", flush=True)
        PARTS.parent.mkdir(parents=True, exist_ok=True)
        PARTS.write_text(json.dumps(runs))
    result = {"setting": setting("onnxruntime"), "times": times(), "runs": runs}
    write("compression", result, page(result))


if __name__ == "__main__":
    main()
