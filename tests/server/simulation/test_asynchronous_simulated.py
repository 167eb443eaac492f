"""Asynchronous strategies in simulated fleets: their models are what the papers' equations make of the updates."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.coordination import commands as do
from fedprune.core import tensorfile
from fedprune.jobs.schedule import Schedule
from fedprune.model.architecture import TensorKind
from fedprune.model.element_mask import mask_from_bits, unpack_active
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune_server.simulation.network_model import Weather
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import KINDS, boards, boards_that_validate, digits_simulation, noting


class Run:
    """A finished simulation, with all that closed its rounds; its store keeps everything."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.store = simulation.store
        self.store.delete = lambda digest: None  # type: ignore[method-assign]
        self.closes: list[do.Close] = []
        worker = simulation._worker
        execute = worker.execute

        def execute_and_note(command: Any) -> Any:
            if isinstance(command, do.Close):
                self.closes.append(command)
            return execute(command)

        worker.execute = execute_and_note  # type: ignore[method-assign]
        simulation.run()

    @property
    def models(self) -> list[str]:
        return [h["model"] for h in self.simulation.state.history]

    def tensors(self, digest: str) -> Tensors:
        return tensorfile.decode(self.store.read(digest))

    def steps(self) -> Iterator[tuple[do.Close, Tensors, Tensors]]:
        """Every round: how it was closed, the model before and the model after."""
        for close, after in zip(self.closes, self.models, strict=True):
            yield close, self.tensors(close.model), self.tensors(after)


Build = Callable[..., Run]
Simulate = Callable[..., Simulation]


@pytest.fixture
def run(tmp_path: Path) -> Build:
    def build(strategy: str, **settings: Any) -> Run:
        limits = {"move_limit": 0.0, "weight_limit": 0.0}  # equations hold for updates as they come
        settings = {"rounds": 4, "recipe": Recipe(max_steps=3, batch_size=16), **limits, **settings}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return Run(
            digits_simulation(folder, keeps_state=False, fleet=boards_that_validate(), strategy=strategy, **settings)
        )

    return build


