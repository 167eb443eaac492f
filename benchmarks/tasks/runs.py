"""A run: a task, a method, a seed, and the numbers that are left of it."""

from __future__ import annotations

import math
import platform
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.run import UNLIMITED, commit, cpu_seconds, machine
from benchmarks.tasks import data
from benchmarks.tasks.tasks import TASKS, Task, imported
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.selection import Tensors
from fedprune.planning.profile_store import find_profile
from fedprune.runtime.session import OnnxSession
from fedprune.strategies import compose
from fedprune.strategies.allocation import natural_sort_key
from fedprune_device.training.objective import BatchMeasure as LossSums
from fedprune_device.training.objective import Objective
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.measure import ModelMeasure
from fedprune_server.simulation.results.run_folder import simulate_in_folder
from fedprune_server.simulation.simulation import Simulation

Array = np.ndarray[Any, Any]

TORCH = "torch"
"""Training on all boards' samples together."""

REFERENCE = "fedavg"
"""The run by whose MACs and bytes all others are counted: the whole model on every board, in float32."""

EQUAL_TIME = "fedavg int8"
"""The run with which all others are compared at equal time."""

DEFAULT, BUDGET = "fedprune", "fedprune at budget"

MACS_SHARE, BYTES_SHARE = 0.6, 0.2
"""The budget, of the reference's: as many rounds as it pays for, more or fewer than the task's."""

BOARDS = (
    ("jetson-orin-nano", "jetson-xavier-nx"),
    ("raspberry-pi-5", "jetson-nano"),
    ("raspberry-pi-4b", "raspberry-pi-3b-plus"),
    ("raspberry-pi-zero-2w",),
)
"""Kinds of boards by quarters of the fleet, the strongest first. They decide how long a round takes, and no number."""


@dataclass(frozen=True)
class Method:
    """A row of a task's table that a simulated fleet runs.

    Attributes:
        strategy: The job's strategy.
        job: Settings of the job.
        widths: What boards train: `whole` for all of the model, `own` for what each can hold, `one` for the width that
            three quarters of them can hold, which all train.
        shares_model: Whether there is a model that all boards share.
    """

    strategy: str
    job: Mapping[str, Any] = field(default_factory=dict)
    widths: str = "own"
    shares_model: bool = True

    def densities(self, task: Task) -> list[float]:
        """The densities that the strategy deals out; empty for the whole model on all boards."""
        return {"whole": [], "own": [*task.densities], "one": [task.densities[2]]}[self.widths]


INT8 = {"compression": "int8", "compression_down": "int8"}

METHODS = {
    REFERENCE: Method("fedavg", {"compression": "none", "compression_down": "none"}, "whole"),
    EQUAL_TIME: Method("fedavg", INT8, "whole"),
    "one width": Method("fedavg", INT8, "one"),
    "heterofl int8": Method("heterofl", INT8),
    "local": Method("local", INT8, shares_model=False),
    DEFAULT: Method("fedprune"),
    BUDGET: Method("fedprune"),
}
"""Rows by their names, in the tables' order."""


@dataclass(frozen=True)
class Changes:
    """Settings of a look that differ from a row's: the strategy's options, the job's, and its recipe's."""

    options: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def run(name: str, method: str, seed: int, rounds: int = 0, changes: Changes = Changes()) -> dict[str, Any]:
    """Run a task with a method, for `rounds` or, with 0, the task's. Its scores, costs and seconds on the fleet's clock
    are there for each round."""
    torch.set_num_threads(1)
    task, before = replace(TASKS[name], rounds=rounds or TASKS[name].rounds), cpu_seconds()
    numbers = central(task, seed) if method == TORCH else federated(task, method, seed, changes)
    made = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "machine": machine()}
    made |= {"Python": platform.python_version()} | {n: version(n) for n in ("fedprune", "onnxruntime", "torch")}
    code = commit() if shutil.which("git") else ""
    return {**numbers, "cpu_s": round(cpu_seconds() - before, 1), "made": made, "code": code}


def job_of(task: Task, method: str, devices: int, seed: int, changes: Changes = Changes()) -> Job:
    """The job of a row."""
    row = METHODS[method]
    densities = row.densities(task)
    options = {"densities": densities} if densities else {}
    # Boards measure what they serve once, after the last round.
    recipe = replace(task.recipe, **{"evaluate_every": task.rounds, **changes.recipe})
    settings: dict[str, Any] = {"deadline_s": 1e7, **UNLIMITED, **row.job, **changes.job}
    return Job(
        name="task", seed=seed, devices=devices, rounds=task.rounds, strategy=row.strategy,
        options={**options, **changes.options}, recipe=recipe, **settings,
    )  # fmt: skip


