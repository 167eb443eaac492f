"""Asynchronous strategies in simulated fleets: their models are what the papers' equations make of the updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.model.architecture import TensorKind
from fedprune.model.element_mask import ElementMask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.planning.profile_store import find
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "jetson-orin-nano")


class Hoard(BlobStore):
    """A store that keeps everything."""

    def delete(self, digest: str) -> None:
        """Nothing is deleted."""


class Run:
    """A finished simulation, with all that closed its rounds."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.store = simulation.store
        self.closes: list[do.Close] = []
        worker = simulation._worker
        execute = worker.execute

        def watched(command: Any) -> Any:
            if isinstance(command, do.Close):
                self.closes.append(command)
            return execute(command)

        worker.execute = watched  # type: ignore[method-assign]
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


@pytest.fixture(scope="module")
def model() -> Any:
    return import_onnx(digits_model(), "digits-net")


@pytest.fixture(scope="module")
def data() -> Any:
    federation = deal(KINDS, seed=1)
    hands = {}
    for kind, d in federation.devices.items():
        hands[kind] = LocalData(d.x_train[:-40], d.y_train[:-40], d.x_test, d.y_test, d.x_train[-40:], d.y_train[-40:])
    return replace(federation, devices=hands)


@pytest.fixture
def make(model: Any, data: Any, tmp_path: Path) -> Callable[..., Simulation]:
    devices = [VirtualDevice(kind, find(kind), data.devices[kind]) for kind in KINDS]

    def build(strategy: str, folder: str = "", **settings: Any) -> Simulation:
        recipe = settings.pop("recipe", Recipe(max_steps=3, batch_size=16))
        name = folder or f"{strategy}-{len(list(tmp_path.iterdir()))}"
        values = {"seed": 3, "rounds": 4, "devices": 3, "recipe": recipe, "strategy": strategy, **settings}
        store = (BlobStore if folder else Hoard)(tmp_path / name / "blobs", durable=False)
        where = tmp_path / name if folder else None
        values = {"move_limit": 0.0, "weight_limit": 0.0, **values}  # equations hold for updates as they come
        job = Job(name=name, **values)
        return Simulation(Experiment("x", job, model, devices, (data.x, data.y)), store, folder=where)

    return build


@pytest.fixture
def run(make: Callable[..., Simulation]) -> Build:
    return lambda strategy, **settings: Run(make(strategy, **settings))


