"""One training step as one ONNX graph: forward, loss, backward, optimiser."""

from __future__ import annotations

import numpy as np

from fedprune import step
from fedprune.architecture import TensorSpec
from fedprune.errors import ModelError
from fedprune.recipe import Features
from fedprune_export.gradients.tape import BATCH, Shape, Tape, port, sample_shape
from fedprune_export.graph import Graph, Port
from fedprune_export.imported import Model


def training_graph(model: Model, features: Features) -> Graph:
    """The training step of a model, by the names of `fedprune.step`.

    The batch and all channel dimensions are symbolic: one graph serves every width of the architecture.

    Args:
        model: What to train.
        features: Which optional inputs the step has.

    Raises:
        ModelError: An operator can't be differentiated, or its size would have to be fixed; the message names the node.
    """
    if not model.architecture.classes:
        raise ModelError("the model's output is not a row of logits", hint="Only classifiers can be trained.")
    graph = Graph(name="training_step", _counter=model.graph._counter)
    tape = Tape(model, graph)
    input_shape = sample_shape(model.graph)
    graph.inputs.append(port(step.X, input_shape, model.graph.inputs[0].dtype))
    graph.inputs.append(port(step.Y, (BATCH,), np.int64))
    graph.inputs += [port(n, ()) for n in (step.LR, step.MOMENTUM, step.WEIGHT_DECAY)]
    tape.enter(model.graph.inputs[0].name, step.X, input_shape)

    shapes = {t.name: tape.tensor_shape(t) for t in model.architecture.tensors}
    for spec in model.architecture.tensors:
        graph.inputs.append(port(spec.name, shapes[spec.name]))
        value = spec.name
        if spec.kind.trainable and features.element_mask:
            value = graph.emit("Mul", spec.name, step.mask(spec.name))
        tape.enter(spec.name, value, shapes[spec.name], wanted=spec.kind.trainable)
    for spec in model.architecture.trainable:
        graph.inputs += _extra_inputs(spec, shapes[spec.name], features)
    graph.outputs += [port(step.LOSS, ()), port(step.HITS, (), np.int64)]

    tape.forward()
    logits = model.graph.outputs[0].name
    tape.add(logits, _loss(graph, tape.value(logits), model.architecture.classes, features))
    tape.backward()
    for spec in model.architecture.trainable:
        _update(graph, tape, spec, shapes[spec.name], features)
    made = {o.name for o in graph.outputs}
    for spec in model.architecture.statistics:
        if step.following(spec.name) not in made:
            raise ModelError(f"statistic {spec.name} belongs to no batch normalisation")
    graph.prune()
    return graph


def _extra_inputs(spec: TensorSpec, shape: Shape, features: Features) -> list[Port]:
    """What a trainable tensor brings besides itself."""
    out = [port(step.buffer(spec.name), shape)]
    if features.proximal:
        out += [port(step.anchor(spec.name), shape), port(step.strength(spec.name), ())]
    if features.element_mask:
        out.append(port(step.mask(spec.name), shape))
    return out


def _loss(g: Graph, logits: str, classes: int, features: Features) -> str:
    """Write cross-entropy and hits; the gradient of the loss by the logits.

    An offset is added first; then the logits of masked classes are replaced by 0, so that no gradient passes them.
    """
    if features.logit_offset:
        g.inputs.append(port(step.LOGIT_OFFSET, (classes,)))
        logits = g.emit("Add", logits, step.LOGIT_OFFSET)
    present = ""
    if features.class_mask:
        g.inputs.append(port(step.CLASS_MASK, (classes,)))
        present = g.emit("Greater", step.CLASS_MASK, g.scalar(0))
        logits = g.emit("Where", present, logits, g.scalar(0))
    label = g.emit("Unsqueeze", step.Y, g.ints(1))
    is_label = g.emit("Equal", label, g.constant(np.arange(classes)[None], np.int64))
    log_probability = g.emit("LogSoftmax", logits, attrs={"axis": 1})
    own = g.emit("Where", is_label, log_probability, g.scalar(0))
    row = g.emit("Neg", g.emit("ReduceSum", own, g.ints(1), attrs={"keepdims": 1}))
    if features.class_weight:
        g.inputs.append(port(step.CLASS_WEIGHT, (classes,)))
        share = g.emit("Gather", step.CLASS_WEIGHT, label)
        share = g.emit("Div", share, g.emit("ReduceSum", share, attrs={"keepdims": 0}))
    else:
        batch = g.emit("Gather", g.emit("Shape", step.Y), g.constant(0, np.int64))
        share = g.emit("Reciprocal", g.emit("Cast", batch, attrs={"to": 1}))
    g.emit("ReduceSum", g.emit("Mul", row, share), attrs={"keepdims": 0}, out=step.LOSS)

    guess = g.emit("ArgMax", logits, attrs={"axis": 1, "keepdims": 0})
    right = g.emit("Cast", g.emit("Equal", guess, step.Y), attrs={"to": 7})
    g.emit("ReduceSum", right, attrs={"keepdims": 0}, out=step.HITS)

    probability = g.emit("Softmax", logits, attrs={"axis": 1})
    expected = g.emit("Cast", is_label, attrs={"to": 1})
    gradient = g.emit("Mul", g.emit("Sub", probability, expected), share)
    return g.emit("Where", present, gradient, g.scalar(0)) if present else gradient


def _update(g: Graph, tape: Tape, spec: TensorSpec, shape: Shape, features: Features) -> None:
    """Write one tensor's step of SGD: g += wd · w; buf = m · buf + g; w −= lr · buf (torch.optim.SGD)."""
    name = spec.name
    gradient = tape.gradient(name) or g.emit("ConstantOfShape", tape.shape_of(name))
    if features.proximal:
        pull = g.emit("Mul", g.emit("Sub", name, step.anchor(name)), step.strength(name))
        gradient = g.emit("Add", gradient, pull)
    if features.element_mask:
        gradient = g.emit("Mul", gradient, step.mask(name))
    if features.gradients:
        gradient = g.emit("Identity", gradient, out=step.gradient(name))
        g.outputs.append(port(step.gradient(name), shape))
    decayed = g.emit("Add", gradient, g.emit("Mul", name, step.WEIGHT_DECAY))
    if features.element_mask:
        decayed = g.emit("Mul", decayed, step.mask(name))
    old = g.emit("Mul", step.buffer(name), step.MOMENTUM)
    following = step.following(step.buffer(name))
    moved = g.emit("Add", old, decayed, out=following)
    target = step.following(name)
    change = g.emit("Mul", moved, step.LR)
    if features.element_mask:
        kept = g.emit("Greater", step.mask(name), g.scalar(0))
        g.emit("Where", kept, g.emit("Sub", name, change), name, out=target)
    else:
        g.emit("Sub", name, change, out=target)
    g.outputs += [port(target, shape), port(following, shape)]
