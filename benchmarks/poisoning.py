"""What poisoned updates do to the model: hostile boards among ten, with the default limits and without any.

    OMP_NUM_THREADS=1 python -m benchmarks.poisoning

Simulated boards train honestly on the demo's digits; the hostile ones then change what they hand in.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import run_cases
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal_digits, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import Outcome, StoredData, VirtualDevice
from fedprune_server.simulation.results.run_folder import simulate_in_folder

SEEDS = (0, 1)
LAST = 3
"""Rounds of which accuracies are means."""

BOARDS = 10

EDGE = 7.9
"""Largest weight that the numeric check lets through while the model's own are small."""

STATISTIC = 1e6
"""A batch-norm statistic that the numeric check lets through."""

BOAST = 1000

FAR = {"flip": 8.0, "reverse": 12.0}
"""An attack's length in honest ones: longer than the limits allow, and too short to be rejected. A mean is shorter than
what it is made of."""

NONE = "none"


def cases() -> Iterator[dict[str, Any]]:
    """The runs; without limits, attacks are played once."""

    def case(strategy: str, limits: bool, attack: str, hostile: int, seed: int = SEEDS[0]) -> dict[str, Any]:
        names = {"data": "digits", "strategy": strategy, "limits": limits}
        return names | {"attack": attack, "hostile": hostile, "seed": seed}

    for limits in (True, False):
        for seed in SEEDS:
            yield case("fedavg", limits, NONE, 0, seed)
    for attack, counts in (
        ("reverse, boasting", (1, 2, 3)),
        ("flip, boasting", (1, 2, 3)),
        ("flip", (2,)),
        ("x100", (2,)),
        ("bound", (2,)),
    ):
        for hostile in counts:
            yield case("fedavg", True, attack, hostile)
    yield case("fedavg", False, "reverse, boasting", 1)
    for hostile in (0, 1, 2):
        yield case("fedprune", True, "reverse, boasting" if hostile else NONE, hostile)


def experiment(strategy: str, limits: bool, seed: int) -> Experiment:
    """Honest boards and data."""
    names = [f"board-{i}" for i in range(BOARDS)]
    data = deal_digits(names, seed=seed)
    recipe = Recipe(epochs=3, batch_size=32, lr=0.03, momentum=0.9)
    settings: dict[str, Any] = {} if limits else {"move_limit": 0.0, "weight_limit": 0.0}
    settings |= {"compression": "none"}  # hostile boards read and write plain updates
    job = Job("poisoning", seed, 12, BOARDS, deadline_s=1e7, strategy=strategy, recipe=recipe, **settings)
    boards = [VirtualDevice(n, find_profile("raspberry-pi-5"), data.devices[n]) for n in names]
    model = import_onnx(digits_model(), "digits-net")
    return Experiment("poisoning", job, model, boards, (data.x, data.y), data.calibration)


@dataclass
class Attack:
    """What hostile boards hand in. They train last in a round, and know what the others have handed in."""

    architecture: Architecture
    kind: str
    honest: dict[str, list[dict[str, npt.NDArray[np.float64]]]] = field(default_factory=dict)

    def watch(self, outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> Outcome:
        """Note an honest board's change, by the offered ranking, which is another one in each round."""
        self.honest.setdefault(self._key(offer), []).append(self._changes(outcome, offer, store)[1])
        return outcome

    def spoil(self, outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> Outcome:
        sent, own = self._changes(outcome, offer, store)
        tensors = tensorfile.decode(store.read(outcome.weights.sha256))
        known = self.honest.get(self._key(offer), [])
        same = [d for d in known if all(d[n].shape == own[n].shape for n in own)] if "reverse" in self.kind else []
        change = {n: np.mean([d[n] for d in same], axis=0) for n in own} if same else own
        times = {"x100": 100.0, "flip": -1.0}.get(self.kind, -FAR.get(self.kind.partition(",")[0], 1.0))
        out = {}
        for name, value in tensors.items():
            if self.kind == "bound":
                trainable = self.architecture.by_name[name].kind.is_trainable
                out[name] = np.full_like(value, EDGE if trainable else STATISTIC)
            elif name in change:
                out[name] = np.clip(sent[name] + times * change[name], -EDGE, EDGE).astype(np.float32)
            else:
                out[name] = np.array(value)
        steps = BOAST * outcome.steps if "boasting" in self.kind else outcome.steps
        return replace(outcome, weights=store.put(tensorfile.encode(out)), steps=steps)

    def _key(self, offer: Mapping[str, Any]) -> str:
        return str(offer["weights"]["sha256"])

    def _changes(self, outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> tuple[Any, Any]:
        """What was sent, and by trained tensor the change."""
        sent = tensorfile.decode(store.read(offer["weights"]["sha256"]))
        got = tensorfile.decode(store.read(outcome.weights.sha256))
        trained = [name for name in got if self.architecture.by_name[name].kind.is_trainable]
        return sent, {name: got[name].astype(np.float64) - sent[name] for name in trained}


def attacked(what: Experiment, kind: str, count: int) -> Experiment:
    """The experiment with its last boards hostile; boasting ones claim more samples than they have."""
    attack = Attack(what.model.architecture, kind)
    ordered = sorted(what.devices, key=lambda device: device.name)
    honest = [replace(device, tamper=attack.watch) for device in ordered[:-count]]
    hostile = [replace(device, tamper=attack.spoil) for device in ordered[-count:]]
    if "boasting" in kind:
        stored = [StoredData.of(device.load) for device in hostile]
        claims = [replace(data, samples=BOAST * data.samples) for data in stored]
        hostile = [replace(device, data=claim) for device, claim in zip(hostile, claims, strict=True)]
    return replace(what, devices=(*honest, *hostile))


def run(data: str, strategy: str, limits: bool, attack: str, hostile: int, seed: int) -> dict[str, Any]:
    """Accuracy of the global model."""
    what = experiment(strategy, limits, seed)
    if hostile:
        what = attacked(what, attack, hostile)
    with tempfile.TemporaryDirectory() as folder:
        record = simulate_in_folder(what, Path(folder))
    accuracies = [row.accuracy or 0.0 for row in record.rounds]
    limited, updates = record.count_limited
    return {
        "accuracy": statistics.fmean(accuracies[-LAST:]),
        "limited": limited / max(1, updates),
        "accuracies": accuracies,
    }


if __name__ == "__main__":
    run_cases("poisoning", __doc__, cases(), run, "onnxruntime")