def close_to(found: Tensors, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_a_buffer_of_everybody_is_fedavg_bit_for_bit(run: Build) -> None:
    options = {"buffer": 3, "staleness": "constant", "weighting": "samples"}
    assert run("fedbuff", rounds=2, options=options).models == run("fedavg", rounds=2).models
    fresh = {"buffer": 3, "staleness": "polynomial"}
    uniform = run("fedavg", rounds=2, options={"weighting": "uniform"})
    assert run("fedbuff", rounds=2, options=fresh).models == uniform.models


def test_fedasync_mixes_one_update_at_a_time(run: Build) -> None:
    """w ← (1 − α·s(k))·w + α·s(k)·w_k."""
    found = run("fedasync", rounds=8, options={"rate": 0.6, "a": 0.5})
    stale = []
    for close, before, after in found.steps():
        (update,) = close.contributions
        stale.append(close.round - update.basis.round)
        assert close.rate == pytest.approx(0.6 * (stale[-1] + 1) ** -0.5)
        new = found.tensors(update.weights)
        close_to(after, {n: (1 - close.rate) * before[n].astype(float) + close.rate * new[n] for n in new})
    assert max(stale) >= 2, "boards of different speed"
    fast = [c.contributions[0].part.device for c in found.closes]
    assert fast.count("jetson-orin-nano") > fast.count("raspberry-pi-zero-2w")


@pytest.mark.slow
def test_fedbuff_moves_by_the_mean_of_stale_moves(run: Build) -> None:
    """w ← w + η·(1/K)·Σ s(k_i)·(w_i − w_sent)."""
    found = run("fedbuff", rounds=6, options={"buffer": 2, "rate": 0.8})
    for close, before, after in found.steps():
        assert len(close.contributions) == 2
        moved = {n: np.zeros(v.shape) for n, v in before.items()}
        for c in close.contributions:
            share = (close.round - c.basis.round + 1) ** -0.5
            new, sent = found.tensors(c.weights), found.tensors(c.basis.model)
            for name in moved:
                moved[name] += 0.8 / 2 * share * (new[name].astype(float) - sent[name])
        trained = trainable(found)
        close_to(after, {n: before[n] + moved[n] for n in trained})
    assert any(close.round > c.basis.round for close in found.closes for c in close.contributions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options", "rate", "beta"),
    [
        ("fedbuff", {"buffer": 2, "rate": 0.8, "server_momentum": 0.9}, 0.8, 0.9),
        ("fedprune", {"arrivals": 2, "densities": [1.0], "ranking": "ordered"}, 1.0, 0.5),
    ],
)
def test_stale_moves_enter_the_server_s_velocity(
    run: Build, strategy: str, options: dict[str, Any], rate: float, beta: float
) -> None:
    """v ← β·v + η·Σ p_i·s(k_i)·(w_i − w_sent) / Σ p_i, w ← w + v."""
    found = run(strategy, rounds=6, options=options)
    velocity = {n: np.zeros(1) for n in trainable(found)}
    for close, before, after in found.steps():
        importance = [1 if strategy == "fedbuff" else c.part.samples for c in close.contributions]
        velocity = {n: beta * v for n, v in velocity.items()}
        for c, p in zip(close.contributions, importance, strict=True):
            share = rate * p / sum(importance) * (close.round - c.basis.round + 1) ** -0.5
            new, sent = found.tensors(c.weights), found.tensors(c.basis.model)
            velocity = {n: v + share * (new[n].astype(float) - sent[n]) for n, v in velocity.items()}
        close_to(after, {n: before[n] + v for n, v in velocity.items()})
    assert any(close.round > c.basis.round for close in found.closes for c in close.contributions)


@pytest.mark.slow
def test_fedfix_weighs_by_how_many_windows_a_device_takes(run: Build) -> None:
    """w ← w + η·Σ ceil(τ_i / Δt)·p_i·(w_i − w_sent), p_i = 1/M."""
    found = run("fedfix", rounds=9, options={"window_s": 0.1, "rate": 0.9})
    history = found.simulation.state.history
    factors = set()
    for (close, before, after), entry in zip(found.steps(), history, strict=True):
        moved = {n: np.zeros(v.shape) for n, v in before.items()}
        for c in close.contributions:
            factor = np.ceil(entry["devices"][c.part.device]["seconds"] / 0.1)
            factors.add(factor)
            new, sent = found.tensors(c.weights), found.tensors(c.basis.model)
            for name in moved:
                moved[name] += 0.9 * factor / 3 * (new[name].astype(float) - sent[name])
        close_to(after, {n: before[n] + moved[n] for n in trainable(found)})
    assert len(factors) > 1


def trainable(found: Run) -> list[str]:
    return [t.name for t in found.simulation.model.architecture.trainable]


def masked_mean(found: Run, close: do.Close, before: Tensors, schedule: Schedule) -> dict[str, Any]:
    """MaskFedAvg (PR-FL) in float64, of element masks: means over those that hold an element; else the model before."""
    sums = {n: np.zeros(v.shape) for n, v in before.items()}
    mass = {n: np.zeros(v.shape) for n, v in before.items()}
    shapes = {n: v.shape for n, v in before.items()}
    for c in close.contributions:
        share = schedule.staleness(close.round - c.basis.round)
        bits = ElementMask({}) if c.mask is None else ElementMask.from_tensors(found.tensors(c.mask), shapes)
        new = {n: v for n, v in found.tensors(c.weights).items() if "::" not in n}
        for name, value in bits.unpack(new).items():
            held = bits.active.get(name, np.ones(shapes[name], bool))
            sums[name] += share * held * value.astype(float)
            mass[name] += share * held
    return {n: np.where(mass[n] > 0, sums[n] / np.maximum(mass[n], 1e-300), before[n]) for n in before}


PR_FL = {"interval": 2, "window_s": 0.1, "patience": 1, "floor": 0.2}
IN_STEP = {"interval": 2, "patience": 1, "floor": 0.2, "synchronous": True}


@pytest.mark.slow
def test_pr_fl_is_a_masked_mean_of_everybodys_last_update(run: Build) -> None:
    found = run("pr-fl", rounds=10, options={**PR_FL, "delta": 0.3})
    schedule = found.simulation.coordinator.schedule
    assert schedule.keep
    for close, before, after in found.steps():
        close_to(after, masked_mean(found, close, before, schedule))
    assert max(len(c.contributions) for c in found.closes) == 3
    stale = [c.round - p.basis.round for c in found.closes for p in c.contributions]
    assert max(stale) >= 2
    masked = [p for c in found.closes for p in c.contributions if p.mask is not None]
    assert masked, "times have made somebody's model sparser"
    assert {p.part.widths for p in masked} == {found.simulation.model.architecture.sizes}


@pytest.mark.soak  # forty rounds; at every push `test_asynchronous_presets.py` has who is asked when
def test_pr_fl_hears_of_every_device_in_every_interval_however_slow_it_is(run: Build) -> None:
    options = {"interval": 10, "window_s": 0.02, "least": 1, "stage1": False, "recovery": False, "evaluate_every": 100}
    found = run("pr-fl", rounds=40, recipe=Recipe(max_steps=2, batch_size=16), options=options)
    counted: dict[str, dict[int, bool]] = {kind: {} for kind in KINDS}
    for close in found.closes:
        for part in close.contributions:
            number, known = part.basis.round, counted[part.part.device]
            assert part.part.last == max((n for n in known if n < number), default=0)
            known[number] = any("::squares" in n for n in found.tensors(part.weights))
    assert len(counted["jetson-orin-nano"]) > 2 * len(counted["raspberry-pi-zero-2w"])
    for known in counted.values():
        heard = {(n - 1) // 10 for n, squares in known.items() if squares}
        assert heard == {(n - 1) // 10 for n in known}
    assert sum(counted["jetson-orin-nano"].values()) <= 2 * 4, "the first and the last of each, not all"


@pytest.mark.slow
def test_pr_fl_with_channels_narrows_slow_boards_and_widens_them_again(run: Build) -> None:
    found = run("pr-fl", rounds=16, options={**PR_FL, "masks": "channels"})
    parts = [(c.round, p.part) for c in found.closes for p in c.contributions]
    slow = [p.density for _, p in parts if p.device == "raspberry-pi-zero-2w"]
    assert slow[0] == 1.0
    assert min(slow) < 0.9
    assert slow[-1] > min(slow), "what has learnt all it can grows"
    for _, part in parts:
        assert (part.widths == found.simulation.model.architecture.sizes) == (part.density == 1.0)
    assert not any(p.mask for c in found.closes for p in c.contributions)


@pytest.mark.slow
def test_pr_fl_in_step_and_without_buffers(run: Build) -> None:
    in_step = run("pr-fl", rounds=3, options=IN_STEP)
    assert all(len(c.contributions) == 3 for c in in_step.closes)
    bare = run("pr-fl", rounds=5, options={**PR_FL, "keep": False, "recovery": False, "importance": "taylor"})
    seen = [(p.part.device, p.basis.round) for c in bare.closes for p in c.contributions]
    assert len(seen) == len(set(seen))


@pytest.mark.slow
def test_pr_fl_in_step_ranks_channels_every_interval(run: Build) -> None:
    options = {**IN_STEP, "masks": "channels", "interval": 3, "stage1": False, "recovery": False, "densities": [0.5]}
    found = run("pr-fl", rounds=6, recipe=Recipe(max_steps=8, batch_size=16, lr=0.1), options=options)
    rankings = [{p.basis.ranking for p in close.contributions} for close in found.closes]
    assert rankings == [rankings[0]] * 3 + [rankings[3]] * 3
    assert rankings[0] != rankings[3]


@pytest.mark.slow
def test_a_killed_simulation_goes_on_to_the_same_models(make: Callable[..., Simulation]) -> None:
    """`test_simulated_asynchronous.py` has other schedules; densities that times drive are PR-FL's alone."""
    options = {**PR_FL, "delta": 0.3}

    class KilledError(Exception):
        pass

    calm = make("pr-fl", folder="calm", rounds=5, options=options)
    calm.run()
    expected = [(h["model"], h["at"]) for h in calm.state.history]
    for at in (2, 5):
        seen = 0

        def watch(_: Simulation, at: int = at) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise KilledError

        with pytest.raises(KilledError):
            make("pr-fl", folder="calm2", rounds=5, options=options).run(watch)
    again = make("pr-fl", folder="calm2", rounds=5, options=options)
    again.run()
    assert [(h["model"], h["at"]) for h in again.state.history] == expected


@pytest.mark.slow
def test_no_batch_norm_statistic_is_masked(run: Build) -> None:
    found = run("pr-fl", rounds=4, options=PR_FL)
    kinds = {t.name: t.kind for t in found.simulation.model.architecture.tensors}
    for close in found.closes:
        for part in close.contributions:
            if part.mask is not None:
                assert {kinds[n] for n in found.tensors(part.mask)} <= {TensorKind.WEIGHT}
