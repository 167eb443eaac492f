"""How much of a model boards keep: thirty nets planned for every shipped board, by two versions of the planner.

    python benchmarks/planned_nets.py [--before COMMIT] [--raw FOLDER]

Both versions plan the same architectures, profiles, recipe (the default one, batches of 32) and number of samples. The
earlier one is read from the repository's history. Some of the plans, and the four in `EXPORTS`, are carried out: the
model is exported for the board and `fedprune-device train` trains the bundle for a few steps. The high-water mark of
that process's resident memory is compared with the plan's limit. RLIMIT_DATA of twice the limit ends a process that
runs away; at the limit itself it would refuse what onnxruntime's arena reserves and never touches.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "e326d881"
SAMPLES = 1000
"""Local samples, as `fedprune-export` takes them by default."""

STEPS = 2

TIMM = (
    "resnet10t", "resnet18", "resnet50", "regnetx_002", "densenet121", "repvgg_a0", "mobilenetv1_100",
    "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small_035", "efficientnet_b0", "mixnet_s",
    "mnasnet_small", "semnasnet_050", "fbnetc_100", "tinynet_e", "lcnet_035", "ghostnet_050", "repvit_m0_9",
    "fasternet_t0", "starnet_s050", "convnext_atto",
)  # fmt: skip
"""Networks of timm, for images of 224 pixels."""

OWN = ("lenet", "vgg11_bn", "resnet20_bn", "concat_net", "unet", "unet_bn", "gru_net")
"""Networks of `tests/support/nets/small_nets.py`, and a net for signals."""

LABELS = {"unet": "multi", "unet_bn": "multi"}

EXPORTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("efficientnet_b0", "jetson-orin-nano", {}),
    ("unet", "raspberry-pi-zero-2w", {}),
    ("gru_net", "raspberry-pi-zero-2w", {"batch_size": 64}),
    ("mobilenetv3_small_100", "raspberry-pi-zero-2w", {"batch_size": 4}),
)
"""Exports that the earlier planner made narrow or refused: net, board, and what the recipe has besides."""

MEASURED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("unet_bn", "raspberry-pi-zero-2w", {}),
    ("resnet20_bn", "raspberry-pi-zero-2w", {}),
    ("lcnet_035", "raspberry-pi-3b-plus", {}),
)
"""Further plans that are carried out."""


def module(name: str) -> Any:
    """A net by name."""
    sys.path.insert(0, str(ROOT / "tests"))
    from planner import nets as shared

    from support.nets import published_nets as zoo
    from support.nets import small_nets as nets

    if name == "Signals":
        return shared()[name]
    return zoo.timm_model(name, 224) if name in TIMM else getattr(nets, name)()


def architectures(folder: Path) -> None:
    """Write the architecture of every net that isn't in a folder yet."""
    from fedprune_export.importing import export_torch, import_onnx

    for name in (*OWN, "Signals", *TIMM):
        path = folder / f"{name}.json"
        if not path.exists():
            print(f"importing {name}", file=sys.stderr)
            path.write_text(import_onnx(export_torch(module(name)), name).architecture.to_json())


def plans(folder: Path) -> list[dict[str, Any]]:
    """Plan each architecture of a folder for every shipped board, as exports do; the earlier version can, too."""
    try:
        from fedprune.core.errors import PlanError
        from fedprune.model.architecture import Architecture
        from fedprune.model.recipe import Recipe
        from fedprune.planning import profile_store
        from fedprune.planning.cost_prediction import TOO_LOW
        from fedprune.planning.costs import costs_at
        from fedprune.planning.plan import plan
    except ImportError:  # the earlier version's modules
        errors, costs, profile_store, models, plans, recipes = map(
            importlib.import_module,
            (f"fedprune.{name}" for name in ("errors", "costs", "profile_store", "architecture", "plan", "recipe")),
        )
        PlanError, costs_at, Architecture = errors.PlanError, costs.costs_at, models.Architecture
        plan, Recipe, margin = plans.plan, recipes.Recipe, {}
    else:
        margin = {"margin": TOO_LOW}

    rows = []
    for path in sorted(folder.glob("*.json")):
        architecture = Architecture.from_json(path.read_text())
        whole = costs_at(architecture, architecture.sizes).parameters
        recipe = Recipe(loss="bce" if LABELS.get(path.stem) == "multi" else "cross_entropy")
        for name in sorted(profile_store.shipped()):
            row: dict[str, Any] = {"net": path.stem, "board": name, "parameters": whole}
            try:
                made = plan(architecture, profile_store.find(name), recipe, SAMPLES, **margin)
            except PlanError as error:
                rows.append({**row, "kept": 0.0, "error": str(error)})
                continue
            seen = made.prediction
            row |= {"kept": seen.parameters / whole, "predicted_bytes": seen.memory_bytes, "bound": made.bound}
            rows.append({**row, "accumulate": getattr(made, "accumulate", 1)})
    return rows


