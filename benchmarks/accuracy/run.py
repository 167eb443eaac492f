"""One run: a method, a seed, and the numbers that are left of it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.accuracy import nets, sets
from benchmarks.accuracy.compositions import PERSONAL
from benchmarks.accuracy.protocol import AVERAGE, CALIBRATION, Board, Method, Protocol
from benchmarks.accuracy.shares import shares
from benchmarks.accuracy.strategy_code import strategy_digest
from benchmarks.harness import processor
from fedprune.core.atomic_file import write_atomically
from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import NO_UPDATE_LIMITS, Job
from fedprune.planning.profile import TIERS, HardwareProfile
from fedprune.planning.profile_store import find_profile
from fedprune.strategies.allocation import natural_sort_key
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.datasets.data_plan import DataPlan
from fedprune_server.simulation.datasets.federation import Federation
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.measure import MeasuredRound, ModelMeasure
from fedprune_server.simulation.network_model import Weather
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.run_folder import simulate_in_folder
from fedprune_server.simulation.simulation import Simulation

UNLIMITED = {**NO_UPDATE_LIMITS, "ignores_plans": True}
"""Tables compare strategies as they are published, without limits on updates, and with a paper's own tiers."""


def job_of(protocol: Protocol, method: Method, devices: int, seed: int, elements: Sequence[float]) -> Job:
    """The job of a row; `elements` are the densities of one whose submodels are made of elements."""
    options = dict(method.options)
    if method.densities:
        options = {"densities": list(elements if method.elements else protocol.densities), **options}
    recipe = replace(protocol.recipe, **{"average": AVERAGE, "calibrate": True, **method.recipe})
    settings: dict[str, Any] = {
        "deadline_s": 1e7, "rounds": protocol.rounds, **UNLIMITED, **protocol.job, **method.job,
    }  # fmt: skip
    return Job(
        name=protocol.name, seed=seed, devices=devices, strategy=method.strategy, options=options, recipe=recipe,
        **settings,
    )  # fmt: skip


def experiment_of(protocol: Protocol, method: Method, seed: int, *, workers: int = 1, cuda: bool = False) -> Experiment:
    """All of a run: data dealt out by the seed, net drawn by the seed, boards by tiers."""
    plan = DataPlan(source=protocol.source, seed=seed, **protocol.data)
    federation = plan.deal(sets.samples(protocol.source))
    shape = federation.preparation(federation.samples.take([0])).shape[1:]
    model = nets.model(protocol.net, shape, federation.samples.classes, seed)
    elements = shares(model.architecture, protocol.densities) if method.elements else ()
    job = job_of(protocol, method, len(federation.names), seed, elements)
    return Experiment(
        f"{protocol.name}: {method.name}",
        job,
        model,
        fleet(federation, protocol.boards),
        calibration=calibration_of(federation, seed) if method.samples else None,
        measure=Scales(protocol, federation, seed),
        weather=Weather(**protocol.weather),
        workers=workers,
        cuda=cuda,
    )