def fleet(boards: Mapping[str, Any]) -> tuple[VirtualDevice, ...]:
    """Boards whose kinds suit the widths that they get, which are dealt out by names, too."""
    names, turns = sorted(boards, key=natural_sort_key), [0] * len(BOARDS)
    devices = []
    for place, name in enumerate(names):
        quarter = int((place + 0.5) / len(names) * len(BOARDS))
        kinds = BOARDS[quarter]
        devices.append(VirtualDevice(name, find_profile(kinds[turns[quarter] % len(kinds)]), boards[name]))
        turns[quarter] += 1
    return tuple(devices)


def federated(task: Task, method: str, seed: int, changes: Changes) -> dict[str, Any]:
    """A simulated fleet's run."""
    found, (model, _), row = task.deal(seed), imported(task, seed), METHODS[method]
    job = job_of(task, method, len(found.boards), seed, changes)
    # Beside one width for all nothing is trained: that width is measured, not the whole model.
    narrow = row.densities(task) if row.widths == "one" else []
    measure = ModelMeasure(found.x, found.y, tuple(narrow)) if narrow else None
    last: list[bytes] = []

    def progress(simulation: Simulation) -> None:
        last[:] = [simulation.store.read(simulation.state.model)]

    experiment = Experiment(method, job, model, fleet(found.boards), (found.x, found.y), measure=measure)
    record, _ = simulate_in_folder(experiment, progress=progress)
    kind, rounds = record.measure, record.rounds
    scores = [row.measured[f"sub@{narrow[0]:g}"] if narrow else row.metrics[kind] for row in rounds]
    numbers: dict[str, Any] = {
        "curve": [round(score, 6) for score in scores] if row.shares_model else [],
        "served": round(statistics.fmean(rounds[-1].local.values()), 6),
        "at": [round(row.elapsed_s, 1) for row in rounds],
        "bytes": [row.down + row.up for row in rounds],
        "macs": np.cumsum([row.macs for row in rounds]).tolist(),
    }
    if task.deal is data.motion and row.shares_model and not narrow:
        numbers["detected"] = detected(model, tensorfile.decode(last[0]))
    return numbers


def affordable_rounds(task: Task, reference: Mapping[str, Any], default: Mapping[str, Any]) -> int:
    """As many rounds of `fedprune` as its budget pays for, by what a run of the task's rounds cost.

    Rounds with a shared core cost less than those after it, and the first one more bytes than all, as boards know
    nothing yet. At least 1.
    """
    core = compose(job_of(task, DEFAULT, devices=1, seed=0)).core
    limits = {"macs": MACS_SHARE * reference["macs"][-1], "bytes": BYTES_SHARE * reference["bytes"][-1]}

    def is_shared(number: int, rounds: int) -> bool:
        return core is not None and core.is_shared_in(number, rounds, spent=0)

    def cost(what: str, rounds: int) -> float:
        of_round = np.diff(default[what], prepend=0)
        kinds = [is_shared(number, task.rounds) for number in range(1, task.rounds + 1)]
        means = {k: of_round[1:][[is_k == k for is_k in kinds[1:]]].mean() for k in set(kinds[1:])}
        wanted = [is_shared(number, rounds) for number in range(2, rounds + 1)]
        return float(of_round[0] + sum(means.get(k, of_round.mean()) for k in wanted))

    rounds = 1
    while rounds < 10 * task.rounds and all(cost(what, rounds + 1) <= limit for what, limit in limits.items()):
        rounds += 1
    return rounds


def outputs(model: Model, weights: Tensors, x: Array) -> Array:
    """What a model with these weights makes of samples."""
    graph = model.graph.copy()
    graph.initializers |= weights
    session = OnnxSession(graph.to_bytes())
    parts = [session.run({"x": x[s : s + 64]}, ["logits"])["logits"] for s in range(0, len(x), 64)]
    return np.concatenate(parts)


def detected(model: Model, weights: Tensors) -> float:
    """How well a model's error tells the activity apart that no board has: the area under the ROC curve, which is how
    often the error of such a window is larger than that of another."""
    x, strange = data.unusual()
    error = ((outputs(model, dict(weights), x) - x) ** 2).mean((1, 2))
    usual = np.sort(error[~strange])
    lower = np.searchsorted(usual, error[strange], "left") + np.searchsorted(usual, error[strange], "right")
    return round(float(lower.mean() / 2 / len(usual)), 4)


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
        training_graph(model, r.features).to_bytes(), r, model.architecture.classes, scores=r.features.counts_hits
    )
    rng = np.random.default_rng(seed)

    def judged() -> float:
        """The task's metric on data that no board has."""
        module.eval()
        with torch.no_grad():
            parts = [
                judge(_outputs(module, torch.tensor(found.x[s : s + 256])).numpy(), judge.targets(found.y[s : s + 256]))
                for s in range(0, len(found.x), 256)
            ]
        return round(judge.metrics(LossSums.combine(parts))[r.judged_by], 6)

    curve: list[float] = []
    before = judged()
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
    ignored = -100 if task.recipe.ignore_label is None else task.recipe.ignore_label
    return torch.nn.functional.cross_entropy(outputs, labels.long(), ignore_index=ignored)
