"""One training step as one ONNX graph: forward, loss, backward, optimiser."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence

from fedprune.core.errors import ConfigError, ModelError, shape_text
from fedprune.core.text import first_few
from fedprune.model import step_contract
from fedprune.model.features import CUSTOM_LOSS, Features, labels_of
from fedprune.model.lengths import LENGTH_METADATA
from fedprune.model.losses import LOSSES
from fedprune.model.nested_widths import axes_json
from fedprune.model.trainable import frozen_tensors
from fedprune.planning.probe_report import CPU
from fedprune_export.autodiff.tape import BATCH, Tape, describe, port, sample_shape
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.probabilities import find_probabilities
from fedprune_export.pruning.base_reads import write_base_reads
from fedprune_export.pruning.model import Model
from fedprune_export.pruning.scaler import scaled_outputs
from fedprune_export.training.augmentation import augment_plan
from fedprune_export.training.losses import target_shape, write_loss
from fedprune_export.training.metrics import metric_graph
from fedprune_export.training.optimizers import TrainedTensor, add_inputs, forward_value, write_updates


def training_step(model: Model, features: Features, unit: str = CPU) -> Graph:
    """The training step of a model for all its widths, derived once per model, features and unit.

    Raises `ModelError` or `ConfigError` as `training_graph`.
    """
    # Differentiating takes far longer than a look-up, and the same graph serves all boards of a unit.
    key = features, unit
    if key not in model.training_graphs:
        model.training_graphs[key] = training_graph(model, features, unit)
    return model.training_graphs[key]


def training_graph(model: Model, features: Features, unit: str = CPU) -> Graph:
    """The training step of a model, by the names of `fedprune.model.step_contract`.

    The batch and all channel dimensions are symbolic: one graph serves every width of the architecture.

    Args:
        unit: The kernels to write it for: the processor's, or a GPU's (`fedprune.planning.probe_report`). Either graph
            runs on both, and computes the same up to rounding.

    Raises:
        ModelError: An operator can't be differentiated, or its size would have to be fixed; the message names the node.
        ConfigError: A pattern of the features matches no tensor, or leaves none to train; or an augmentation has no
            meaning for the model's inputs or labels.
    """
    architecture = model.architecture
    outputs = _output_shape(model, features)
    frozen = frozen_tensors(architecture, features, model.frozen)
    graph = Graph(name="training_step", unit=unit, _counter=model.graph._counter)
    if features.ordered_dropout or features.axes:
        graph.metadata[step_contract.AXES_METADATA] = axes_json(architecture)
    scaled = scaled_outputs(model) if features.scale else ()
    base_constants = {} if model.base is None else {n: model.graph.initializers[n] for n in model.base.axes}
    tape = Tape(model, graph, {*frozen, *base_constants}, scaled=scaled)
    if features.scale:
        graph.add_input(step_contract.OUTPUT_SCALE)
    input_shape = sample_shape(model.graph)
    graph.add_input(step_contract.X, input_shape, model.graph.inputs[0].dtype)
    _check_logits(model, features)
    # The order of inputs is the order of these calls: x, y, tensors, then the optimiser's.
    own_loss = _own_loss(model, features)
    graph.inputs.append(_label_port(model, features, own_loss))
    tape.enter(model.graph.inputs[0].name, step_contract.X, input_shape)

    trained = _enter_tensors(tape, model, frozen, features)
    for name, numbers in base_constants.items():
        graph.initializers[name] = numbers
        tape.enter(name, name, numbers.shape)
    add_inputs(graph, trained, features)
    graph.add_output(step_contract.LOSS)

    tape.forward()
    logits = model.graph.outputs[0].name
    if not tape.needs_gradient(logits):
        stops = dict.fromkeys(describe(node) for t in trained for node in tape.stops_behind(t.name))
        raise ModelError(
            "no trained tensor takes part in the output",
            got=", ".join(t.name for t in trained[:5]),
            hint=f"No gradient passes {first_few(list(stops))}: export the model without." if stops else "",
        )
    tape.add_gradient(logits, write_loss(graph, tape.value(logits), outputs, features, own_loss))
    tape.backward()
    _note_unreached(graph, tape, trained)
    write_updates(graph, tape, trained, features)
    _check_statistics(graph, model, frozen)
    graph.rename({tape.value(logits): step_contract.LOGITS})
    _add_metadata(graph, model, features)
    # After pruning, so that only tensors that some node reads get a dequantised copy.
    graph.prune()
    if model.base is not None:
        write_base_reads(graph, model.base)
        graph.inputs += [port(b.name, b.shape, b.dtype) for b in architecture.base]
        graph.prune()
    return graph


def _output_shape(model: Model, features: Features) -> tuple[int, ...]:
    """The shape of a sample's outputs. Raises `ModelError` if they have no axis."""
    if not model.architecture.output_shape:
        # A loss of several labels applies the sigmoid itself; others would lose it.
        passed = {*REARRANGEMENTS, *(["Sigmoid"] if labels_of(features.loss) == "multi" else [])}
        value, makers = step_contract.LOGITS, model.graph.producers()
        while value in makers and makers[value].op in passed:
            value = makers[value].inputs[0]
        found = value != step_contract.LOGITS and value in makers and "~" not in value
        way_out = f'Let the model end before it: --output {value} (output="{value}"), or export' if found else "Export"
        raise ModelError(
            "the model's output is one number per sample without an axis",
            expected="outputs [n, ...] with an axis",
            hint=f"{way_out} the model with this axis: without its last Squeeze, or a reduction's keepdims set (in "
            "torch, x.unsqueeze(1), or Linear(..., 1) without squeeze).",
        )
    return model.architecture.output_shape


