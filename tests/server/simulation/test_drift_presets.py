"""SCAFFOLD, FedDyn and FedCM through the simulator, against plain numpy of the papers' algorithms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedprune_export as fx
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile
from fedprune_device.data.dataset import LocalData
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.results.run_folder import ScratchStore
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import final_weights, noting

pytestmark = pytest.mark.torch

Arrays = dict[str, Any]
BOARDS, HIDDEN, STEPS, LR, ROUNDS = ("a", "b", "c"), 8, 4, 0.1, 3
# Boards train with all of their samples in every step, so that the order of samples is of no account.
SAMPLES = dict(zip(BOARDS, (5, 9, 12), strict=True))


class Net(torch.nn.Module):
    input_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, HIDDEN), torch.nn.Linear(HIDDEN, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


@pytest.fixture(scope="module")
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return fx.load(Net(), loss="mse")


def data(board: str) -> LocalData:
    rng = np.random.default_rng(BOARDS.index(board))
    x = rng.standard_normal((SAMPLES[board], 4)).astype(np.float32)
    y = (x[:, :2] * (1 + 2 * BOARDS.index(board)) + rng.standard_normal(2)).astype(np.float32)  # each its own task
    return LocalData(x, y, x[:0], y[:0])


def gradient(w: Arrays, local: LocalData) -> Arrays:
    """Of the mean squared error."""
    h = np.tanh(local.x_train @ w["inner.weight"].T + w["inner.bias"])
    error = h @ w["outer.weight"].T + w["outer.bias"] - local.y_train
    dz = 2 * error / error.size
    dh = (dz @ w["outer.weight"]) * (1 - h**2)
    return {
        "inner.weight": dh.T @ local.x_train,
        "inner.bias": dh.sum(0),
        "outer.weight": dz.T @ h,
        "outer.bias": dz.sum(0),
    }


def part(w: Arrays, width: int) -> Arrays:
    """The elements of the first hidden units."""
    return {n: v[:, :width] if n == "outer.weight" else v[:width] if "inner" in n else v for n, v in w.items()}


def put(onto: Arrays, w: Arrays, width: int) -> Arrays:
    out = {n: v.copy() for n, v in onto.items()}
    for name, view in part(out, width).items():
        view[...] = w[name]
    return out


def sgd(w: Arrays, local: LocalData, added: Callable[[Arrays], Arrays], lr: float, momentum: float) -> Arrays:
    """Steps of SGD along the gradient and what is added to it."""
    buffers = dict.fromkeys(w, 0.0)
    for _ in range(STEPS):
        total = {n: g + added(w)[n] for n, g in gradient(w, local).items()}
        buffers = {n: momentum * buffers[n] + total[n] for n in w}
        w = {n: w[n] - lr * buffers[n] for n in w}
    return w


def zeros(w: Arrays) -> Arrays:
    return {n: np.zeros_like(v) for n, v in w.items()}


def mean_of(parts: Mapping[str, Arrays], widths: Mapping[str, int], otherwise: Arrays) -> Arrays:
    """The mean of each element over the boards that have it."""
    held = {b: put(zeros(otherwise), {n: np.ones_like(v) for n, v in w.items()}, widths[b]) for b, w in parts.items()}
    count = {n: sum(h[n] for h in held.values()) for n in otherwise}
    total = {n: sum(put(zeros(otherwise), w, widths[b])[n] for b, w in parts.items()) for n in otherwise}
    return {n: np.where(count[n] > 0, total[n] / np.maximum(count[n], 1), v) for n, v in otherwise.items()}


@dataclass
class Papers:
    """The papers' states, with all of a fleet's boards in every round."""

    x: Arrays
    widths: Mapping[str, int]
    momentum: float = 0.0
    server_lr: float = 1.0
    alpha: float = 0.0
    own: dict[str, Arrays] = field(init=False)
    shared: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.own, self.shared = {b: zeros(self.x) for b in BOARDS}, zeros(self.x)

    def cut(self, w: Arrays, board: str) -> Arrays:
        return part(w, self.widths[board])

    def train(self, board: str, added: Callable[[Arrays], Arrays], lr: float = LR) -> Arrays:
        return sgd(self.cut(self.x, board), data(board), added, lr, self.momentum)

    def reach(self) -> float:
        """The sum of what the steps' gradients count for; K without momentum."""
        return float(sum(self.momentum**j for k in range(STEPS) for j in range(k + 1)))

    def scaffold(self) -> None:
        y, own = {}, {}
        for b in BOARDS:
            x, c, c_i = (self.cut(v, b) for v in (self.x, self.shared, self.own[b]))
            y[b] = self.train(b, lambda _, c=c, c_i=c_i: {n: c[n] - c_i[n] for n in c})  # type: ignore[misc]
            control = {n: c_i[n] - c[n] + (x[n] - y[b][n]) / (self.reach() * LR) for n in c}
            own[b] = put(self.own[b], control, self.widths[b])
        moved = {n: v - self.x[n] for n, v in mean_of(y, self.widths, self.x).items()}
        self.x = {n: v + self.server_lr * moved[n] for n, v in self.x.items()}
        self.shared = {
            n: v + sum(own[b][n] - self.own[b][n] for b in BOARDS) / len(BOARDS) for n, v in self.shared.items()
        }
        self.own = own

    def feddyn(self) -> None:
        y = {}
        for b in BOARDS:
            x, h = self.cut(self.x, b), self.cut(self.own[b], b)
            y[b] = self.train(
                b,
                lambda w, x=x, h=h: {n: self.alpha * (w[n] - x[n]) - h[n] for n in x},  # type: ignore[misc]
            )
            self.own[b] = put(self.own[b], {n: h[n] - self.alpha * (y[b][n] - x[n]) for n in x}, self.widths[b])
        mean = mean_of(y, self.widths, self.x)
        h_mean = {n: sum(self.own[b][n] for b in BOARDS) / len(BOARDS) for n in self.x}
        self.x = {n: mean[n] - h_mean[n] / self.alpha for n in self.x}

    def fedcm(self) -> None:
        y = {}
        for b in BOARDS:
            # v = α·g + (1 − α)·Δ; x ← x − η·v
            share, delta = (1 - self.alpha) / self.alpha, self.cut(self.shared, b)
            y[b] = self.train(
                b,
                lambda _, share=share, d=delta: {n: share * v for n, v in d.items()},  # type: ignore[misc]
                LR * self.alpha,
            )
        moved = {n: v - self.x[n] for n, v in mean_of(y, self.widths, self.x).items()}
        self.shared = {n: -v / (LR * self.reach()) for n, v in moved.items()}
        self.x = {n: v + self.server_lr * moved[n] for n, v in self.x.items()}