def close_to(tensors: Tensors, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(tensors[name], value, rtol=0, atol=2e-6, err_msg=name)


def test_a_buffer_of_everybody_is_fedavg_bit_for_bit(run: Build) -> None:
    fresh = {"buffer": 3, "staleness": "polynomial"}
    uniform = run("fedavg", rounds=2, options={"weighting": "uniform"})
    assert run("fedbuff", rounds=2, options=fresh).models == uniform.models


def test_fedasync_mixes_one_update_at_a_time(run: Build) -> None:
    """w ← (1 − α·s(k))·w + α·s(k)·w_k."""
    simulated = run("fedasync", rounds=8, options={"rate": 0.6, "a": 0.5})
    stale = []
    for close, before, after in simulated.steps():
        (update,) = close.contributions
        stale.append(close.round - update.basis.round)
        assert close.rate == pytest.approx(0.6 * (stale[-1] + 1) ** -0.5)
        new = simulated.tensors(update.weights)
        close_to(after, {n: (1 - close.rate) * before[n].astype(float) + close.rate * new[n] for n in new})
    assert max(stale) >= 2, "boards of different speed"
    fast = [c.contributions[0].part.device for c in simulated.closes]
    assert fast.count("jetson-orin-nano") > fast.count("raspberry-pi-zero-2w")


def test_fedbuff_moves_by_the_mean_of_stale_moves(run: Build) -> None:
    """w ← w + η·(1/K)·Σ s(k_i)·(w_i − w_sent)."""
    simulated = run("fedbuff", rounds=6, options={"buffer": 2, "rate": 0.8})
    for close, before, after in simulated.steps():
        assert len(close.contributions) == 2
        moves = {n: np.zeros(v.shape) for n, v in before.items()}
        for c in close.contributions:
            share = (close.round - c.basis.round + 1) ** -0.5
            new, sent = simulated.tensors(c.weights), simulated.tensors(c.basis.model)
            for name in moves:
                moves[name] += 0.8 / 2 * share * (new[name].astype(float) - sent[name])
        close_to(after, {n: before[n] + moves[n] for n in trainable(simulated)})
    assert any(close.round > c.basis.round for close in simulated.closes for c in close.contributions)


def test_fedfix_weighs_by_how_many_windows_a_device_takes(run: Build) -> None:
    """w ← w + η·Σ ceil(τ_i / Δt)·p_i·(w_i − w_sent), p_i = 1/M."""
    simulated = run("fedfix", rounds=9, options={"window_s": 0.1, "rate": 0.9})
    history = simulated.simulation.state.history
    factors = set()
    for (close, before, after), entry in zip(simulated.steps(), history, strict=True):
        moves = {n: np.zeros(v.shape) for n, v in before.items()}
        for c in close.contributions:
            factor = np.ceil(entry["devices"][c.part.device]["seconds"] / 0.1)
            factors.add(factor)
            new, sent = simulated.tensors(c.weights), simulated.tensors(c.basis.model)
            for name in moves:
                moves[name] += 0.9 * factor / 3 * (new[name].astype(float) - sent[name])
        close_to(after, {n: before[n] + moves[n] for n in trainable(simulated)})
    assert len(factors) > 1


def trainable(simulated: Run) -> list[str]:
    return [t.name for t in simulated.simulation.model.architecture.trainable]


def masked_mean(simulated: Run, close: do.Close, before: Tensors, schedule: Schedule) -> dict[str, Any]:
    """MaskFedAvg (PR-FL) in float64, of element masks: means over those that hold an element; else the model before."""
    sums = {n: np.zeros(v.shape) for n, v in before.items()}
    mass = {n: np.zeros(v.shape) for n, v in before.items()}
    shapes = {n: v.shape for n, v in before.items()}
    for c in close.contributions:
        share = schedule.staleness(close.round - c.basis.round)
        bits = {} if c.mask is None else mask_from_bits(simulated.tensors(c.mask), shapes)
        new = {n: v for n, v in simulated.tensors(c.weights).items() if "::" not in n}
        for name, value in unpack_active(bits, new).items():
            active = bits.get(name, np.ones(shapes[name], bool))
            sums[name] += share * active * value.astype(float)
            mass[name] += share * active
    return {n: np.where(mass[n] > 0, sums[n] / np.maximum(mass[n], 1e-300), before[n]) for n in before}


PR_FL = {"interval": 2, "window_s": 0.1, "patience": 1, "floor": 0.2}


def test_pr_fl_is_a_masked_mean_of_everybodys_last_update(run: Build) -> None:
    simulated = run("pr-fl", rounds=10, options={**PR_FL, "delta": 0.3})
    schedule = simulated.simulation.coordinator.schedule
    assert schedule.keep
    for close, before, after in simulated.steps():
        close_to(after, masked_mean(simulated, close, before, schedule))
    assert max(len(c.contributions) for c in simulated.closes) == 3
    assert max(c.round - p.basis.round for c in simulated.closes for p in c.contributions) >= 2
    masked = [p for c in simulated.closes for p in c.contributions if p.mask is not None]
    kinds = {t.name: t.kind for t in simulated.simulation.model.architecture.tensors}
    assert {kinds[n] for p in masked for n in simulated.tensors(p.mask or "")} == {TensorKind.WEIGHT}
    assert masked, "times have made somebody's model sparser"
    assert {p.part.widths for p in masked} == {simulated.simulation.model.architecture.sizes}


def test_pr_fl_with_channels_narrows_slow_boards_and_widens_them_again(run: Build) -> None:
    simulated = run("pr-fl", rounds=16, options={**PR_FL, "masks": "channels"})
    device_parts = [(c.round, p.part) for c in simulated.closes for p in c.contributions]
    densities = [p.density for _, p in device_parts if p.device == "raspberry-pi-zero-2w"]
    assert densities[0] == 1.0
    assert min(densities) < 0.9
    assert densities[-1] > min(densities), "what has learnt all it can grows"
    for _, device_part in device_parts:
        assert (device_part.widths == simulated.simulation.model.architecture.sizes) == (device_part.density == 1.0)
    assert not any(p.mask for c in simulated.closes for p in c.contributions)


# Several rounds are under way at a time.

FIVE = (*KINDS, "raspberry-pi-5", "jetson-nano")
ONE_AT_A_TIME = {"arrivals": 1, "mixing": "damped", "rate": 0.5, "staleness": {"decay": "polynomial", "a": 0.5}}


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    def build(schedule: dict[str, Any], **settings: Any) -> Simulation:
        options = {"schedule": {"kind": "asynchronous", **schedule}}
        settings = {"rounds": 9, "devices": 2, "density": 0.25, "deadline_s": 20.0, "options": options, **settings}
        strategy = "support.fakes.tiny_job:scheduled"
        settings = {"fleet": boards(FIVE), "recipe": Recipe(max_steps=2), **settings}
        return digits_simulation(tmp_path, strategy=strategy, **settings)

    return build


def test_devices_work_on_several_rounds_at_a_time(simulate: Simulate) -> None:
    rounds: list[int] = []
    pushed: list[tuple[str, str]] = []
    fleet = [
        noting(board, lambda name, offer: pushed.append((name, offer["weights"]["sha256"]))) for board in boards(FIVE)
    ]

    def note(run: Simulation) -> None:
        rounds.append(len({task.basis["round"] for task in run.state.tasks.values() if task.basis is not None}))

    history = simulate(ONE_AT_A_TIME, weather=Weather(compute_spread=1.0), rounds=12, fleet=fleet).run(note)
    assert max(rounds) > 1
    assert len(set(pushed)) == len(pushed)  # nobody trains a model twice
    assert max(d["staleness"] for row in history for d in row["devices"].values()) > 1
    assert len({row["model"] for row in history}) == 12
