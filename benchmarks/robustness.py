"""What hostile boards do to a model: ten attacks by one to three boards of ten, under the default limits and others.

    FEDPRUNE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.robustness

A round is the server's own (`fedprune.coordination.round`). Boards train a net of one hidden layer in numpy, so that
hundreds of runs take minutes. Hostile boards know the honest boards' updates of the round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.accuracy.sets import samples
from benchmarks.harness import Record, run_cases
from fedprune.coordination.round import Round
from fedprune.coordination.update_limits import RoundUpdate, UpdateLimits
from fedprune.coordination.weight_limits import capped_weights
from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, LayerRow, Segment, TensorKind, TensorSpec
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies import compose
from fedprune.strategies.values import Cut, NewMemory, Scene, Submodel, Turn, UpdateReport
from fedprune_server.simulation.digits import deal_digits, load_digits

BOARDS = 10
ROUNDS = 12
SEEDS = (0, 1, 2)
HIDDEN = 32
BATCH = 32
MOMENTUM = 0.9

# Rounds of which accuracies are means.
LAST = 3

# A late strike begins in this round.
LATE = ROUNDS - LAST

# Largest weight that the numeric check lets through while the model's own are small.
EDGE = 7.9

# Length of an attack in honest ones, where it may be any: above the limits, and too short to be rejected.
FAR = 4.0

# The label that a backdoor's trigger is to give.
TARGET = 0

NONE = "none"
NO_LIMITS = "no limits"

# Settings of a job: `move_limit` and `weight_limit` are those of [job], `robust` that of [job.options].
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "move_limit 1": {"move_limit": 1.0},
    "median": {"options": {"robust": {"centre": "median"}}},
    NO_LIMITS: {"move_limit": 0.0, "weight_limit": 0.0},
}

# The first chooses the default, the second judges it.
DATA = ("digits", "har")

# Honest boards with two classes each.
SKEWED = ("digits, two classes", "fashion, two classes")

Vector = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Knowledge:
    """What a hostile board knows when it hands in: flat vectors of all weights. `own` is the change that its training
    made, `changes` are those of all honest boards and its own, [boards, weights]; the others begin at the round's
    model, and lead to the job's first and to what this board handed in first."""

    own: Vector
    changes: npt.NDArray[np.float64]
    to_start: Vector
    to_first_update: Vector
    round: int

    @property
    def mean(self) -> Vector:
        return np.asarray(self.changes.mean(axis=0))

    def far(self, direction: Vector) -> Vector:
        """So far in a direction that only the limits bound it."""
        usual = float(np.median(np.linalg.norm(self.changes, axis=1)))
        return FAR * usual * direction / max(float(np.linalg.norm(direction)), 1e-12)


def min_max(known: Knowledge) -> Vector:
    """As far against the mean as no further from any update than two honest ones are from each other (Shejwalkar and
    Houmansadr 2021)."""
    mean, against = known.mean, -known.mean / max(float(np.linalg.norm(known.mean)), 1e-12)
    widest = max(float(np.linalg.norm(known.changes - one, axis=1).max()) for one in known.changes)
    low, high = 0.0, 2 * widest
    for _ in range(40):
        middle = (low + high) / 2
        fits = float(np.linalg.norm(mean + middle * against - known.changes, axis=1).max()) <= widest
        low, high = (middle, high) if fits else (low, middle)
    return mean + low * against


# What a hostile board hands in as its change. Label flips and backdoors are in its samples.
ATTACKS: dict[str, Callable[[Knowledge], Vector]] = {
    "reverse": lambda known: known.far(-known.mean),
    "sign flip": lambda known: -known.own,
    "label flip": lambda known: known.own,
    "×100": lambda known: 100 * known.own,
    "ALIE": lambda known: known.mean - 1.5 * known.changes.std(axis=0),  # Baruch et al. 2019
    "min-max": min_max,
    "stale replay": lambda known: known.to_first_update,
    "free rider": lambda known: np.zeros_like(known.own),
    "backdoor": lambda known: FAR * known.own,  # Bagdasaryan et al. 2020
    "late strike": lambda known: known.own if known.round <= LATE else known.far(known.to_start),
}


@dataclass(frozen=True)
class Task:
    """Samples of each board and of the server's test, and how boards train."""

    boards: tuple[tuple[Floats, Labels], ...]
    x: Floats
    y: Labels
    classes: int
    trigger: slice
    lr: float = 0.1
    epochs: int = 3

    def marked(self, x: Floats) -> Floats:
        """Samples with the backdoor's trigger, which honest samples don't have."""
        out = x.copy()
        out[:, self.trigger] = np.abs(x).max()
        return out


