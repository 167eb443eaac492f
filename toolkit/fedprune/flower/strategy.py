"""A strategy for Flower's ServerApp that sends every node a submodel of its own width, and folds what comes back."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedprune.core.errors import ConfigError, FedpruneError, PlanError, ProtocolError
from fedprune.core.tensorfile import float32_array
from fedprune.flower.allocation import Densities, FlowerAllocation, NodeShare
from fedprune.flower.messages import ASKING_TYPE, FORMAT, RECORD_NAME, STEPS_METRIC, check_format
from fedprune.flower.rounds import FlowerRounds, NodeTask, NodeUpdate, WholeModel
from fedprune.jobs.job import Job
from fedprune.model.architecture import TensorKind
from fedprune.model.features import Features
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors

# Seconds that nodes have to answer for their share; late ones are asked again in the next round.
_ANSWER_TIMEOUT_S = 60.0

# Names that torch's batch norms have in a state dict.
_COUNTER_SUFFIX, _VARIANCE_SUFFIX = "num_batches_tracked", "running_var"

_LOG = logging.getLogger("flwr.fedprune")

# Flower's own FedAvg weighs nodes by their samples, and at full width this one is to be the same. A server of fedprune
# trusts less what boards say of themselves (`Job.weight_limit`).
WEIGHT_LIMIT = 4.0


class FedpruneStrategy(FedAvg):
    """Federated training of submodels.

    Nodes are sampled as Flower's FedAvg samples them, by the same settings. Each gets the slice of the model that it
    can hold, in training and in evaluation. The strategy's aggregator sums the answers exactly, whatever their order;
    an answer that can't be used is refused, and the others count.

    Args:
        model: The global model; `fedprune_export.importing.load` makes it of a torch module or an ONNX file.
        strategy: One of `fedprune.flower.PRESETS`, or a composition of your own as `package.module:function`.
        density: Who gets how much of the model: a share of every channel group for all; several, dealt in tiers; by
            node id, as a mapping or function; the name of a hardware profile; `"ask"`: every node is asked. None leaves
            it to the strategy's own tiers, and where it has none (`fedprune`, `plain`) nodes are asked.
        options: Settings of the strategy itself, as `[job.options]`.
        recipe: Local training; nodes with a training graph obey it. `seed` keys all random numbers but Flower's.
        training: Makes a training graph, as the bytes of an ONNX file, of what a recipe needs; then every message for
            training has one, for nodes without torch. None for no graphs.
        state: A file in which the job is kept after every round, and from which it continues where it is there.
        settings: Of Flower's `FedAvg`: `fraction_train`, `min_available_nodes`, `weighted_by_key` and so on.

    Raises `ConfigError` if a setting is wrong, or the strategy doesn't work under Flower, and `StorageError` if the
    state is damaged, or of another job.
    """

    def __init__(
        self,
        model: WholeModel,
        strategy: str = "fedprune",
        *,
        density: Densities = None,
        options: Mapping[str, Any] | None = None,
        recipe: Recipe | None = None,
        seed: int = 0,
        training: Callable[[Features], bytes] | None = None,
        state: Path | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        options, recipe = dict(options or {}), recipe or Recipe()
        job = Job(strategy=strategy, options=options, recipe=recipe, seed=seed, weight_limit=WEIGHT_LIMIT)
        self._rounds = FlowerRounds(model, job)
        self._allocation = FlowerAllocation(job, self._rounds.strategy, model.architecture, density)
        self._training = training
        self._graphs: dict[str, bytes] = {}
        self._state = None if state is None else Path(state)
        restored = self._state is not None and self._rounds.restore(self._state)
        self._rounds_before_start = self._rounds.number if restored else 0
        self._other_arrays: dict[str, Array] = _batch_norm_counters(self._rounds)
        self._group_id = ""

    @property
    def arrays(self) -> ArrayRecord:
        """The global model, as `start` wants it for a beginning; that of the state, if there was one."""
        return self._array_record(self._rounds.model)

    @property
    def rounds(self) -> int:
        """Rounds that were closed, those of the state among them."""
        return self._rounds.number

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message with a submodel for every sampled node. Raises `ConfigError` if the arrays are not the model's, or
        no node says what it carries."""
        nodes = [m.metadata.dst_node_id for m in super().configure_train(server_round, ArrayRecord(), config, grid)]
        self._rounds.begin(self._read_model(arrays))
        number = self._rounds_before_start + server_round
        tasks = self._rounds.open(number, self._share_out(nodes, number, grid))
        self._group_id = f"fedprune-{number}"
        return self._messages(tasks, MessageType.TRAIN, config, self._group_id)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model, of all usable answers; None without any."""
        contents: dict[str, RecordDict] = {}

        def updates() -> Iterable[tuple[str, NodeUpdate]]:
            for reply in replies:
                node = str(reply.metadata.src_node_id)
                if reply.has_error():
                    _LOG.warning("node %s failed: %s", node, reply.error.reason)
                    continue
                try:
                    update = self._read_update(node, reply)
                except FedpruneError as error:
                    _LOG.warning("the answer of node %s is refused: %s", node, error)
                    continue
                contents.setdefault(node, reply.content)
                yield node, update

        outcome = self._rounds.close(updates())
        if not outcome.counted:
            return None, None
        if self._state is not None:
            self._rounds.save(self._state)
        metrics = self._average_metrics([contents[n] for n in outcome.counted], self.train_metrics_aggr_fn)
        return self.arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message with its submodel of the new model for every sampled node. Raises `ConfigError` if the arrays are
        not the model's, or no node says what it carries."""
        nodes = [m.metadata.dst_node_id for m in super().configure_evaluate(server_round, ArrayRecord(), config, grid)]
        if not nodes:
            return []
        self._rounds.begin(self._read_model(arrays))
        number = self._rounds_before_start + server_round
        tasks = self._rounds.evaluation_tasks(number, self._share_out(nodes, number, grid))
        return self._messages(tasks, MessageType.EVALUATE, config, f"fedprune-{number}")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nodes' metrics, averaged by their numbers of samples."""
        contents = []
        for reply in replies:
            if reply.has_error():
                _LOG.warning("node %s failed: %s", reply.metadata.src_node_id, reply.error.reason)
                continue
            contents.append(reply.content)
        return self._average_metrics(contents, self.evaluate_metrics_aggr_fn)

    def summary(self) -> None:
        """Say what is run."""
        super().summary()
        job, sizes = self._rounds.job, self._rounds.architecture.sizes
        _LOG.info("strategy %s on %d channel groups, round %d", job.strategy, len(sizes), self._rounds.number)

    def save(self, path: Path | str) -> None:
        """Write the job's state: the model, what the strategy remembers, and the number of the round. Raises
        `StorageError` if the disk fails; what was there before is untouched."""
        self._rounds.save(Path(path))

    def _share_out(self, nodes: list[int], number: int, grid: Grid) -> dict[str, NodeShare]:
        self._ask(self._allocation.nodes_to_ask(nodes), grid)
        shares = self._allocation.share_out(nodes, number)
        if nodes and not shares:
            raise ConfigError(
                "no node says what it carries",
                expected='an @app.query("fedprune") in the ClientApp that returns answer(message, density=...)',
                hint="Or give FedpruneStrategy a density for all, or a list of them.",
            )
        return {str(node): share for node, share in shares.items()}

    def _ask(self, nodes: list[int], grid: Grid) -> None:
        """Ask nodes what they carry; who doesn't answer is left out, and asked again when its turn comes."""
        if not nodes:
            return
        question = RecordDict({RECORD_NAME: ConfigRecord({"format": FORMAT})})
        messages = [Message(question, node, ASKING_TYPE) for node in nodes]
        for reply in grid.send_and_receive(messages, timeout=_ANSWER_TIMEOUT_S):
            node = reply.metadata.src_node_id
            if reply.has_error():
                _LOG.warning("node %s doesn't say what it carries: %s", node, reply.error.reason)
                continue
            try:
                record = reply.content.get(RECORD_NAME)
                check_format(record)
                self._allocation.note_answer(node, record.get("density"), record.get("profile"), record.get("samples"))
            except (ProtocolError, PlanError) as error:
                _LOG.warning("node %s is excluded: %s", node, error)

    def _messages(self, tasks: Mapping[str, NodeTask], kind: str, config: ConfigRecord, group: str) -> list[Message]:
        records: dict[int, ArrayRecord] = {}
        messages = []
        for node, task in tasks.items():
            tensors = task.submodel.tensors
            # Nodes of equal shares get the same tensors: they are encoded once.
            if id(tensors) not in records:
                records[id(tensors)] = self._array_record(tensors)
            body = self._message_body(node, task)
            if kind == MessageType.TRAIN and self._training is not None:
                features = task.recipe.features
                if features.key not in self._graphs and self._training is not None:
                    self._graphs[features.key] = self._training(features)
                body["graph"] = self._graphs[features.key]
            content = {self.arrayrecord_key: records[id(tensors)], self.configrecord_key: config, RECORD_NAME: body}
            messages.append(Message(RecordDict(content), int(node), kind, group_id=group))
        return messages

    def _message_body(self, node: str, task: NodeTask) -> ConfigRecord:
        turn = task.cut.turn
        return ConfigRecord(
            {
                "format": FORMAT,
                "arrays": self.arrayrecord_key,
                "config": self.configrecord_key,
                "weight": self.weighted_by_key,
                "tensors": list(task.submodel.tensors),
                "round": turn.round,
                "device": node,
                "seed": turn.seed,
                "widths": list(turn.widths),
                "density": float(turn.density),
                "classes": self._rounds.architecture.classes,
                "recipe": json.dumps(task.recipe.to_offer(), sort_keys=True),
            }
        )

    def _array_record(self, tensors: Tensors) -> ArrayRecord:
        """Tensors as Flower sends them, with the counters that a module's state dict also has."""
        arrays = {n: Array(np.ascontiguousarray(v)) for n, v in tensors.items()}
        return ArrayRecord({**arrays, **self._other_arrays})

    def _read_model(self, arrays: ArrayRecord) -> Tensors:
        """The model in an ArrayRecord; what else is in it goes along with every message. Raises `ConfigError` if a
        tensor is missing or has another type or shape, or one goes by several names."""
        architecture = self._rounds.architecture
        tensors: Tensors = {}
        try:
            for spec in architecture.tensors:
                if spec.name not in arrays:
                    raise ProtocolError(f"tensor {spec.name} is missing")
                tensors[spec.name] = float32_array(arrays[spec.name].data, spec.shape, f"tensor {spec.name}")
        except ProtocolError as error:
            raise ConfigError(f"the arrays are not the model's: {error}", hint="Start with strategy.arrays.") from error
        other_arrays = {n: a for n, a in arrays.items() if n not in tensors}
        # Weights that two layers share are two arrays of a state dict, but one tensor of the imported model: trained,
        # the second name would keep its old values. Later models come from here.
        if self._rounds.number == 0:
            name_of_value = {(v.shape, v.tobytes()): n for n, v in tensors.items()}
            for name, array in other_arrays.items():
                value = array.numpy()
                same_tensor = name_of_value.get((value.shape, value.tobytes())) if value.dtype == np.float32 else None
                if same_tensor is not None:
                    raise ConfigError(
                        f"array {name} is the same as {same_tensor}: weights that go by several names",
                        expected="each once",
                        hint="Start with strategy.arrays.",
                    )
        self._other_arrays = other_arrays or self._other_arrays
        return tensors

    def _read_update(self, node: str, reply: Message) -> NodeUpdate:
        """An answer's tensors and counts; `Rounds.close` checks them further. Raises `ProtocolError` if it isn't one of
        this round, or not what an update is."""
        if reply.metadata.group_id != self._group_id:
            raise ProtocolError("round of an answer", expected=self._group_id, got=repr(reply.metadata.group_id)[:40])
        try:
            shapes = {n: v.shape for n, v in self._rounds.task(node).submodel.tensors.items()}
        except KeyError:
            raise ProtocolError("it has no part in this round") from None
        records, metrics = reply.content.array_records, reply.content.metric_records
        if len(records) != 1 or len(metrics) != 1:
            counts = f"{len(records)} and {len(metrics)}"
            raise ProtocolError("records of an update", expected="one of arrays and one of metrics", got=counts)
        (arrays,), (metric_record,) = records.values(), metrics.values()
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, shape in shapes.items():
            if name not in arrays:
                raise ProtocolError(f"update lacks tensor {name}")
            tensors[name] = float32_array(arrays[name].data, shape, f"tensor {name} in an update")
        samples = _whole_count(metric_record.get(self.weighted_by_key))
        return NodeUpdate(tensors, samples, _whole_count(metric_record.get(STEPS_METRIC, 1)))

    def _average_metrics(
        self, contents: list[RecordDict], average: Callable[[list[RecordDict], str], MetricRecord]
    ) -> MetricRecord | None:
        """The mean metrics of the answers with the most frequent set of metrics: odd answers don't prevent it."""
        kinds = [_metric_names(content, self.weighted_by_key) for content in contents]
        counts = Counter(s for s in kinds if s is not None)
        if not counts:
            return None
        most_frequent = min(counts, key=lambda s: (-counts[s], s))
        counted = [c for c, s in zip(contents, kinds, strict=True) if s == most_frequent]
        if len(counted) < len(contents):
            _LOG.warning("%d answers have other metrics than most, which don't count", len(contents) - len(counted))
        return average(counted, self.weighted_by_key)


def _batch_norm_counters(rounds: FlowerRounds) -> dict[str, Array]:
    """Counters that torch's batch norms have in their state dict, so that it can be loaded as a whole."""
    variances = [t.name for t in rounds.architecture.tensors if t.kind is TensorKind.STAT_VAR]
    names = [name for name in variances if name.endswith(_VARIANCE_SUFFIX)]
    return {n.removesuffix(_VARIANCE_SUFFIX) + _COUNTER_SUFFIX: Array(np.zeros((), np.int64)) for n in names}


def _whole_count(value: object) -> Any:
    """A count, which Flower's users also give as 120.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _metric_names(content: RecordDict, weight: str) -> tuple[tuple[str, int], ...] | None:
    """Which metrics an answer names, with the lengths of those that are lists; None without its weight."""
    records = list(content.metric_records.values())
    value = records[0].get(weight) if len(records) == 1 else None
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        return None
    return tuple(sorted((k, len(v) if isinstance(v, list) else -1) for k, v in records[0].items()))
