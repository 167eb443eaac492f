"""One training step as one ONNX graph: forward, loss, backward, optimiser."""

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.nested_widths import axes_json
from fedprune.model.recipe import Features
from fedprune.model.trainable import frozen_tensors
from fedprune_export.autodiff.tape import Tape, port, sample_shape
from fedprune_export.ir.drafts import LOSS, UPDATE, Purpose
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.model import Model
from fedprune_export.pruning.scaler import scaled_outputs
from fedprune_export.training.losses import target_shape, write_loss
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
    outputs = architecture.classes
    if not outputs:
        raise ModelError(
            "the model's output is not a row of logits",
            hint="Only outputs of one number per class can be trained. Flatten others in forward: x.flatten(1).",
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
    graph.inputs.append(port(step_contract.Y, *target_shape(features, outputs)))
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
    tape.add(logits, write_loss(graph, tape.value(logits), outputs, features))
    tape.backward()
    graph.purpose = Purpose(UPDATE)
    write_updates(graph, tape, trained, features)
    made = {o.name for o in graph.outputs}
    for spec in architecture.statistics:
        if spec.name not in frozen and step_contract.following(spec.name) not in made:
            raise ModelError(f"statistic {spec.name} belongs to no batch normalisation")
    graph.prune()
    return graph