def _check_statistics(graph: Graph, model: Model, frozen: Collection[str]) -> None:
    """Make sure that the graph writes the next value of every statistic that isn't frozen."""
    # Only a batch normalisation writes next values of statistics: others would be sent back as they came.
    output_names = {o.name for o in graph.outputs}
    for spec in model.architecture.statistics:
        if spec.name not in frozen and step_contract.next_name(spec.name) not in output_names:
            raise ModelError(f"statistic {spec.name} belongs to no batch normalisation")


def _enter_tensors(tape: Tape, model: Model, frozen: Collection[str], features: Features) -> list[TrainedTensor]:
    """Make the architecture's tensors inputs of the training graph; returns those that train."""
    trained: list[TrainedTensor] = []
    for spec in model.architecture.tensors:
        shape, value = tape.tensor_shape(spec), spec.name
        tape.graph.add_input(spec.name, shape)
        trains = spec.kind.is_trainable and spec.name not in frozen
        if trains:
            trained.append(TrainedTensor(spec.name, shape))
            value = forward_value(tape.graph, spec.name, features)
        tape.enter(spec.name, value, shape, needs_gradient=trains)
    return trained


def _note_unreached(graph: Graph, tape: Tape, trained: Sequence[TrainedTensor]) -> None:
    """Write into the metadata which tensors never get a gradient, and behind what they are."""
    stops = {t.name: tape.stops_behind(t.name) for t in trained if tape.gradient(t.name) is None}
    if stops:
        texts = {name: [describe(node) for node in nodes] for name, nodes in stops.items()}
        graph.metadata[step_contract.UNREACHED_METADATA] = json.dumps(texts)


def unreached_notes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """A note on the tensors that no step trains, by a training graph's metadata; empty without any."""
    stops: dict[str, list[str]] = json.loads(metadata.get(step_contract.UNREACHED_METADATA, "{}"))
    if not stops:
        return ()
    nodes = list(dict.fromkeys(node for nodes in stops.values() for node in nodes))
    behind = f", behind {first_few(nodes, max_names=3)}" if nodes else ""
    return (f"Never trained, because no gradient reaches them: {first_few(list(stops))}{behind}.",)


def _add_metadata(graph: Graph, model: Model, features: Features) -> None:
    """Add the trainer's further inputs to the metadata: metric, augmentations, bounds of a length, ignored label."""
    labels = next(p for p in graph.inputs if p.name == step_contract.Y)
    if features.metric:
        # At the opset of training graphs: every onnxruntime that boards have loads it.
        raw_metric = metric_graph(model, labels, features).to_bytes(opset=17)
        graph.metadata[step_contract.METRIC_METADATA] = base64.b64encode(raw_metric).decode()
    if features.augment and LENGTH_METADATA in model.graph.metadata:
        raise ConfigError("with samples of different lengths", path=("recipe", "augment"), expected="one of the two")
    if features.augment:
        graph.metadata[step_contract.AUGMENT_METADATA] = augment_plan(model, labels, features).to_json()
    graph.metadata |= {k: v for k, v in model.graph.metadata.items() if k == LENGTH_METADATA}
    if features.ignore_label is not None:
        graph.metadata[step_contract.IGNORED_METADATA] = str(features.ignore_label)


def _check_logits(model: Model, features: Features) -> None:
    """Raise `ModelError` if the loss takes logits and the model ends in probabilities, or its classes aren't on axis 1
    or may be on another."""
    if features.has_class_labels and model.class_axes != (1,):
        axes = " or ".join(map(str, model.class_axes))
        options = " or ".join(f"--class-axis {axis}" for axis in model.class_axes)
        raise ModelError(
            f"loss {features.loss} and outputs {shape_text('n', *model.architecture.output_shape)}",
            expected="classes on axis 1",
            got=f"classes on axis {axes}",
            hint=f"Say at the import which axis they are on: {options} ([model] class_axis, load(..., class_axis=)).",
        )
    found = LOSSES[features.loss].reads_logits and find_probabilities(model.graph, model.architecture.by_name)
    if not found:
        return
    (axis, logits), way_out = found, "Let the model end before its sigmoid or softmax where it is made"
    if logits and "~" not in logits:
        way_out = f'Name their logits as the output: --output {logits} (output="{logits}")'
        # Each loss contains one of the two: the import leaves it out if it knows the loss.
        if any(node.op == "Sigmoid" and logits in node.inputs for node in model.graph.nodes):
            way_out += ', train it with a label per output: --loss bce (at the import: loss="bce")'
    range_text = "from 0 to 1" if axis is None else f"that sum to 1 along axis {axis}"
    raise ModelError(
        f"loss {features.loss} and the model's output, which consists of probabilities, {range_text}",
        expected="logits: the loss applies its own sigmoid or softmax",
        hint=f"{way_out}, or take a loss of values, such as mse.",
    )


def _own_loss(model: Model, features: Features) -> Model | None:
    """The model's own loss, if the features ask for it. Raises `ConfigError` if the model brings none."""
    if features.loss != CUSTOM_LOSS:
        return None
    if model.loss is None:
        raise ConfigError(
            "'custom', and the model brings no loss",
            path=("recipe", "loss"),
            expected=f"a model with one, or one of {', '.join(n for n in LOSSES if n != CUSTOM_LOSS)}",
            hint="Give it with the model: --loss package.module:function, [model] loss, or load(..., loss=...).",
        )
    return model.loss


def _label_port(model: Model, features: Features, own_loss: Model | None) -> Port:
    """The training graph's labels."""
    if own_loss is None:
        return port(step_contract.Y, *target_shape(features, model.architecture.output_shape))
    labels = own_loss.graph.inputs[1]
    return port(step_contract.Y, (BATCH, *(d for d in labels.shape[1:] if isinstance(d, int))), labels.dtype)
