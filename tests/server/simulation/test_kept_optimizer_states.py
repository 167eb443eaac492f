"""Optimisers' states that boards keep while their rounds, widths and channels change: the same bits as one state in the
coordinates of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.local_state import LocalState
from fedprune_device.training.trainer import Trainer, TrainingControl, TrainingResult, TrainingTask
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import assert_resumes, boards, digits_net, digits_simulation, noting

ADAM = Recipe(epochs=1, batch_size=64, lr=1e-3, optimizer="adam", keep_optimizer_state=True)
FLEETS: dict[str, dict[str, Any]] = {
    "other widths": {
        "strategy": "pr-fl",
        "options": {"masks": "channels", "interval": 1, "synchronous": True, "recovery": False},
    },
    "other channels": {"density": 0.5, "scorer": "magnitude"},
}


@dataclass
class Trained:
    """One round of a board: where its channels were, and the optimiser's state before and after."""

    selection: Selection
    before: Tensors
    taken: int
    steps: int
    after: Tensors = field(default_factory=dict)


def globally(selection: Selection, moments: Tensors, kind: Callable[[str], str]) -> Tensors:
    """One array of every tensor, in the coordinates of the whole model, 0 where the board has no channel."""
    architecture = selection.architecture
    nothing = {t.name: np.zeros(t.shape, np.float32) for t in architecture.tensors}
    held = selection.gather(nothing) | {n: moments[kind(n)] for n in nothing if kind(n) in moments}
    return selection.scatter(held, nothing)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Trained]]:
    """Every board's trainings, as they are done."""
    found: dict[str, list[Trained]] = defaultdict(list)
    train = Trainer.train

    def watched(
        self: Trainer, tensors: Tensors, data: LocalData, task: TrainingTask, control: TrainingControl | None = None
    ) -> TrainingResult:
        result = train(self, tensors, data, task, control)
        nowhere = Selection.of(digits_net().architecture, task.widths)
        before = {n: v.copy() for n, v in task.moments.items()}
        after = {n: v.copy() for n, v in result.moments.items()}
        found[task.device].append(Trained(nowhere, before, task.optimizer_steps, result.steps, after))
        return result

    monkeypatch.setattr(Trainer, "train", watched)
    return found


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Simulation]:
    return lambda folder="run", **settings: digits_simulation(tmp_path / folder, rounds=4, recipe=ADAM, **settings)


@pytest.mark.parametrize("name", FLEETS)
def test_states_stay_with_their_channels(
    build: Callable[..., Simulation], rounds: dict[str, list[Trained]], name: str
) -> None:
    selections: dict[str, list[Selection]] = defaultdict(list)

    def note(device: str, offer: Mapping[str, Any]) -> None:
        ranks = Selection.from_json(simulation.store.read(offer["ranking"]).decode(), simulation.model.architecture)
        selections[device].append(ranks.with_widths(tuple(offer["widths"])))

    simulation = build(fleet=[noting(board, note) for board in boards()], **FLEETS[name])
    simulation.run()

    changed = 0
    for device, trained in rounds.items():
        assert len(trained) == 4
        for one, where in zip(trained, selections[device], strict=True):
            one.selection = where
        assert not trained[0].before
        for last, now in pairwise(trained):
            assert now.taken == last.taken + last.steps
            means = globally(last.selection, last.after, step_contract.momentum_name)
            there = now.selection.gather(means)
            began = {
                n: now.before[step_contract.momentum_name(n)]
                for n in there
                if step_contract.momentum_name(n) in now.before
            }
            assert began
            assert any(v.any() for v in began.values())
            for tensor, value in began.items():
                np.testing.assert_array_equal(value, there[tensor])
            changed += last.selection.digest != now.selection.digest
        states = tensorfile.decode(simulation.store.read(simulation._run.boards[device]))
        newest = max((LocalState.from_bytes(r.tobytes()) for r in states.values()), key=lambda own: own.round)
        assert newest.steps == trained[-1].taken + trained[-1].steps
    assert changed >= 3


# At every push `test_resumed_runs.py` kills runs whose boards keep averages and personal tensors.
@pytest.mark.soak
def test_a_killed_run_continues_with_the_states(build: Callable[..., Simulation]) -> None:
    assert_resumes(build, 4, **FLEETS["other widths"], same_blobs=False)