def simulate(folder: Path, model: Model, job: Job) -> tuple[Simulation, list[Any]]:
    """A simulation that has run, and each training's board and offer."""
    offers: list[Any] = []
    fleet = [VirtualDevice(b, find_profile("raspberry-pi-5"), data(b)) for b in BOARDS]
    fleet = [noting(board, lambda name, offer: offers.append((name, offer))) for board in fleet]
    x, y = np.asarray(data("a").x_train), np.asarray(data("a").y_train)
    simulation = Simulation(Experiment("x", job, model, fleet, (x, y)), ScratchStore(folder), folder=None)
    simulation.run()
    return simulation, offers


def job_of(strategy: str, options: Mapping[str, Any], **recipe: Any) -> Job:
    settings = {"momentum": 0.0, "lr": LR, "loss": "mse", "epochs": STEPS, "batch_size": 16, **recipe}
    job = Job(seed=1, rounds=ROUNDS, devices=3, strategy=strategy, options=dict(options), recipe=Recipe(**settings))
    return replace(job, weight_limit=0, move_limit=0)


@pytest.mark.parametrize("densities", [[1.0], [1.0, 0.5, 0.25]], ids=["equal boards", "tiers"])
@pytest.mark.parametrize(
    ("strategy", "options", "momentum"),
    [
        ("scaffold", {"server_lr": 0.7}, 0.0),
        ("scaffold", {}, 0.9),
        ("feddyn", {"alpha": 0.3}, 0.0),
        ("fedcm", {"alpha": 0.2, "server_lr": 1.5}, 0.0),
        ("fedcm", {"alpha": 0.4}, 0.5),
    ],
)
def test_rounds_are_the_papers(
    tmp_path: Path, model: Model, strategy: str, options: dict[str, Any], momentum: float, densities: list[float]
) -> None:
    """To 1e-6 of the distance moved, and a few float32 roundings of the weights."""
    job = job_of(strategy, {**options, "densities": densities}, momentum=momentum)
    simulation, offers = simulate(tmp_path, model, job)
    widths = {name: offer["widths"][0] for name, offer in offers}
    assert len(set(widths.values())) == len(densities)
    start = {n: v.astype(np.float64) for n, v in model.tensors.items()}
    papers = Papers(start, widths, momentum, **options)
    for _ in range(ROUNDS):
        getattr(papers, strategy)()
    got = final_weights(simulation)
    length = {k: np.sqrt(sum(np.sum(f(n) ** 2) for n in start)) for k, f in {
        "off": lambda n: got[n] - papers.x[n], "moved": lambda n: papers.x[n] - start[n], "weights": lambda n: start[n],
    }.items()}  # fmt: skip
    assert length["moved"] > 0.1 * length["weights"]
    assert length["off"] < 1e-6 * length["moved"] + 2e-7 * length["weights"]


def test_a_drift_travels_from_the_second_round_on_and_its_bytes_count(tmp_path: Path, model: Model) -> None:
    simulation, offers = simulate(tmp_path, model, job_of("scaffold", {}))
    assert [("drift" in offer) for _, offer in offers] == [False] * 3 + [True] * 6
    assert len({offer["training"]["sha256"] for _, offer in offers}) == 1
    down = [row.down for row in simulation.record().rounds]
    file = offers[-1][1]["drift"]["size"]
    assert down[1] - down[0] == sum(offer[k]["size"] for _, offer in offers[3:6] for k in ("weights", "drift"))
    assert file >= offers[-1][1]["weights"]["size"]


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn", "fedcm"])
def test_what_no_update_carries_has_no_drift_and_stays(tmp_path: Path, model: Model, strategy: str) -> None:
    job = job_of(strategy, {}, frozen=("inner.weight",), personal=("outer.bias",))
    simulation, _ = simulate(tmp_path, model, replace(job, compression_down="int8"))
    weights = final_weights(simulation)
    for task in simulation.state.tasks.values():
        assert task.offer
        drift = tensorfile.decode(simulation.store.read(task.offer["drift"]["sha256"]))
        assert (
            set(drift)
            == {"inner.bias", "outer.weight"}
            == {n for n, v in weights.items() if v.tobytes() != model.tensors[n].tobytes()}
        )
