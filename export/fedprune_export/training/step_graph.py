"""One training step as one ONNX graph: forward, loss, backward, optimiser."""

from __future__ import annotations

from fedprune.core.errors import ConfigError, ModelError
from fedprune.model import step_contract
from fedprune.model.nested_widths import axes_json
from fedprune.model.recipe import CUSTOM, LOSSES, Features
from fedprune.model.trainable import frozen_tensors
from fedprune_export.autodiff.tape import BATCH, Tape, port, sample_shape
from fedprune_export.ir.drafts import LOSS, UPDATE, Purpose
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.pruning.scaler import scaled_outputs
from fedprune_export.training.loss_graphs import LOSS_GRAPHS
from fedprune_export.training.losses import count_hits, share_of_sample, target_shape, write_loss
from fedprune_export.training.metrics import embedded_metric
from fedprune_export.training.optimizers import Trained, add_inputs, used, write_updates


def training_step(model: Model, features: Features) -> Graph:
    """The training step of a model for all its widths; derived once per model and features.

    Raises:
        ModelError: As `training_graph`.
        ConfigError: As `training_graph`.
    """
    if features not in model.training_graphs:
        model.training_graphs[features] = training_graph(model, features)
    return model.training_graphs[features]


def training_graph(model: Model, features: Features) -> Graph:
    """The training step of a model, by the names of `fedprune.model.step_contract`.

    The batch and all channel dimensions are symbolic: one graph serves every width of the architecture.

    Raises:
        ModelError: An operator can't be differentiated, or its size would have to be fixed; the message names the node.
        ConfigError: A pattern of the features matches no tensor, or leaves none to train.
    """
    architecture = model.architecture
    outputs = architecture.output_shape
    if not outputs:
        raise ModelError(
            "the model's output is one number per sample without an axis",
            expected="outputs [n, ...] with an axis",
            hint="Keep the axis in forward: x.unsqueeze(1), or Linear(..., 1) without squeeze.",
        )
    frozen = frozen_tensors(architecture, features, model.frozen)
    graph = Graph(name="training_step", _counter=model.graph._counter)
    if features.ordered_dropout or features.axes:
        graph.metadata[step_contract.AXES] = axes_json(architecture)
    scaled = scaled_outputs(model) if features.scale else ()
    tape = Tape(model, graph, frozen, scaled=scaled)
    if features.scale:
        graph.inputs.append(port(step_contract.OUTPUT_SCALE, ()))
        tape.written[step_contract.OUTPUT_SCALE] = ()
    input_shape = sample_shape(model.graph)
    graph.inputs.append(port(step_contract.X, input_shape, model.graph.inputs[0].dtype))
    graph.inputs.append(_labels(model, features))
    tape.enter(model.graph.inputs[0].name, step_contract.X, input_shape)

    trained: list[Trained] = []
    for spec in architecture.tensors:
        shape, value = tape.tensor_shape(spec), spec.name
        graph.inputs.append(port(spec.name, shape))
        wanted = spec.kind.trainable and spec.name not in frozen
        if wanted:
            trained.append(Trained(spec.name, shape))
            value = used(graph, spec.name, features)
        tape.enter(spec.name, value, shape, wanted=wanted)
    add_inputs(graph, trained, features)
    graph.outputs.append(port(step_contract.LOSS, ()))

    tape.forward()
    logits = model.graph.outputs[0].name
    if not tape.wants(logits):
        raise ModelError("no trained tensor takes part in the output", got=", ".join(t.name for t in trained[:5]))
    graph.purpose = Purpose(LOSS)
    if (own := _own_loss(model, features)) is not None:
        tape.add(logits, write_loss_graph(graph, tape.value(logits), own, features))
    else:
        tape.add(logits, write_loss(graph, tape.value(logits), outputs, features))
    tape.backward()
    graph.purpose = Purpose(UPDATE)
    write_updates(graph, tape, trained, features)
    made = {o.name for o in graph.outputs}
    for spec in architecture.statistics:
        if spec.name not in frozen and step_contract.following(spec.name) not in made:
            raise ModelError(f"statistic {spec.name} belongs to no batch normalisation")
    graph.rename(tape.value(logits), step_contract.LOGITS)
    if features.metric:
        labels = next(p for p in graph.inputs if p.name == step_contract.Y)
        graph.metadata[step_contract.METRIC] = embedded_metric(model, labels, features)
    if features.ignore_label is not None:
        graph.metadata[step_contract.IGNORED] = str(features.ignore_label)
    graph.prune()
    return graph


def _own_loss(model: Model, features: Features) -> Model | None:
    """The loss that is a graph of its own: the model's, or a built-in one; None for those that are written by hand.

    Raises:
        ConfigError: The model brings no loss.
    """
    if features.loss in LOSS_GRAPHS:
        return LOSS_GRAPHS[features.loss](model.architecture.output_shape)
    if features.loss == CUSTOM and model.loss is None:
        raise ConfigError(
            "recipe: loss 'custom', and the model brings no loss",
            expected=f"a model with one, or one of {', '.join(n for n in LOSSES if n != CUSTOM)}",
            hint="Give it with the model: --loss package.module:function, [model] loss, or load(..., loss=...).",
        )
    return model.loss if features.loss == CUSTOM else None


def _labels(model: Model, features: Features) -> Port:
    """The training graph's labels."""
    own = _own_loss(model, features)
    if own is None:
        return port(step_contract.Y, *target_shape(features, model.architecture.output_shape))
    labels = own.graph.inputs[1]
    return port(step_contract.Y, (BATCH, *(d for d in labels.shape[1:] if isinstance(d, int))), labels.dtype)


def write_loss_graph(graph: Graph, logits: str, loss: Model, features: Features) -> str:
    """Write a loss that is a graph, differentiated by the same rules as the model; returns its gradient by the outputs.

    Raises:
        ModelError: An operator of it has no gradient rule.
    """
    taken, labels = (tuple(d for d in p.shape[1:] if isinstance(d, int)) for p in loss.graph.inputs)
    tape = Tape(loss, graph)
    tape.enter(step_contract.LOGITS, logits, (BATCH, *taken), wanted=True)
    tape.enter(step_contract.Y, step_contract.Y, (BATCH, *labels))
    try:
        tape.forward()
    except ModelError as error:
        raise ModelError(f"the model's own loss: {error}") from error
    row = tape.value(step_contract.LOSS)
    if not tape.wants(step_contract.LOSS):
        raise ModelError("the model's own loss doesn't depend on its outputs, or not in a way that can be trained")
    if features.scores:
        right = graph.emit("Greater", step_contract.Y, graph.scalar(0.5))
        count_hits(graph, graph.emit("Equal", graph.emit("Greater", logits, graph.scalar(0)), right))
    share = share_of_sample(graph, row, features)
    graph.emit("ReduceSum", graph.emit("Mul", row, share), attrs={"keepdims": 0}, out=step_contract.LOSS)
    if features.sample_losses:
        graph.outputs.append(port(step_contract.SAMPLE_LOSSES, (BATCH,)))
        graph.emit("Identity", row, out=step_contract.SAMPLE_LOSSES)
    tape.add(step_contract.LOSS, graph.emit("Expand", share, tape.shape_of(row)))
    tape.backward()
    gradient = tape.gradient(step_contract.LOGITS)
    if gradient is None:
        raise ModelError("the model's own loss has no gradient by its outputs")
    return gradient
