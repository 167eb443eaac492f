"""Which of timm's networks can be imported, cut and trained, and how exactly: `python benchmarks/timm_models.py`.

    python benchmarks/timm_models.py [--only NAME ...] [--jobs 2] [--fresh] [--folder build/timm_models]

Each network is taken with ten classes, small images and random weights, in a process of its own with a limit of memory
and time. It is imported; cut to random channels at several densities and run at a batch size that the import didn't
use, beside the masked whole network; and its training step's gradients are compared with torch's in float64.

*At full width* the reference is timm's own module. *At half width* no module exists (timm's have head counts, group
counts and window shapes written into their code), so the cut graph itself is run by torch
(`tests/support/oracles/torch_graph.py`) in float64 and differentiated by torch: that its values are right is what the
cut's distance says. "torch's float32" is the same module, or the same graph, in float32. Batch normalisations take
the batch's statistics, everything else is as in evaluation (no dropout).

Deep networks with ReLUs decide now and then for the other side of zero in float32, whoever computes: distances are
medians over several batches. Results of finished networks are kept in the folder, so that a broken run continues where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from synthetic_nets import setting, write
from timm_networks import NETWORKS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

BATCH = 4
SEEDS = 5
LIMIT_SECONDS = 240
"""Of processor time; by the clock it is five times as much, for machines with neighbours."""

LIMIT_BYTES = 12 * 2**30
DENSITIES = (0.5, 0.25, 0.75, 0.001)
FLOOR = 2.0**-21
"""A relative distance of gradients that counts as none, as in `tests/support/oracles/gradient_distance.py`."""
BOUND = 1e-5
"""Largest relative distance of a cut network from the masked whole one."""


def module_of(name: str) -> Any:
    """The network with weights that hide nothing: no scale is nought, and no vector is uniform."""
    from support.nets.published_nets import timm_model
    from support.nets.whole_models import scattered, settled

    return settled(scattered(timm_model(name, **NETWORKS.get(name, {}))))


# -- one network, in its own process ----------------------------------------------------------------------------------


class Record:
    """What is known of a network so far, on disk after every step."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.body: dict[str, Any] = {"name": name, "seconds": {}, "failed": "start", "error": "killed at its limit"}

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        """Do a step; if the process dies in it, the record says so."""
        self.body |= {"failed": name, "error": f"stopped after {LIMIT_SECONDS} s or {LIMIT_BYTES >> 30} GiB"}
        self.write()
        start = time.process_time()
        try:
            out = action()
        except Exception as error:
            self.body["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            self.write()
            raise SystemExit(1) from error
        self.body["seconds"][name] = round(time.process_time() - start, 2)
        self.body |= {"failed": "", "error": ""}
        self.write()
        return out

    def write(self) -> None:
        self.path.write_text(json.dumps(self.body, indent=1) + "\n")


def child(name: str, folder: Path, exports: Path | None) -> None:
    """Measure one network."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
    import torch

    torch.set_num_threads(1)
    from fedprune_export.importing import export_torch, import_onnx

    record = Record(folder / f"{name}.json", name)

    def exported() -> bytes:
        held = exports / f"{name}.onnx" if exports else None
        if held and held.exists():
            return held.read_bytes()
        raw = export_torch(module_of(name), name=name)
        if held:
            held.write_bytes(raw)
        return raw

    raw = record.step("export", exported)
    model = record.step("import", lambda: import_onnx(raw, name))
    record.body |= {
        "input": list(model.architecture.input_shape),
        "nodes": len(model.graph.nodes),
        "parameters": sum(v.size for v in model.tensors.values()),
        "groups": len(model.architecture.groups),
        "channels": sum(model.architecture.sizes),
        "notes": list(model.notes),
    }
    record.step("cut", lambda: cuts(record, model))
    record.step("gradients", lambda: gradients(record, model, name))


def cuts(record: Record, model: Any) -> None:
    """Distances of cut networks from the masked whole one."""
    from support.oracles.cutting import cut_error, random_selection

    found: dict[str, float] = {}
    record.body["cuts"] = found
    for density in DENSITIES:
        selection = random_selection(model, density, seed=int(density * 100))
        if density == 0.5:
            kept = sum(v.size for v in selection.gather(model.tensors).values())
            record.body["kept"] = kept / record.body["parameters"]
        found["one" if density < 0.01 else str(density)] = cut_error(model, selection, BATCH)


def gradients(record: Record, model: Any, name: str) -> None:
    """Distances of our gradients and of torch's float32 ones from float64, at full and at half width."""
    import numpy as np

    from fedprune.model.selection import Selection
    from fedprune_export.pruning.cut import cut
    from support.nets.whole_models import pictures
    from support.oracles.cutting import random_selection
    from support.oracles.gradient_distance import Trained

    arch = model.architecture
    trained = Trained(model)
    record.body["training_nodes"] = len(trained.graph.nodes)
    batches = []
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, 7])
        x = pictures(rng, (BATCH, *arch.input_shape))
        batches.append((x, rng.integers(0, arch.classes, BATCH)))
    record.body["gradients"] = {}
    for width, selection in (("full", Selection.full(arch)), ("half", random_selection(model, 0.5, seed=50))):
        tensors = selection.gather(model.tensors)
        graph = cut(model, selection)
        record.body["oracle"] = max(record.body.get("oracle", 0.0), off(graph, tensors, arch))
        far = trained.distances(module_of(name) if width == "full" else graph, tensors, batches)
        worst = far.worst
        record.body["gradients"][width] = {
            "near": far.near,
            "ours": far.ours,
            "torch": far.torch,
            "flipped": [len(far.flipped(far.ours)), len(far.flipped(far.torch))],
            "calm": [far.calm(far.ours), far.calm(far.torch)],
            "worst_tensor": {
                "name": worst,
                "ours": median(far.ours_each[worst]),
                "torch": median(far.torch_each[worst]),
            },
        }
        record.write()


