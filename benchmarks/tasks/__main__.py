"""Tasks on real data: boards with `fedprune` at half of FedAvg's bytes, FedAvg at full width, and torch on all data.

`python -m benchmarks.tasks` runs what has no result yet: each task, method and seed. Results are in
`benchmarks/results/tasks.json`, and the page is `tasks.md` there; the tables of `docs/tasks` are written, too.

A look changes runs, prints each of their rounds, and writes nothing: fewer rounds, or other settings, such as
`python -m benchmarks.tasks detection --seeds 0 --methods fedprune --changes
'{"options": {"densities": [0.5], "dropout": [], "mixup": 0}, "job": {"compression": "int8"}, "recipe": {"lr": 0.01}}'`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import fedprune_export as fx
from benchmarks.accuracy.protocol import SAME_LOSS
from benchmarks.accuracy.run import commit, machine
from benchmarks.tasks import adapters, data, losses, nets, pictures
from fedprune.core import tensorfile
from fedprune.core.metrics import METRICS
from fedprune.jobs.job import Job
from fedprune.model.recipe import CUSTOM, Recipe
from fedprune.planning.profile_store import find
from fedprune_device.training.objective import Measure, Objective
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.results.run_folder import simulate
from fedprune_server.simulation.simulation import Simulation

RESULTS, DOCS = Path("benchmarks/results"), Path("docs/tasks")
DENSITIES = (1.0, 0.7, 0.5, 0.3)
"""Widths of the boards in turn, whose submodels weigh half of the whole model's on average."""

METHODS = ("torch", "fedavg", "fedprune")
INT8 = "fedprune int8"
"""`fedprune` whose updates and weights travel as int8 differences; all other rows travel as float32."""

FURTHER = (INT8, SAME_LOSS)
"""Rows that pages show where they were run."""

VARIANTS: dict[str, dict[str, Any]] = {
    "fedprune, each step at the board's width": {"dropout": [], "core": 0, "mixup": 0.2},
    SAME_LOSS: {"dropout": [], "densities": [1.0], "mixup": 0.2},
}
"""Options of `fedprune` that show which of its ingredients a task's distance from FedAvg comes from."""

EXPLAINED = ("detection", "embedding", "language", "adapters")
"""Tasks that are run with `VARIANTS`, too."""

BOARD = "raspberry-pi-5"


@dataclass(frozen=True)
class Task:
    """A task: what is learnt from what, how it is trained, and what others report for it."""

    title: str
    deal: Callable[[int], data.Dealt]
    net: Callable[[], torch.nn.Module]
    recipe: Recipe
    rounds: int
    note: str = ""
    densities: tuple[float, ...] = DENSITIES
    own: dict[str, Any] = field(default_factory=dict)


SGD = Recipe(epochs=1, batch_size=32, lr=0.05, momentum=0.9)
ADAM = Recipe(epochs=1, batch_size=32, lr=1e-3, optimizer="adam", momentum=0.0)

TASKS = {
    "speech": Task(
        "Keyword spotting from raw audio: spoken digits, a board per speaker",
        data.speech, nets.Crnn, replace(ADAM, epochs=2, lr=2e-3), 10,
    ),
    "segmentation": Task(
        "Segmentation: CamVid, eight boards with streets of their own",
        data.streets, nets.UNet, replace(SGD, ignore_label=11, metric="miou", batch_size=8, epochs=2), 15,
    ),
    "detection": Task(
        "Detection: digits of MNIST on canvases, ten boards",
        data.objects, nets.Detector, replace(ADAM, loss=CUSTOM, metric=CUSTOM, epochs=3, lr=2e-3), 12,
        note="The score is AP50 without suppression of doubles: every cell's box counts, and only its own object.",
        own={"loss": losses.detection, "metric": losses.AveragePrecision},
    ),
    "forecasting": Task(
        "Forecasting: ETTh1, horizon 96, a patch transformer",
        data.transformer, nets.Patches, replace(ADAM, loss="mse", metric="mae", epochs=2, lr=5e-4), 8,
        note="Published, trained centrally: MSE .370 (PatchTST/64) and .375 (PatchTST/42 and DLinear), MAE .400, .399 "
        "(Nie et al., ICLR 2023, Table 3).",
    ),
    "forecasting-lstm": Task(
        "Forecasting: ETTh1, horizon 96, an LSTM",
        data.transformer, nets.Lstm, replace(ADAM, loss="mse", metric="mae", epochs=2, lr=2e-3), 8,
    ),
    "anomalies": Task(
        "Anomalies: an autoencoder on HAR without walking upstairs, seven boards",
        data.motion, nets.AutoEncoder, replace(ADAM, loss="mse", metric="rmse", epochs=2, lr=2e-3), 10,
    ),
    "fusion": Task(
        "Sensor fusion: HAR, accelerometer and gyroscope as two inputs, seven boards",
        data.sensors, nets.Fusion, replace(ADAM, lr=2e-3), 10,
    ),
    "embedding": Task(
        "Embeddings: Fashion-MNIST with InfoNCE, ten boards",
        data.clothes, nets.Embedder, replace(ADAM, loss="infonce", metric=CUSTOM, batch_size=64, epochs=2, lr=2e-3), 10,
        note="The score is the share of pictures whose nearest neighbour among 256 is of the same kind.",
        own={"metric": losses.retrieval},
    ),
    "language": Task(
        "Language model: Shakespeare by characters, a board per role",
        data.plays, nets.Characters, replace(ADAM, metric="perplexity", lr=2e-3), 10,
        note="0.3 M parameters and twelve roles: what two processor cores train in minutes.",
    ),
    "adapters": Task(
        "Adapters: a frozen language model of plays learns Python's manual, a board per chapter, ranks 16, 8, 4 and 2",
        data.chapters, adapters.Speaker, replace(ADAM, metric="perplexity", lr=1e-2), 8,
        note="Beside all linear layers of the blocks. FedAvg's boards have 16 ranks each. The base is sent in float16, "
        "once.",
        densities=(1.0, 0.5, 0.25, 0.125),
        own={"base": "float16"},
    ),
}  # fmt: skip


