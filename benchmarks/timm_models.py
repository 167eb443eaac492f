"""Which of timm's networks can be imported, cut and trained, and how exactly: `python benchmarks/timm_models.py`.

    python benchmarks/timm_models.py [--only NAME ...] [--jobs 2] [--fresh] [--folder build/timm_models]

Each network is taken with ten classes, small images and random weights, in a process of its own with a limit of memory
and time. It is imported; cut to random channels at several densities and run at a batch size that the import didn't
use, beside the masked whole network; and its training step's gradients are compared with torch's in float64.

*At full width* the reference is timm's own module. *At half width* no module exists (timm's have head counts, group
counts and window shapes written into their code), so the cut graph itself is run by torch (`tests/torch_graph.py`) in
float64 and differentiated by torch: that its values are right is what the cut's distance says. "torch's float32" is the
same module, or the same graph, in float32. Batch normalisations take the batch's statistics, everything else is as in
evaluation (no dropout).

Deep networks with ReLUs decide now and then for the other side of zero in float32, whoever computes: distances are
medians over several batches. Results of finished networks are kept in the folder, so that a broken run goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

BATCH = 4
SEEDS = 5
LIMIT_SECONDS = 300
LIMIT_BYTES = 12 * 2**30
BOUND = 1e-5
"""Largest relative distance of a cut network from the masked whole one."""

NETWORKS: dict[str, dict[str, Any]] = {
    # residual networks and what grew out of them
    "resnet10t": {},
    "resnet18": {},
    "resnet50": {},
    "legacy_seresnet18": {},
    "seresnext26d_32x4d": {},
    "skresnet18": {},
    "botnet26t_256": {"img_size": 64},
    "lambda_resnet26t": {},
    "gcresnext26ts": {},
    "regnetx_002": {},
    "regnety_002": {},
    "regnetz_005": {},
    "nf_regnet_b0": {},
    "test_nfnet": {},
    "dla46_c": {},
    "hrnet_w18_small": {},
    "selecsls42": {},
    "densenet121": {},
    "ese_vovnet19b_slim_dw": {},
    "cs3darknet_s": {},
    "inception_v3": {"size": 96},
    "repvgg_a0": {},
    "mobileone_s0": {},
    # mobile networks
    "mobilenetv1_100": {},
    "mobilenetv2_100": {},
    "mobilenetv3_small_100": {},
    "mobilenetv4_conv_small_035": {},
    "efficientnet_b0": {},
    "mixnet_s": {},
    "mnasnet_small": {},
    "semnasnet_050": {},
    "fbnetc_100": {},
    "fbnetv3_b": {},
    "tinynet_e": {},
    "lcnet_035": {},
    "hardcorenas_a": {},
    "rexnet_100": {},
    "ghostnet_050": {},
    "repghostnet_050": {},
    "repvit_m0_9": {},
    "fasternet_t0": {},
    "starnet_s050": {},
    "shvit_s1": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {},
    # networks in the manner of transformers
    "convnext_atto": {},
    "convnextv2_atto": {},
    "inception_next_atto": {},
    "poolformer_s12": {},
    "caformer_s18": {},
    "test_mambaout": {},
    "fastvit_t8": {},
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 64},
    # transformers
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56, "size": 56},
    "cait_xxs24_224": {"img_size": 64, "depth": 8},
    "pit_ti_224": {"img_size": 64},
    "convit_tiny": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "depths": (1, 1, 2, 1)},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (1, 1, 2, 1)},
    "pvt_v2_b0": {},
    "levit_128s": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "efficientformerv2_s0": {"img_size": 64},
    "tiny_vit_5m_224": {},
    "swiftformer_xs": {},
}
"""timm's name, and what its constructor is given; `size` is that of the images (64 by default)."""


def module_of(name: str) -> Any:
    """The network with weights that hide nothing: no scale is nought, and no vector is uniform."""
    from whole_models import scattered, settled
    from zoo import timm_model

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
    from cutting import cut_error, random_selection

    found: dict[str, float] = {}
    record.body["cuts"] = found
    for density in (0.5, 0.25, 0.75, 0.001):
        selection = random_selection(model, density, seed=int(density * 100))
        if density == 0.5:
            kept = sum(v.size for v in selection.gather(model.tensors).values())
            record.body["kept"] = kept / record.body["parameters"]
        found["one" if density < 0.01 else str(density)] = cut_error(model, selection, BATCH)


def gradients(record: Record, model: Any, name: str) -> None:
    """Distances of our gradients and of torch's float32 ones from float64, at full and at half width."""
    import numpy as np
    from cutting import random_selection
    from gradient_distance import Trained
    from whole_models import pictures

    from fedprune.selection import Selection
    from fedprune_export.cut import cut

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
                "ours": statistics.median(far.ours_each[worst]),
                "torch": statistics.median(far.torch_each[worst]),
            },
        }
        record.write()


def off(graph: Any, tensors: Any, architecture: Any) -> float:
    """How far a graph's logits by torch in float64, in evaluation, are from those by onnxruntime."""
    import numpy as np
    import torch
    from cutting import distance, outputs
    from torch_graph import run

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
                timeout=LIMIT_SECONDS,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            error = (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            error = f"stopped after {LIMIT_SECONDS} s"
        if not path.exists():
            path.write_text(json.dumps({"name": name, "failed": "start", "error": error, "seconds": {}}))
    record: dict[str, Any] = json.loads(path.read_text())
    marks = verdict(record)
    print(f"{name:34s} {' '.join(k for k, v in marks.items() if v):24s} {record['error'][:120]}", flush=True)
    return record


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
        pass


if __name__ == "__main__":
    main()