def off(graph: Any, tensors: Any, architecture: Any) -> float:
    """How far a graph's logits by torch in float64, in evaluation, are from those by onnxruntime."""
    import numpy as np
    import torch

    from support.oracles.cutting import distance, outputs
    from support.oracles.torch_graph import run

    x = np.random.default_rng(3).standard_normal((BATCH, *architecture.input_shape)).astype(np.float32)
    state = {n: torch.tensor(v, dtype=torch.float64) for n, v in tensors.items()}
    return distance(run(graph, state, torch.tensor(x), training=False).numpy(), outputs(graph, x))


# -- all networks -----------------------------------------------------------------------------------------------------


def verdict(record: dict[str, Any]) -> dict[str, Any]:
    """Which steps went well."""
    order = ("export", "import", "cut", "gradients")
    failed = order.index(record["failed"]) if record["failed"] in order else len(order) if not record["failed"] else -1
    cut_ok = failed > 2 and all(d <= BOUND for d in record["cuts"].values()) and record["groups"] > 0
    near = failed > 3 and all(g["near"] for g in record["gradients"].values())
    return {"import": failed > 1, "cut": cut_ok, "gradients": near}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A network's record, measured in a child process unless it is there already."""
    path = options.folder / f"{name}.json"
    if not path.exists() or options.fresh:
        path.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--child", name, "--folder", str(options.folder)]
        command += ["--exports", str(options.exports)] if options.exports else []
        error = ""
        try:
            done = subprocess.run(
                command,
                timeout=5 * LIMIT_SECONDS,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            error = (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            error = f"stopped after {5 * LIMIT_SECONDS} s by the clock"
        if not path.exists():
            path.write_text(json.dumps({"name": name, "failed": "start", "error": error, "seconds": {}}))
    record: dict[str, Any] = json.loads(path.read_text())
    marks = verdict(record)
    print(f"{name:34s} {' '.join(k for k, v in marks.items() if v):24s} {record['error'][:120]}", flush=True)
    return record


def page(about: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The table, what failed, and what the numbers say."""
    marks = [verdict(r) for r in records]
    counts = {k: sum(m[k] for m in marks) for k in marks[0]}
    sides = [(r, w, g) for r in records for w, g in r.get("gradients", {}).items()]
    plain = sum(median(g["ours"]) <= max(FLOOR, 2 * median(g["torch"])) for _, _, g in sides)
    flips = [sum(g["flipped"][e] for _, _, g in sides) for e in (0, 1)]
    worst_cut = max((d for r in records for d in r.get("cuts", {}).values()), default=0.0)
    cpu = sum(sum(r["seconds"].values()) for r in records)
    text = f"""{len(records)} networks: {counts["import"]} are imported, {counts["cut"]} of these cut right, and
    {counts["gradients"]} give gradients no further from torch in float64 than twice torch's float32, at full and at
    half width. The cut network that is furthest from its masked whole one is {worst_cut:.1e} off (the bound is
    {BOUND:g}). In {flips[0]} of {len(sides) * SEEDS} batches a decision of ours fell to the other side of zero, in
    {flips[1]} of
    torch's; over all batches alike our medians are within twice torch's in {plain} of {len(sides)} rows, and without
    these in all that are counted as right. {cpu / 60:.0f} minutes of processor time."""
    oracle = max(r.get("oracle", 0.0) for r in records)
    lines = []
    for record, mark in zip(records, marks, strict=True):
        cuts = max(record.get("cuts", {}).values(), default=None)
        cells = [
            record["name"] + given(record["name"]),
            "×".join(map(str, record.get("input", []))),
            f"{record['parameters'] / 1e6:.2f}" if "parameters" in record else "",
            str(record.get("groups", "")),
            f"{record['kept']:.2f}" if "kept" in record else "",
            "" if cuts is None else f"{cuts:.0e}" + ("" if mark["cut"] else " **!**"),
        ]
        for width in ("full", "half"):
            found = record.get("gradients", {}).get(width)
            cells.append("" if not found else pair(found["calm"]) + ("" if found["near"] else " **!**"))
            cells.append("" if not found else "{} / {}".format(*found["flipped"]))
        lines.append("| " + " | ".join(cells) + " |")
    failures = [f"- {r['name']}, {r['failed']}: {r['error']}" for r in records if r["failed"]]
    failures += [
        f"- {r['name']}, gradients at {w} width: {pair(g['calm'])}, flipped {g['flipped'][0]} / {g['flipped'][1]}; "
        f"furthest beside torch's is {g['worst_tensor']['name']}"
        for r, w, g in sides
        if not g["near"]
    ]
    failures += [
        f"- {r['name']}, cut: {'nothing can be cut' if not r['groups'] else max(r['cuts'].values())}"
        for r, m in zip(records, marks, strict=True)
        if len(r.get("cuts", {})) == len(DENSITIES) and not m["cut"]
    ]
    stays = [f"- {r['name']}: {brief(r['notes'])}" for r in records if any("stay" in n for n in r.get("notes", []))]
    table, failed, held = "\n".join(lines), "\n".join(failures) or "Nothing.", "\n".join(stays) or "Nothing."
    return f"""# What of timm can be imported, cut and trained

{about["date"]}, {about["cpu"]}, one thread, Python {about["python"]}, onnxruntime {about["onnxruntime"]}, torch
{about["torch"]}, timm {about["timm"]}, onnx {about["onnx"]}. `python benchmarks/timm_models.py`

{fill(text)}

*cut*: largest relative distance of the cut from the masked whole network, at densities .5, .25, .75 and one channel per
group, batch {BATCH}. *kept*: share of the parameters that is left at density .5. *gradients*: relative L2 distance of
all gradients together from float64, ours / torch's float32, median of {SEEDS} batches of {BATCH} samples without those
in which a decision flipped (of which the number is beside it). A batch counts as flipped if it is more than ten times
as far off as the best one of either engine; where both engines flip in every batch, that can't be told. A row is right
if ours is at most twice torch's, or {FLOOR:.1e}, flips at most in two more batches, and is in no batch further off than
1 % or twice torch's furthest. At full width the reference is timm's module; at half width it is the cut graph, run by
torch, whose logits in float64 are at most {oracle:.0e} from onnxruntime's.

| network | input | parameters (M) | groups | kept | cut | gradients, full width | flipped | half width | flipped |
|---|---|---|---|---|---|---|---|---|---|
{table}

## What failed

{failed}

## Channels that stay

{held}
"""


def given(name: str) -> str:
    """What a network was given besides the image size, where it isn't timm's own."""
    more = [f"{k}={v}" for k, v in NETWORKS.get(name, {}).items() if k not in ("img_size", "size")]
    return f" ({', '.join(more)})" if more else ""


def pair(both: list[float]) -> str:
    return f"{both[0]:.1e} / {both[1]:.1e}"


def brief(notes: list[str]) -> str:
    """The notes about channels that stay, the first two in full."""
    held = [n for n in notes if "stay" in n]
    return " ".join(held[:2]) + (f" And {len(held) - 2} more." if len(held) > 2 else "")


def fill(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what of timm can be imported, cut and trained.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these networks, and no page")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="measure finished networks again")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "timm_models", help="for unfinished runs")
    parser.add_argument("--exports", type=Path, help="a folder in which exported networks are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.exports:
        options.exports.mkdir(parents=True, exist_ok=True)
    if options.child:
        child(options.child, options.folder, options.exports)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        records = list(pool.map(lambda n: measure(n, options), options.only or NETWORKS))
    marks = [verdict(r) for r in records]
    print({k: sum(m[k] for m in marks) for k in marks[0]}, "of", len(records))
    if not options.only:
        about = setting("onnxruntime", "torch", "timm", "onnx")
        body = {"setting": about, "bound": BOUND, "batch": BATCH, "seeds": SEEDS, "networks": records}
        write("timm_models", body, page(about, records))


if __name__ == "__main__":
    main()