def fleet(federation: Federation, boards: tuple[Board, ...]) -> tuple[VirtualDevice, ...]:
    """Devices with their boards: as many of each kind, in the order of their names."""
    names = sorted(federation.names, key=natural_sort_key)
    kinds = [_profile(board) for board in boards]
    return tuple(
        VirtualDevice(name, kinds[place * len(kinds) // len(names)], federation.load(name))
        for place, name in enumerate(names)
    )


class Scales:
    """Measures the global model on all devices' tests together, and its submodels more rarely.

    Batch-norm statistics are measured again for every width, on the same training samples for every method.
    """

    def __init__(self, protocol: Protocol, federation: Federation, seed: int) -> None:
        # With a test set of the server's own (the papers' global one) that is what global models are measured on.
        found = federation.evaluation()
        x, y = found if found is not None else federation.pooled_tests()
        calibration = calibration_of(federation, seed)
        densities = tuple(d for d in protocol.densities if d < 1) if protocol.submodels else ()
        self._often = ModelMeasure(x, y, calibration=calibration, every=protocol.every_global)
        self._rarely = ModelMeasure(x, y, densities, calibration)
        self._protocol = protocol

    def __call__(self, moment: MeasuredRound) -> dict[str, float]:
        """The numbers of a round."""
        counts = moment.memory.get(PERSONAL, {}).items()
        personal = {f"personal@{name}": int(own) / max(1, int(whole)) for name, (own, whole) in counts}
        return {**found, **personal} if (found := self._measured(moment)) else {}

    def _measured(self, moment: MeasuredRound) -> Mapping[str, float]:
        protocol, last = self._protocol, moment.round == moment.job.rounds
        if protocol.every_s:
            # Nothing is remembered: a run that was killed measures in the same rounds as one that wasn't.
            passed = moment.previous_clock // protocol.every_s < moment.clock // protocol.every_s
            return self._rarely(moment) if passed or last or moment.round == 1 else {}
        return self._rarely(moment) if last or moment.round % protocol.every == 0 else self._often(moment)


def calibration_of(federation: Federation, seed: int) -> npt.NDArray[Any]:
    """Some training samples of all devices together."""
    rows = np.sort(np.concatenate([h.train for h in federation.holdings.values()]))
    order = keyed_generator(seed, "calibration").permutation(len(rows))[:CALIBRATION]
    return federation.preparation(federation.samples.take(rows[np.sort(order)]))


def run(
    protocol: Protocol,
    method: Method,
    seed: int,
    folder: Path,
    *,
    workers: int = 1,
    cuda: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run, or continue with, a row for one seed, in `workers` processes. Its numbers are returned, and written to
    `folder` before the state that they were made from goes from there."""
    key, began = protocol.key(method, seed, cuda=cuda), (time.perf_counter(), cpu_seconds())
    experiment = experiment_of(protocol, method, seed, workers=workers, cuda=cuda)
    place = state_path(protocol, method, seed, folder, cuda=cuda)
    place.mkdir(parents=True, exist_ok=True)
    clock = place / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else [0.0, 0.0]
    seen, running = [0], []

    def used() -> list[float]:
        return [before[0] + time.perf_counter() - began[0], before[1] + cpu_seconds() - began[1]]

    def progress(simulation: Simulation) -> None:
        done = len(simulation.state.history)
        if done == seen[0]:
            return
        seen[0] = done
        running[:] = [simulation]
        clock.write_text(json.dumps(used()))
        if not quiet:
            found = {k: round(v, 3) for k, v in simulation.notes[done].measured.items() if not k.endswith("_loss")}
            if not found:
                return
            print(f"{method.name} seed {seed}: round {done}/{simulation.job.rounds} {found}", flush=True)

    def timed(simulation: Simulation) -> None:
        progress(simulation)
        if not seen[0]:  # a device's training is progress, too
            return
        if protocol.until_s and simulation.clock >= protocol.until_s:
            raise _TimeIsUpError
        found = simulation.notes[seen[0]].measured.get("global", 0.0)
        if protocol.ends_at_target and found >= protocol.target:
            raise _TimeIsUpError

    try:
        record, _ = simulate_in_folder(experiment, place, timed)
    except _TimeIsUpError:
        record = running[0].record()
    spent = used()
    result = {
        "table": protocol.name,
        "method": method.name,
        "seed": seed,
        "key": key,
        "trainer": "onnxruntime on CUDA" if cuda else "onnxruntime",
        "code": commit(),
        "strategies": strategy_digest(method.strategy),
        "machine": machine(),
        "wall_s": round(spent[0], 1),
        "cpu_s": round(spent[1], 1),
        "parameters": parameters(experiment.model),
        "devices": {d.name: [d.density, d.samples, d.parameters] for d in record.devices},
        "rounds": rounds_of(record),
    }
    write_atomically(result_path(method, seed, folder, cuda=cuda), json.dumps(result).encode())
    shutil.rmtree(place)
    return result


def result_path(method: Method, seed: int, folder: Path, *, cuda: bool = False) -> Path:
    """Where the result of a run lies."""
    return folder / f"{_file_name(method, seed, cuda=cuda)}.json"


def state_path(protocol: Protocol, method: Method, seed: int, folder: Path, *, cuda: bool = False) -> Path:
    """Where the state of a run lies that isn't over."""
    return folder / f"{_file_name(method, seed, cuda=cuda)}-{protocol.key(method, seed, cuda=cuda)}"


def _file_name(method: Method, seed: int, *, cuda: bool) -> str:
    words = [method.name, str(seed), *(["cuda"] if cuda else [])]
    return re.sub(r"[ /:]", "_", "-".join(words))


def parameters(model: Model) -> list[int]:
    """How many numbers of a model are trained, and how many statistics it has beside them."""
    trained = {t.name for t in model.architecture.trainable}
    sizes = {n: v.size for n, v in model.tensors.items()}
    return [sum(s for n, s in sizes.items() if n in trained), sum(s for n, s in sizes.items() if n not in trained)]


class _TimeIsUpError(Exception):
    """The simulated time that a protocol gives its runs is over, or the target is reached."""


def rounds_of(record: Record) -> list[dict[str, Any]]:
    """A run's rounds in short: means over devices of each device's latest measurement, bytes, work, time."""
    latest: dict[str, dict[str, float]] = {}
    density: dict[str, float] = {}
    macs, active, out = 0.0, 0.0, []
    for row in record.rounds:
        for metric, values in row.device_metrics.items():
            latest.setdefault(metric, {}).update({k: v for k, v in values.items() if math.isfinite(v)})
        density.update(row.density)
        macs, active = macs + row.macs, active + row.active_macs
        if not row.measured and row is not record.rounds[-1]:
            continue
        out.append(
            {
                "round": row.round,
                "at": round(row.elapsed_s, 3),
                "down": row.down,
                "up": row.up,
                "macs": macs,
                "density": round(statistics.fmean(density.values()), 4) if density else 1.0,
                "active_macs": active,
                "measured": {k: round(v, 5) for k, v in row.measured.items()},
                "own": {m: _means(v, density) for m, v in latest.items()},
            }
        )
    return out


def _means(values: Mapping[str, float], density: Mapping[str, float]) -> dict[str, Any]:
    """The mean over devices, how many they are, and means by density."""
    if not values:
        return {"n": 0}
    tiers: dict[str, list[float]] = {}
    for name, value in values.items():
        tiers.setdefault(f"{density.get(name, 1.0):g}", []).append(value)
    return {
        "mean": round(statistics.fmean(values.values()), 5),
        "n": len(values),
        "tiers": {k: round(statistics.fmean(v), 5) for k, v in sorted(tiers.items(), reverse=True)},
    }


def _profile(board: Board) -> HardwareProfile:
    """A shipped board that trains on its processor, as these runs do. Nothing else of its profile decides a number."""
    shipped = find_profile(board.profile)
    processor = replace(shipped.software, tier=TIERS[0], tensorrt=None)
    found = replace(shipped, accelerator=None, power=None, software=processor)
    if not board.down_mb_s:
        return found
    link = replace(
        found.link, down_bytes_s=board.down_mb_s * 1e6, up_bytes_s=board.up_mb_s * 1e6, bytes_per_round=2**40
    )
    said = dict.fromkeys(("link.down_bytes_s", "link.up_bytes_s", "link.bytes_per_round"), "estimate: an experiment's")
    name = f"{found.name}-{board.down_mb_s:g}-{board.up_mb_s:g}"
    return replace(found, name=name, link=link, sources={**found.sources, **said})


def commit() -> str:
    """The commit of the code that runs, with a mark where code differs from it; empty outside of a repository."""
    found = _git("describe", "--always")
    return f"{found}-dirty" if found and _git("status", "--porcelain", "-uno", "--", "*.py") else found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """The processor, its cores and the system."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}"


def cpu_seconds() -> float:
    """Processor seconds of this process and the children that it waited for."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
