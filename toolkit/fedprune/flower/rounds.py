"""Runs a job's rounds for Flower's server: `open` cuts a submodel for each node, `close` makes updates the next model.

A *node* is a client of Flower, and its `NodeShare` how much of the model it gets. Words of the strategies: a `Scene` is
what a strategy sees of the fleet and the round, a `Turn` one node's participation in it, a `Cut` the two with the
channels that the node gets. Nothing here needs Flower itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import check_counts, check_fold_base
from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.coordination.round import Round
from fedprune.coordination.update_limits import RoundUpdate, UpdateLimits
from fedprune.coordination.weight_limits import capped_weights
from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import path_exists
from fedprune.core.errors import FedpruneError, ProtocolError, StorageError
from fedprune.flower.allocation import NodeShare
from fedprune.flower.presets import compose_for_flower
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.trainable import frozen_tensors
from fedprune.strategies.values import Cut, NewMemory, Scene, Submodel, Turn, UpdateReport

_LOG = logging.getLogger("flwr.fedprune")


FORMAT = "fedprune.flower-state/1"

# The tensor that holds the state's head as JSON: one file, so that it is replaced in one step.
_HEAD_TENSOR = "fedprune"

_HEAD_TYPES = {
    "format": str, "architecture": str, "strategy": str, "round": int, "samples": dict, "last": dict, "memory": list,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class FlowerState:
    """What the next round continues from: the model, what the strategy remembers, and the counts of each node."""

    model: Tensors
    memory: NewMemory
    round: int
    samples_of_node: dict[str, int]
    last_counted_round: dict[str, int]


def write_state(path: Path, state: FlowerState, architecture: str, strategy: str) -> None:
    """Write a job's state, with the digest of its architecture and the name of its strategy."""
    head = {
        "format": FORMAT,
        "architecture": architecture,
        "strategy": strategy,
        "round": state.round,
        "samples": state.samples_of_node,
        "last": state.last_counted_round,
        "memory": list(state.memory),
    }
    text = np.frombuffer(json.dumps(head, sort_keys=True).encode(), np.uint8)
    tensors: dict[str, npt.NDArray[Any]] = {_HEAD_TENSOR: text}
    tensors |= {f"model/{n}": v for n, v in state.model.items()}
    for number, tensors_of_memory in enumerate(state.memory.values()):
        tensors |= {f"memory/{number}/{key}": np.asarray(v) for key, v in tensors_of_memory.items()}
    write_atomically(path, tensorfile.encode(tensors))


def read_state(path: Path, architecture: Architecture, strategy: str) -> FlowerState:
    """Read what `write_state` wrote. Raises `StorageError` if it is damaged, or of another model or strategy."""
    try:
        stored = tensorfile.decode(path.read_bytes())
        head = json.loads(stored.pop(_HEAD_TENSOR).tobytes())
        if {k: type(head[k]) for k in _HEAD_TYPES} != _HEAD_TYPES:
            raise ValueError("its head")
        model = {n.removeprefix("model/"): v for n, v in stored.items() if n.startswith("model/")}
        memory: NewMemory = {}
        for number, name in enumerate(head["memory"]):
            prefix = f"memory/{number}/"
            memory[str(name)] = {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)}
        expected = {"format": FORMAT, "architecture": architecture.digest, "strategy": strategy}
        for key, value in expected.items():
            if head[key] != value:
                raise StorageError(f"{path}: {key} of the state", expected=value[:24], got=repr(head[key])[:24])
        model = check_fold_base(architecture, model)
    except StorageError:
        raise
    except (FedpruneError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{path} is no state of a job under Flower ({type(error).__name__}: {error})"
        raise StorageError(what, hint="Name another file, or start again without it.") from error
    return FlowerState(model, memory, head["round"], head["samples"], head["last"])


class WholeModel(Protocol):
    """An imported model; `fedprune_export.importing.load` makes one of a torch module or an ONNX file."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def tensors(self) -> Tensors: ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the tensors that its author froze."""
        ...


@dataclass(frozen=True, eq=False)
class NodeTask:
    """The message to a node."""

    cut: Cut
    submodel: Submodel
    recipe: Recipe


@dataclass(frozen=True, eq=False)
class NodeUpdate:
    """A node's result, not yet checked."""

    tensors: Mapping[str, npt.NDArray[Any]]
    samples: int
    steps: int = 1


@dataclass(frozen=True, eq=False)
class FlowerRoundOutcome:
    """The result of a round.

    Attributes:
        model: The next model; the round's own if no update counted.
        refused: The others', and why they aren't.
    """

    model: Tensors
    counted: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)