def imported(task: Task, seed: int) -> tuple[Model, torch.nn.Module]:
    torch.manual_seed(seed)
    module = task.net()
    return fx.load(module, **task.own), module


@dataclass(frozen=True)
class Changes:
    """Settings of a look that differ from a row's: the strategy's options, the job's, and its recipe's."""

    options: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def federated(task: Task, method: str, seed: int, changes: Changes = Changes()) -> dict[str, Any]:
    """A simulated fleet's run."""
    found, (model, _) = task.deal(seed), imported(task, seed)
    names = list(found.boards)
    options = {} if method == "fedavg" else {"densities": list(task.densities), **VARIANTS.get(method, {})}
    options |= changes.options
    strategy = "fedavg" if method == "fedavg" else "fedprune"
    codec = "int8" if method == INT8 else "none"
    settings: dict[str, Any] = {
        "strategy": strategy, "deadline_s": 1e7, "move_limit": 0.0, "weight_limit": 0.0, "compression": codec,
        "compression_down": codec, **changes.job,
    }  # fmt: skip
    recipe = replace(task.recipe, **{"evaluate_every": task.rounds, **changes.recipe})
    job = Job(
        name="task", seed=seed, devices=len(names), rounds=task.rounds, options=options, recipe=recipe, **settings
    )
    fleet = tuple(VirtualDevice(n, find(BOARD), found.boards[n]) for n in names)
    last: list[bytes] = []

    def progress(simulation: Simulation) -> None:
        last[:] = [simulation.store.read(simulation.state.model)]

    record = simulate(Experiment(method, job, model, fleet, evaluation=(found.x, found.y)), progress=progress)
    place = weights_path(task, method, seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(last[0])
    return {
        "curve": [row.metrics for row in record.rounds],
        "bytes": [record.last.down, record.last.up],
        "macs": record.macs(),
        "local": {k: statistics.fmean(v.values()) for k, v in record.last.own.items() if k.startswith(record.measure)},
    }


def weights_path(task: Task, method: str, seed: int) -> Path:
    """Where the global model of a run's last round is kept, for pictures."""
    return Path("build/tasks") / f"{task.deal.__name__}-{task.net.__name__}-{method}-{seed}.safetensors"


def detected(task: Task, method: str, seed: int) -> float | None:
    """How well a model's error tells the activity apart that no board has: the area under the ROC curve."""
    if task.deal is not data.motion or not (place := weights_path(task, method, seed)).exists():
        return None
    x, strange = data.unusual()
    made = pictures.outputs(imported(task, seed)[0], dict(tensorfile.decode(place.read_bytes())), x)
    return float(roc_auc_score(strange, ((made - x) ** 2).mean((1, 2))))


def central(task: Task, seed: int) -> dict[str, Any]:
    """Torch on all boards' training samples together: as many epochs, with the same optimiser."""
    found, (model, module) = task.deal(seed), imported(task, seed)
    x = torch.tensor(np.concatenate([np.asarray(b.x_train) for b in found.boards.values()]))
    y = torch.tensor(np.concatenate([np.asarray(b.y_train) for b in found.boards.values()]))
    r = task.recipe
    make: Any = torch.optim.SGD if r.optimizer == "sgd" else torch.optim.Adam
    options = {"momentum": r.momentum} if r.optimizer == "sgd" else {}
    optimizer = make([p for p in module.parameters() if p.requires_grad], lr=r.lr, **options)
    judge = Objective(
        training_graph(model, r.features).to_bytes(), r, model.architecture.classes, scores=r.features.scores
    )
    rng = np.random.default_rng(seed)

    def judged() -> dict[str, float]:
        module.eval()
        with torch.no_grad():
            parts = [
                judge(_outputs(module, torch.tensor(found.x[s : s + 256])).numpy(), judge.targets(found.y[s : s + 256]))
                for s in range(0, len(found.x), 256)
            ]
        return judge.metrics(Measure.of(parts))

    before, curve = judged(), []
    for epoch in range(r.epochs * task.rounds):
        module.train()
        for rows in np.array_split(rng.permutation(len(x)), -(-len(x) // r.batch_size)):
            outputs, labels = _outputs(module, x[rows]), y[rows]
            optimizer.zero_grad()
            torch_loss(task, outputs, labels).backward()
            optimizer.step()
        if (epoch + 1) % r.epochs == 0:
            curve.append(judged())
    return {"before": before, "curve": curve}


def _outputs(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A module's outputs for rows as boards have them."""
    shapes: Any = module.input_shape
    if not isinstance(shapes, dict):
        return module(x)
    parts = x.split([math.prod(shapes[name]) for name in sorted(shapes)], 1)
    return module(**{n: p.unflatten(1, shapes[n]) for n, p in zip(sorted(shapes), parts, strict=True)})


def torch_loss(task: Task, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if "loss" in task.own:
        return task.own["loss"](outputs, labels).mean()
    if task.recipe.loss == "mse":
        return torch.nn.functional.mse_loss(outputs, labels)
    if task.recipe.loss == "infonce":
        near = torch.nn.functional.normalize(outputs, dim=1) @ torch.nn.functional.normalize(outputs, dim=1).T / 0.1
        near = near.masked_fill(torch.eye(len(near), dtype=torch.bool), -torch.inf)
        same = (labels[:, None] == labels).fill_diagonal_(False)
        likely = near.log_softmax(1).masked_fill(~same, 0.0)
        return (-likely.sum(1) / same.sum(1).clamp(min=1)).mean()
    ignored = -100 if task.recipe.ignore_label is None else task.recipe.ignore_label
    return torch.nn.functional.cross_entropy(outputs, labels.long(), ignore_index=ignored)


def page(results: dict[str, Any]) -> str:
    """The results in words and tables."""
    lines = [
        "# Tasks on real data", "",
        (f"`python -m benchmarks.tasks`, {results['date']}, {results['machine']}, fedprune {results['fedprune']}, "
        f"onnxruntime {results['onnxruntime']}, torch {results['torch']}. A simulated fleet whose boards train with "
        f"onnxruntime; `fedprune` gives its boards widths of {', '.join(map(str, DENSITIES))} in turn, FedAvg trains "
        "the whole model on all, torch trains on all boards' samples together for as many epochs. "
        f"*{SAME_LOSS}* is `fedprune` with the whole model on all boards. Figures are the "
        "global model's in the last round on data that no board has: mean and, with more than one seed, range."), "",
    ]  # fmt: skip
    for name, task in TASKS.items():
        if rows := results["runs"].get(name, {}):
            lines += [f"## {task.title}", "", *table(task, rows), ""]
    return "\n".join(lines)


def table(task: Task, rows: dict[str, Any]) -> list[str]:
    """A task's note, its results by method, and what else was measured."""
    metric = METRICS[task.recipe.judged_by]
    shown = [metric.name, *(n for n in ("accuracy", "loss") if n != metric.name)]
    noted: list[str] = []
    lines = [task.note, ""] if task.note else []
    lines += [f"| | seeds | {' | '.join(METRICS[n].title for n in shown)} | MB down | MB up |",
              f"|---|---|{'---|' * len(shown)}---|---|"]  # fmt: skip
    for method in dict.fromkeys((*METHODS, *FURTHER, *VARIANTS)):
        runs = rows.get(method, {})
        if not runs:
            continue
        last = [run["curve"][-1] for run in runs.values()]
        cells = [_spread([m[n] for m in last if n in m], n) for n in shown]
        moved = [[run["bytes"][i] / 1e6 for run in runs.values() if "bytes" in run] for i in (0, 1)]
        cells += [f"{statistics.fmean(m):,.1f}" if m else "–" for m in moved]
        lines.append(f"| {method} | {', '.join(sorted(runs))} | {' | '.join(cells)} |")
        found = [run["detected"] for run in runs.values() if "detected" in run]
        if found:
            noted.append(f"{method} {statistics.fmean(found):.3f}")
    if noted:
        said = "Area under the ROC curve by which the error tells the unseen activity from the others"
        lines += ["", f"{said}: {', '.join(noted)}."]
    if task.net is adapters.Speaker and "torch" in rows:
        before = _spread([run["before"][metric.name] for run in rows["torch"].values()], metric.name)
        lines += ["", f"Without adapters: {before}."]
    return lines


def summary(runs: dict[str, Any], pages: dict[str, str]) -> list[str]:
    """A line for each task; `pages` are their files."""
    lines = ["| | score | torch | FedAvg | `fedprune` | MB, FedAvg | MB, `fedprune` |", "|---|---|---|---|---|---|---|"]
    for name, task in TASKS.items():
        metric = METRICS[task.recipe.judged_by]
        found = [list(runs[name][method].values()) for method in METHODS]
        cells = [metric.shown(statistics.fmean(run["curve"][-1][metric.name] for run in some)) for some in found]
        cells += [f"{statistics.fmean(sum(run['bytes']) / 1e6 for run in some):,.0f}" for some in found[1:]]
        title = task.title.partition(": the language")[0]
        lines.append(f"| [{title}]({pages[name]}) | {metric.title} | {' | '.join(cells)} |")
    return lines


def docs_pages(results: dict[str, Any], folder: Path) -> dict[Path, str]:
    """The pages of a folder with the tables of these results between their marks."""
    texts = {path: path.read_text() for path in sorted(folder.glob("*.md"))}
    pages = {
        name: path.name for path, text in texts.items() for name in re.findall(r"<!-- figures of ([\w-]+) -->", text)
    }
    tables = {f" of {name}": table(TASKS[name], results["runs"][name]) for name in pages}
    tables[""] = summary(results["runs"], pages)

    def filled(mark: re.Match[str]) -> str:
        return "\n".join([f"<!-- figures{mark[1]} -->", *tables[mark[1]], "<!-- end -->"])

    marks = re.compile(r"<!-- figures((?: of [\w-]+)?) -->\n.*?<!-- end -->", re.DOTALL)
    return {path: marks.sub(filled, text) for path, text in texts.items()}


def _spread(values: list[float], name: str) -> str:
    if not values:
        return "–"
    text = METRICS[name].shown(statistics.fmean(values))
    if len(values) == 1:
        return text
    return f"{text} ({METRICS[name].shown(min(values))} to {METRICS[name].shown(max(values))})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *FURTHER), default=[*METHODS, *FURTHER])
    parser.add_argument("--variants", action="store_true", help="run the variants of fedprune on the tasks explained")
    parser.add_argument("--rounds", type=int, help="fewer or more rounds, for a look")
    parser.add_argument("--changes", type=json.loads, default={}, metavar="JSON", help="other settings, for a look")
    parser.add_argument("--pictures", action="store_true", help="draw what the first seed's models make of samples")
    options = parser.parse_args()
    changes, look = Changes(**options.changes), bool(options.rounds or options.changes)
    torch.set_num_threads(1)
    path = RESULTS / "tasks.json"
    if options.pictures:
        for name in options.tasks or TASKS:
            task, runs = TASKS[name], json.loads(path.read_text())["runs"][name]
            weights = dict(tensorfile.decode(weights_path(task, "fedprune", 0).read_bytes()))
            model, _ = imported(task, 0)
            print(pictures.draw(name, model, weights, task.deal(0), runs, task.recipe.judged_by))
        return 0
    for seed in options.seeds:
        for name in options.tasks or (EXPLAINED if options.variants else TASKS):
            for method in VARIANTS if options.variants else options.methods:
                results = json.loads(path.read_text()) if path.exists() else {"runs": {}}
                runs = results["runs"].setdefault(name, {}).setdefault(method, {})
                if str(seed) in runs and not look:
                    continue
                task, began = TASKS[name], time.perf_counter()
                task = replace(task, rounds=options.rounds or task.rounds)
                run = central(task, seed) if method == "torch" else federated(task, method, seed, changes)
                if (area := detected(task, method, seed)) is not None:
                    run["detected"] = round(area, 4)
                run |= {"seconds": round(time.perf_counter() - began, 1), "code": commit()}
                print(
                    name, method, seed, run["seconds"], "s", run["curve"][-1], run.get("bytes"), run.get("macs"),
                    flush=True,
                )  # fmt: skip
                if look:
                    judged = task.recipe.judged_by
                    print(*(f"{metrics[judged]:.4g}" for metrics in run["curve"] if judged in metrics), flush=True)
                    continue
                results = json.loads(path.read_text()) if path.exists() else {"runs": {}}
                results["runs"].setdefault(name, {}).setdefault(method, {})[str(seed)] = run
                today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
                results |= {"date": today, "machine": machine()}
                results |= {n: version(n) for n in ("fedprune", "onnxruntime", "torch")}
                path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                (RESULTS / "tasks.md").write_text(page(results))
    for file, text in docs_pages(json.loads(path.read_text()), DOCS).items():
        file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
