"""Optimisers' states that boards keep while their rounds, widths and channels change: the same bits as one state in the
coordinates of the whole model."""

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
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingControl, TrainingResult, TrainingTask
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
class Training:
    """One round of a board: where its channels were, and the optimiser's state before and after."""

    selection: Selection
    before: Tensors
    steps_before: int
    steps: int
    after: Tensors = field(default_factory=dict)


def in_full_coordinates(selection: Selection, moments: Tensors, kind: Callable[[str], str]) -> Tensors:
    """One array of every tensor, in the coordinates of the whole model, 0 where the board has no channel."""
    zeros = {t.name: np.zeros(t.shape, np.float32) for t in selection.architecture.tensors}
    submodel_moments = selection.gather(zeros) | {n: moments[kind(n)] for n in zeros if kind(n) in moments}
    return selection.scatter(submodel_moments, zeros)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Training]]:
    """Every board's trainings, as they are done."""
    trainings: dict[str, list[Training]] = defaultdict(list)
    train = Trainer.train

    def train_and_note(
        self: Trainer, tensors: Tensors, data: LocalData, task: TrainingTask, control: TrainingControl | None = None
    ) -> TrainingResult:
        result = train(self, tensors, data, task, control)
        nowhere = Selection.of(digits_net().architecture, task.widths)
        before = {n: v.copy() for n, v in task.moments.items()}
        after = {n: v.copy() for n, v in result.moments.items()}
        trainings[task.device].append(Training(nowhere, before, task.optimizer_steps, result.steps, after))
        return result

    monkeypatch.setattr(Trainer, "train", train_and_note)
    return trainings


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Simulation]:
    return lambda folder="run", **settings: digits_simulation(tmp_path / folder, rounds=4, recipe=ADAM, **settings)


@pytest.mark.parametrize("name", FLEETS)
def test_states_stay_with_their_channels(
    build: Callable[..., Simulation], rounds: dict[str, list[Training]], name: str
) -> None:
    selections: dict[str, list[Selection]] = defaultdict(list)

    def note(device: str, offer: Mapping[str, Any]) -> None:
        ranks = Selection.from_json(simulation.store.read(offer["ranking"]).decode(), simulation.model.architecture)
        selections[device].append(ranks.with_widths(tuple(offer["widths"])))

    simulation = build(fleet=[noting(board, note) for board in boards()], **FLEETS[name])
    simulation.run()

    changed = 0
    for device, trainings in rounds.items():
        assert len(trainings) == 4
        for training, selection in zip(trainings, selections[device], strict=True):
            training.selection = selection
        assert not trainings[0].before
        for previous, current in pairwise(trainings):
            assert current.steps_before == previous.steps_before + previous.steps
            means = in_full_coordinates(previous.selection, previous.after, step_contract.momentum_name)
            expected = current.selection.gather(means)
            started_with = {
                n: current.before[step_contract.momentum_name(n)]
                for n in expected
                if step_contract.momentum_name(n) in current.before
            }
            assert started_with
            assert any(v.any() for v in started_with.values())
            for tensor, value in started_with.items():
                np.testing.assert_array_equal(value, expected[tensor])
            changed += previous.selection.digest != current.selection.digest
        states = tensorfile.decode(simulation.store.read(simulation._run.boards[device]))
        newest = max((LocalState.from_bytes(r.tobytes()) for r in states.values()), key=lambda state: state.round)
        assert newest.steps == trainings[-1].steps_before + trainings[-1].steps
    assert changed >= 3


# At every push `test_resumed_runs.py` kills runs whose boards keep averages and personal tensors.
@pytest.mark.soak
def test_a_killed_run_continues_with_the_states(build: Callable[..., Simulation]) -> None:
    assert_resumes(build, 4, **FLEETS["other widths"], same_blobs=False)