class FlowerRounds:
    """Runs the roles of a strategy, round by round.

    Raises `ConfigError` if the strategy doesn't work under Flower, or its options are wrong.

    Attributes:
        number: The last round that was closed; 0 before the first.
    """

    def __init__(self, model: WholeModel, job: Job) -> None:
        self.job, self.architecture = job, model.architecture
        self.strategy = compose_for_flower(job, model.architecture.sizes)
        self.model: Tensors = dict(model.tensors)
        self.number = 0
        self._frozen = model.frozen
        self._memory: NewMemory = {}
        self._samples_of_node: dict[str, int] = {}
        self._last_counted_round: dict[str, int] = {}
        self._tasks: dict[str, NodeTask] = {}
        self._scene: Scene | None = None

    def begin(self, model: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """Take over the model that Flower continues from, and return the model that the next round starts from.

        Before the first round has closed, the strategy may make another model of the user's (`Strategy.begin`). Raises
        `BundleError` if the model is not of this architecture.
        """
        base = check_fold_base(self.architecture, model)
        if self.number == 0 and (first_model := self.strategy.begin(self.architecture, base)) is not base:
            frozen = self._frozen_by(self.job.recipe)
            # A strategy's own start must not move what the author froze.
            base = {**first_model, **{n: v for n, v in base.items() if n in frozen}}
        self.model = base
        return base

    def open(self, round_: int, shares: Mapping[str, NodeShare]) -> dict[str, NodeTask]:
        """Begin a round, numbered from 1, with these nodes; returns what each is sent. Nodes of equal shares are sent
        the same tensors, which are the same objects."""
        self._scene = self._scene_of_round(round_, tuple(sorted(shares)))
        self._tasks = self._tasks_of(self._scene, shares)
        return self._tasks

    def task(self, node: str) -> NodeTask:
        """The message sent to a node of the open round. Raises `KeyError` if it is not in it."""
        return self._tasks[node]

    def evaluation_tasks(self, round_: int, shares: Mapping[str, NodeShare]) -> dict[str, NodeTask]:
        """The submodels of the present model for evaluation; the open round stays as it is."""
        return self._tasks_of(self._scene_of_round(max(1, round_), ()), shares)

    def close(self, updates: Iterable[tuple[str, NodeUpdate]]) -> FlowerRoundOutcome:
        """End the open round: sum the updates, in order of arrival, and make the next model of them.

        The next model's bits don't depend on the order. A node's first update counts, no further one. An update that
        can't be used is refused; the others still count.
        """
        scene = self._scene
        if scene is None or not self._tasks:
            return FlowerRoundOutcome(self.model, ())
        uniform = self.strategy.aggregator.weighting == "uniform"
        round_ = Round(self.strategy, scene, UpdateLimits(self.job, uniform=uniform))
        refused, received = dict[str, str](), dict[str, RoundUpdate]()
        for node, update in updates:
            if node in received:
                _LOG.warning("round %d: node %s answered twice; its first answer counts", scene.round, node)
                continue
            try:
                round_update = self._round_update(node, update)
                round_.check(round_update)
                received[node] = replace(round_update, is_checked=True)
                refused.pop(node, None)
            except FedpruneError as error:
                refused[node] = str(error)
        samples = {node: 1 if uniform else update.samples for node, update in received.items()}
        # Weights are decided when all updates are in, so that their order doesn't matter.
        weights = capped_weights(samples, self.job.weight_limit, self.job.most_samples)
        weighted = [replace(received[node], weight=weights[node]) for node in sorted(received)]
        result = round_.close(weighted, 1.0, scene.participants)
        # Closed: a late answer finds no open round.
        self._tasks, self._scene = {}, None
        refused |= {node: failure.reason for node, failure in result.rejected.items()}
        for node, reason in sorted(refused.items()):
            _LOG.warning("round %d: the update of node %s is refused: %s", scene.round, node, reason)
        for node, reason in sorted(result.limited.items()):
            _LOG.warning("round %d: the update of node %s is limited: %s", scene.round, node, reason)
        if result.model is None:
            return FlowerRoundOutcome(self.model, (), refused)
        memory = {**self._memory, **result.memories}
        self._memory = {name: tensors for name, tensors in memory.items() if tensors}
        frozen = self._frozen_by(self.job.recipe)
        self.model = {**result.model, **{n: v for n, v in scene.model.items() if n in frozen}}
        counted = tuple(n for n in sorted(received) if n not in refused)
        self._samples_of_node |= {node: received[node].samples for node in counted}
        self._last_counted_round |= dict.fromkeys(counted, scene.round)
        self.number = scene.round
        return FlowerRoundOutcome(self.model, counted, refused)

    def save(self, path: Path) -> None:
        """Write all that the next round continues from. Raises `StorageError` if the disk fails; what was there before
        is untouched."""
        state = FlowerState(self.model, self._memory, self.number, self._samples_of_node, self._last_counted_round)
        write_state(path, state, self.architecture.digest, self.job.strategy)

    def restore(self, path: Path) -> bool:
        """Continue from what `save` wrote; False if there is no file. Raises `StorageError` if it is damaged, or of
        another model or strategy."""
        if not path_exists(path, file=True):
            return False
        state = read_state(path, self.architecture, self.job.strategy)
        self.model, self._memory, self.number = state.model, state.memory, state.round
        self._samples_of_node, self._last_counted_round = state.samples_of_node, state.last_counted_round
        return True

    def _scene_of_round(self, round_: int, participants: tuple[str, ...]) -> Scene:
        return Scene(self.architecture, self.job.seed, round_, self.model, self._memory, self.job.recipe, participants)

    def _tasks_of(self, scene: Scene, shares: Mapping[str, NodeShare]) -> dict[str, NodeTask]:
        ranking = self.strategy.rank(scene)
        full_selection = Selection.of(self.architecture, self.architecture.sizes, ranking.ranks)
        selections: dict[tuple[int, ...], Selection] = {}
        submodel_of_share: dict[tuple[tuple[int, ...], float], Submodel] = {}
        tasks: dict[str, NodeTask] = {}
        for node, share in sorted(shares.items()):
            key = (share.widths, share.density)
            selection = selections.setdefault(share.widths, full_selection.with_widths(share.widths))
            turn = Turn(
                seed=scene.seed,
                round=scene.round,
                device=node,
                widths=share.widths,
                density=share.density,
                samples=self._samples_of_node.get(node, 1),
                last_counted_round=self._last_counted_round.get(node, 0),
            )
            cut = Cut(scene, turn, selection, ranking.order)
            # Of equal shares the strategy makes equal submodels, unless it looks at the device: then each has its own.
            submodel = submodel_of_share.get(key) if self.strategy.is_device_independent else None
            if submodel is None:
                submodel = self.strategy.extract(cut)
                submodel_of_share[key] = submodel
            recipe = self.strategy.recipe(scene.recipe, turn)
            tasks[node] = NodeTask(cut, submodel, recipe.with_micro_batches(share.accumulate))
        return tasks

    def _round_update(self, node: str, update: NodeUpdate) -> RoundUpdate:
        """A node's update, for the open round. Raises `ProtocolError` if the node has no part in the round, or a count
        is out of range."""
        if node not in self._tasks:
            raise ProtocolError("it has no part in this round")
        task = self._tasks[node]
        # Checked here alone: Flower passes on whatever a node's app answers.
        check_counts(update.samples, update.steps, MAX_WEIGHT)
        # Frozen tensors count as they were sent, whatever a node's own loop has done to them.
        frozen = self._frozen_by(task.recipe)
        tensors = {**update.tensors, **{n: v for n, v in task.submodel.tensors.items() if n in frozen}}
        cut = replace(task.cut, turn=replace(task.cut.turn, samples=update.samples))
        trained = Submodel(task.submodel.selection, tensors)
        report = UpdateReport(cut, trained, 1, update.steps, lambda: task.submodel)
        return RoundUpdate(node, node, 1, update.samples, lambda: report)

    def _frozen_by(self, recipe: Recipe) -> frozenset[str]:
        return frozen_tensors(self.architecture, recipe.features, self._frozen)