@cache
def task(data: str, seed: int) -> Task:
    """The samples of a fleet; `seed` deals them."""
    dice = keyed_generator(seed, "robustness", data)
    if data == "digits":
        names = [f"board-{i}" for i in range(BOARDS)]
        dealt = deal_digits(names, seed=seed)
        boards = tuple((_flat(dealt.devices[n].x_train), dealt.devices[n].y_train) for n in names)
        return Task(boards, _flat(dealt.x), dealt.y, 10, slice(60, 64))
    if data == "har":  # people: each board has the samples of two or three
        har = samples("har")
        x = np.concatenate([np.asarray(part) for part in har.arrays]).reshape(len(har), 9, 8, -1)
        x = _flat(np.concatenate([x.mean(axis=3), x.std(axis=3)], axis=2))
        x = (x - x.mean(axis=0)) / (x.std(axis=0) + np.float32(1e-6))
        owners = dice.permutation(np.unique(har.owners[~har.is_test])) if har.owners is not None else []
        rows = [np.flatnonzero(~har.is_test & np.isin(har.owners, owners[i::BOARDS])) for i in range(BOARDS)]
        boards = tuple((x[r], har.labels[r]) for r in (dice.permutation(r)[:100] for r in rows))
        test = dice.permutation(np.flatnonzero(har.is_test))[:1000]
        return Task(boards, x[test], har.labels[test], har.classes, slice(0, 4), lr=0.05)
    if data.startswith("digits"):
        x, y = load_digits()
        x = _flat(x)
    else:
        fashion = samples("fashion_mnist")
        picked = dice.permutation(len(fashion))[:2500]
        pixels = np.concatenate([np.asarray(part) for part in fashion.arrays])[picked].reshape(-1, 14, 2, 14, 2)
        x, y = _flat(pixels.mean(axis=(2, 4)) / 255), fashion.labels[picked]
    test, rest = np.split(dice.permutation(len(y)), [len(y) // 4])
    halves = [half for c in range(10) for half in np.array_split(rest[y[rest] == c], 2)]
    # Each board has the halves of two classes that differ: neighbours in a ring.
    rows = [np.concatenate([halves[2 * i], halves[(2 * i + 3) % 20]]) for i in range(BOARDS)]
    return Task(tuple((x[r], y[r]) for r in rows), x[test], y[test], 10, slice(-4, None))


def _flat(x: npt.NDArray[Any]) -> Floats:
    return np.ascontiguousarray(x.reshape(len(x), -1), np.float32)


def network(inputs: int, classes: int) -> Architecture:
    """A net of one hidden layer."""
    hidden = Axis((Segment(0, 0, HIDDEN),))
    specs = (
        TensorSpec("hidden.weight", TensorKind.WEIGHT, (hidden, Axis.fixed(inputs))),
        TensorSpec("hidden.bias", TensorKind.BIAS, (hidden,)),
        TensorSpec("head.weight", TensorKind.WEIGHT, (Axis.fixed(classes), hidden)),
        TensorSpec("head.bias", TensorKind.BIAS, (Axis.fixed(classes),)),
    )
    layers = tuple(LayerRow(name, "Gemm", f"{name}.weight", 1) for name in ("hidden", "head"))
    return Architecture("robustness", (ChannelGroup("hidden", HIDDEN),), specs, layers, (), (inputs,), (classes,))


def scores(net: Tensors, x: Floats) -> tuple[Floats, Floats]:
    """The hidden layer and the logits."""
    hidden = np.maximum(x @ net["hidden.weight"].T + net["hidden.bias"], np.float32(0))
    return hidden, hidden @ net["head.weight"].T + net["head.bias"]


def train(net: Tensors, x: Floats, y: Labels, what: Task, dice: np.random.Generator) -> tuple[Tensors, int]:
    """A board's training: SGD with momentum on the cross-entropy; the trained tensors and the number of steps."""
    net = {name: value.copy() for name, value in net.items()}
    velocity = {name: np.zeros_like(value) for name, value in net.items()}
    steps = 0
    for _ in range(what.epochs):
        order = dice.permutation(len(y))
        for batch in (order[start : start + BATCH] for start in range(0, len(y), BATCH)):
            hidden, logits = scores(net, x[batch])
            error = np.exp(logits - logits.max(axis=1, keepdims=True))
            error /= error.sum(axis=1, keepdims=True)
            error[np.arange(len(batch)), y[batch]] -= 1
            error /= len(batch)
            inner = (error @ net["head.weight"]) * (hidden > 0)
            gradients = (inner.T @ x[batch], inner.sum(axis=0), error.T @ hidden, error.sum(axis=0))
            for name, gradient in zip(net, gradients, strict=True):
                velocity[name] = np.float32(MOMENTUM) * velocity[name] + gradient
                net[name] -= np.float32(what.lr) * velocity[name]
            steps += 1
    return net, steps


def as_vector(net: Tensors) -> Vector:
    return np.concatenate([value.reshape(-1) for value in net.values()]).astype(np.float64)


def as_tensors(vector: Vector, like: Tensors) -> Tensors:
    ends = np.cumsum([value.size for value in like.values()])[:-1]
    pieces = np.split(np.clip(vector, -EDGE, EDGE).astype(np.float32), ends)
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


class Played(NamedTuple):
    """A job's end: accuracy (mean of the last rounds), triggers that give the target, updates that were limited."""

    accuracy: float
    triggers: float
    limited: float


def play(data: str, setting: str, attack: str, hostile: int, seed: int, rounds: int = ROUNDS) -> Played:
    """A job, whose last boards are hostile."""
    what = task(data, seed)
    recipe = Recipe(epochs=what.epochs, batch_size=BATCH, lr=what.lr, momentum=MOMENTUM)
    job = Job("robustness", seed, rounds, BOARDS, strategy="fedavg", recipe=recipe, **SETTINGS[setting])
    strategy, architecture = compose(job), network(what.x.shape[1], what.classes)
    limits, full = UpdateLimits(job, uniform=False), Selection.full(architecture)
    first = keyed_generator(seed, "robustness", "weights")
    net = {
        t.name: (first.standard_normal(t.shape) * np.sqrt(2 / t.shape[-1]) * (len(t.shape) > 1)).astype(np.float32)
        for t in architecture.tensors
    }
    start, memory, first_updates = as_vector(net), NewMemory(), dict[int, Vector]()
    boards = [_poisoned(what, attack, i) if i >= BOARDS - hostile else what.boards[i] for i in range(BOARDS)]
    weights = capped_weights({str(i): len(y) for i, (_, y) in enumerate(what.boards)}, job.weight_limit)
    accuracies, limited = [], 0
    for number in range(1, rounds + 1):
        trained = [
            train(net, x, y, what, keyed_generator(seed, "robustness", number, i)) for i, (x, y) in enumerate(boards)
        ]
        sent = as_vector(net)
        changes = [as_vector(tensors) - sent for tensors, _ in trained]
        for i in range(BOARDS - hostile, BOARDS):
            update = first_updates.setdefault(i, sent + changes[i])
            known = np.stack([*changes[: BOARDS - hostile], changes[i]])
            knowledge = Knowledge(changes[i], known, start - sent, update - sent, number)
            trained[i] = as_tensors(sent + ATTACKS[attack](knowledge), net), trained[i][1]
        scene = Scene(architecture, seed, number, net, memory, recipe, tuple(sorted(weights)))
        updates = []
        for i, (tensors, steps) in enumerate(trained):
            cut = Cut(scene, Turn(seed, number, str(i), full.widths, samples=len(what.boards[i][1])), full)
            sent_model = Submodel(full, net)
            report = UpdateReport(cut, Submodel(full, tensors), 1, steps, lambda sent_model=sent_model: sent_model)
            updates.append(
                RoundUpdate(str(i), (number, i), weights[str(i)], report.cut.turn.samples, lambda r=report: r)
            )
        closed = Round(strategy, scene, limits).close(updates, participants=scene.participants)
        net, memory = closed.model or net, {**memory, **closed.memories}
        limited += closed.reduced + len(closed.rejected)
        accuracies.append(float((scores(net, what.x)[1].argmax(axis=1) == what.y).mean()))
    others = what.y != TARGET
    triggers = float((scores(net, what.marked(what.x[others]))[1].argmax(axis=1) == TARGET).mean())
    return Played(statistics.fmean(accuracies[-LAST:]), triggers, limited / (BOARDS * rounds))


def _poisoned(what: Task, attack: str, board: int) -> tuple[Floats, Labels]:
    """A hostile board's samples."""
    x, y = what.boards[board]
    if attack == "label flip":
        return x, what.classes - 1 - y
    if attack == "backdoor":
        return np.concatenate([x, what.marked(x)]), np.concatenate([y, np.full_like(y, TARGET)])
    return x, y


def cases() -> Iterator[dict[str, Any]]:
    """The cells of the matrix. Without limits two attacks by one board are enough to show what they are for."""
    honest = [(data, NONE, 0) for data in (*DATA, *SKEWED)]
    for data, attack, hostile in (*honest, *((d, a, m) for m in (1, 2, 3) for d in DATA for a in ATTACKS)):
        for setting in SETTINGS:
            if setting != NO_LIMITS or (hostile < 2 and attack in (NONE, "reverse", "×100")):
                yield {"data": data, "attack": attack, "hostile": hostile, "setting": setting}


def run(data: str, attack: str, hostile: int, setting: str) -> dict[str, Any]:
    """A cell: means over the seeds, and each seed's accuracy."""
    played = [play(data, setting, attack, hostile, seed) for seed in SEEDS]
    means = {name: round(statistics.fmean(getattr(p, name) for p in played), 4) for name in Played._fields}
    return {**means, "accuracies": [round(p.accuracy, 4) for p in played]}


def matrix(records: Sequence[Record]) -> list[Record]:
    """A row for each attack and number of boards: records by data set and setting, in names that tables can say."""
    rows: dict[tuple[Any, ...], Record] = {}
    for record in records:
        row = rows.setdefault((record["attack"], record["hostile"]), {k: record[k] for k in ("attack", "hostile")})
        data, setting = (record[k].replace(",", "").replace(" ", "_") for k in ("data", "setting"))
        row.setdefault(data, {})[setting] = {k: v for k, v in record.items() if k != "made"}
    return list(rows.values())


if __name__ == "__main__":
    run_cases("robustness", __doc__, cases(), run, matrix=matrix)