def planned_by(commit: str | None, folder: Path) -> list[dict[str, Any]]:
    """The plans of this version or of a commit's, made in a process of its own."""
    command = [sys.executable, __file__, "--plans", str(folder)]
    with tempfile.TemporaryDirectory() as scratch:
        places = [str(ROOT / "toolkit")]
        if commit is not None:
            archive = subprocess.run(
                ["git", "archive", commit, "toolkit", "hardware_profiles"], cwd=ROOT, check=True, capture_output=True
            )
            subprocess.run(["tar", "x", "-C", scratch], input=archive.stdout, check=True)
            places = [str(Path(scratch) / "toolkit")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    return rows


def carried_out(net: str, board: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Export a net for a board, and train the bundle within the plan's memory."""
    from fedprune.core.errors import PlanError
    from fedprune.planning.profile_store import find
    from fedprune_export.cli.main import main as export

    sys.path.insert(0, str(ROOT / "tests"))
    row: dict[str, Any] = {"net": net, "board": board, "recipe": changes}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        source = f"timm:{net}" if net in TIMM else f"support.nets.small_nets:{net}"
        options = ["--input-shape", "3,224,224"] if net in TIMM else []
        for key, value in changes.items():
            options += ["--set", f"{key}={value}"]
        if net in LABELS:
            options += ["--labels", LABELS[net]]
        command = [source, "--target", board, "--samples", str(SAMPLES), *options, "--out", str(folder / "bundle")]
        if code := export(command):
            return {**row, "kept": 0.0, "error": f"fedprune-export ended with {code} ({PlanError.__name__})"}
        report = json.loads((folder / "bundle" / "report.json").read_text())
        row |= {
            "kept": report["after"]["parameters"] / report["before"]["parameters"],
            "accumulate": report["plan"]["accumulate"],
            "predicted_bytes": report["plan"]["prediction"]["memory_bytes"],
            "limit_bytes": find(board).training_bytes,
        }
        return {**row, **trained(folder, row["limit_bytes"], net)}


def trained(folder: Path, limit: int, net: str) -> dict[str, Any]:
    """Train a folder's bundle on noise by `fedprune-device train`, in a process with so much memory."""
    from fedprune.runtime.bundle import open_bundle

    bundle = open_bundle(folder / "bundle")
    shape, classes = bundle.architecture.input_shape, bundle.architecture.classes
    write_samples(folder / "samples.npz", shape, classes, many=net in LABELS)
    code = "import sys; from fedprune_device.cli.main import main; code = main(sys.argv[1:]); "
    code += (
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", "--bundle", str(folder / "bundle"), "--threads", "1"]
    command += ["--data", str(folder / "samples.npz"), "--out", str(folder / "trained")]
    command += ["--set", f"max_steps={STEPS}", "--lr", "1e-6"]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_DATA, (2 * limit, 2 * limit)),
    )
    peaks = [int(line.split()[1]) * 1024 for line in run.stderr.splitlines() if line.startswith("VmHWM")]
    if run.returncode or not peaks:
        return {"exit_code": run.returncode, "said": run.stderr[-500:]}
    return {"exit_code": 0, "peak_bytes": peaks[0]}


def write_samples(path: Path, shape: tuple[int, ...], classes: int, *, many: bool) -> None:
    """Noise, and labels that fit it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, *shape), dtype=np.float32)
    y = rng.integers(0, 2, (SAMPLES, classes)).astype(np.uint8) if many else rng.integers(0, classes, SAMPLES)
    np.savez(path, x=x, y=y)


def page(about: dict[str, Any], result: dict[str, Any]) -> str:
    """The results as a page."""
    before = {(r["net"], r["board"]): r for r in result["before"]}
    boards = sorted({r["board"] for r in result["after"]})
    rows: dict[str, list[str]] = {}
    for r in result["after"]:
        old, new = before[r["net"], r["board"]]["kept"], r["kept"]
        parts = f" ({r['accumulate']})" if r.get("accumulate", 1) > 1 else ""
        now = f"{new:.0%}{parts}"
        rows.setdefault(r["net"], []).append(now if round(old, 2) == round(new, 2) else f"{old:.0%} → **{now}**")
    head = "| net | " + " | ".join(boards) + " |\n|---|" + "---|" * len(boards)
    table = "\n".join(f"| {net} | " + " | ".join(cells) + " |" for net, cells in rows.items())
    whole = [sum(r["kept"] >= 0.95 for r in result[side]) for side in ("before", "after")]
    poor = [sum(r["kept"] < 0.25 for r in result[side]) for side in ("before", "after")]
    lines = []
    for r in result["measured"]:
        name = f"{r['net']}" + "".join(f", {k} {v}" for k, v in r["recipe"].items())
        cells = [name, r["board"], f"{r['kept']:.0%}", str(r.get("accumulate", "–"))]
        cells += [_mb(r.get(key)) for key in ("predicted_bytes", "limit_bytes", "peak_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    count = len(result["after"])
    nets = len(rows)
    return f"""# What boards keep of a model

{about["date"]}, {about["cpu"]}, Python {about["python"]}, onnxruntime {about["onnxruntime"]}.
`python benchmarks/planned_nets.py`

{nets} nets (those of timm for images of 224 pixels) planned for the {len(boards)} shipped profiles: the default recipe
with batches of 32 and {SAMPLES:,} local samples, no deadline. Cells have the share of the weights that is kept, by the
planner of {result["commit"]} and, after the arrow, by today's; one number where both keep the same. In brackets: parts
of a batch (`accumulate`), where they are more than one. 0 % means that no width fits.

Of {count} plans {whole[0]} kept at least 95 % of the weights before and {whole[1]} do now; {poor[0]} kept less than
25 % before and {poor[1]} do now.

{head}
{table}

## Plans that were carried out

Each model was exported for its board, and `fedprune-device train` trained the bundle for {STEPS} steps on
{SAMPLES:,} samples of noise, evaluations included. The peak is the kernel's high-water mark of resident memory (VmHWM),
mapped libraries included; the limit is what the board has for training, of which a plan without a probe leaves 5 %
free. The two are compared; no control group enforces the limit, since
the machine's cgroup v2 has no memory controller. {_beyond(result["measured"])}

| net | board | kept | parts | predicted MB | limit MB | peak MB |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _beyond(rows: list[dict[str, Any]]) -> str:
    """Which processes took more than their board has for training."""
    over = [f"{r['net']} on {r['board']}" for r in rows if r.get("peak_bytes", 0) > r.get("limit_bytes", 0)]
    return (
        f"These took more, so that their prediction is too low: {', '.join(over)}." if over else "All stay within it."
    )


def _mb(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.0f}"


def main() -> None:
    """Plan, measure, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--import-only", action="store_true", help="only write the architectures to --raw")
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="the earlier version")
    parser.add_argument("--raw", type=Path, metavar="FOLDER", help="where architectures are kept between runs")
    arguments = parser.parse_args()
    if arguments.plans:
        print(json.dumps(plans(arguments.plans)))
        return
    from synthetic_nets import setting, write

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.raw or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        architectures(folder)
        if arguments.import_only:
            return
        result: dict[str, Any] = {"setting": setting("onnxruntime"), "commit": arguments.before}
        result |= {"before": planned_by(arguments.before, folder), "after": planned_by(None, folder)}
    result["measured"] = [carried_out(*case) for case in (*EXPORTS, *MEASURED)]
    write("planned_nets", result, page(result["setting"], result))


if __name__ == "__main__":
    main()
