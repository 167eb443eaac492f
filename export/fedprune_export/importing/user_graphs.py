"""Reads and imports a user's own loss or metric of outputs and labels: a torch function or module, or an ONNX file."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedprune.core.disk import path_exists
from fedprune.core.errors import ModelError, error_reason, search_location, shape_text
from fedprune.model.architecture import Architecture
from fedprune.model.loss import Y
from fedprune.model.step_contract import LOGITS, LOSS, METRIC_METADATA, SUMS, VALUE
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.inlining import inline_model
from fedprune_export.importing.model_file import check_valid_onnx, parse_model, read_model_file
from fedprune_export.importing.normalise import simplify_graph
from fedprune_export.importing.packing import Piece, row_splitter
from fedprune_export.importing.raw_file import raw_session
from fedprune_export.importing.torch_export import export_module, root_cause
from fedprune_export.importing.torch_loading import import_object, torch_package
from fedprune_export.importing.translation import upgrade_model
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.trace import trace_graph
from fedprune_export.pruning.model import Model

# Keys of a model's metadata that hold its loss and its metric: ONNX files in base64.
LOSS_KEY, METRIC_KEY = "fedprune.loss", METRIC_METADATA

# float32 rounds by about 1e-7 in every operation; an import that computes something else differs by far more.
_TOLERANCE = 1e-4
_LABEL_DTYPES = {"float32": np.dtype(np.float32), "int64": np.dtype(np.int64)}


def _labels_of(function: Any, outputs: Sequence[int], name: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of the labels of a torch loss or metric, by its attributes `target_shape` and `target_dtype`; by
    default labels are shaped as outputs. Raises `ModelError` if these are invalid."""
    shape = getattr(function, "target_shape", tuple(outputs))
    dtype = str(getattr(function, "target_dtype", "float32")).rpartition(".")[2]
    is_shape = isinstance(shape, (tuple, list)) and all(isinstance(d, int) for d in shape)
    if dtype not in _LABEL_DTYPES or not is_shape:
        raise ModelError(
            f"{name}: target_shape and target_dtype",
            expected="one sample's labels, such as (32, 32), and float32 or int64",
            got=f"{shape}, {dtype}",
        )
    return tuple(shape), dtype


def read_loss(source: object, outputs: Sequence[int], pieces: Sequence[Piece] = ()) -> bytes:
    """A loss as the bytes of an ONNX file, for a model with outputs [n, *outputs].

    `source` is as in `ImportChoices.loss`. `pieces` are the model's outputs, if it has several: they are arguments of
    their own, before the labels. Raises `ModelError` if there is no such loss, or torch can't export it;
    `MissingExtraError` if torch is needed and not installed.
    """
    kind = _FunctionKind("loss", "one number per sample", lambda loss, *arguments: loss(*arguments))
    return _read_function(source, outputs, pieces, kind)


def read_metric(source: object, outputs: Sequence[int], pieces: Sequence[Piece] = ()) -> bytes:
    """A metric as the bytes of an ONNX file, for a model with outputs [n, *outputs].

    `source` is as in `ImportChoices.metric`; an ONNX file of outputs and labels gives the sums over samples [k] and the
    value of the metric []. `pieces` and errors are those of `read_loss`.
    """
    returns = "one number per sample, or a row of numbers and a `value` of their sums"
    return _read_function(source, outputs, pieces, _FunctionKind("metric", returns, _metric_sums))


def _metric_sums(metric: Any, *arguments: Any) -> tuple[Any, Any]:
    """The sums over the samples of a batch, and the metric's value for them."""
    torch, value = torch_package(), getattr(metric, "value", None)
    rows = metric(*arguments).float()
    if value is not None:
        sums = rows.sum(0)
        return sums, value(sums).reshape(()).float()
    sums = torch.stack([rows, torch.ones_like(rows)], 1).sum(0)
    return sums, sums[0] / sums[1]


class _FunctionKind(NamedTuple):
    """A kind of user function: its name, what it returns, and the computation on the function and its arguments."""

    name: str
    returns: str
    compute: Callable[..., Any]


def _read_function(source: object, outputs: Sequence[int], pieces: Sequence[Piece], kind: _FunctionKind) -> bytes:
    """Read a loss or metric from an ONNX file, or export it as the bytes of one."""
    if isinstance(source, (str, Path)) and ":" not in str(source):
        if not path_exists(Path(source), file=True):
            what = f"there is no file {source}"
            hint = (
                f"Give an ONNX file, or a function or class of torch as package.module:name.{search_location(source)}"
            )
            raise ModelError(what, expected=f"a {kind.name} of outputs and labels", hint=hint)
        return read_model_file(Path(source))
    torch = torch_package()
    function, name = _user_function(source)
    split = row_splitter(pieces) if pieces else lambda outputs: [outputs]

    class UserFunction(torch.nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, outputs: Any, labels: Any) -> Any:
            return kind.compute(function, *split(outputs), labels)

    module = UserFunction()
    shape, dtype = _labels_of(function, outputs, name)
    if isinstance(function, torch.nn.Module):
        # As a submodule its parameters and buffers are exported with it.
        module.user_function = function
    samples = torch.zeros((2, *outputs)), torch.zeros((2, *shape), dtype=getattr(torch, dtype))
    try:
        raw: bytes = export_module(module.eval(), samples).SerializeToString(deterministic=True)
    except Exception as error:
        raise ModelError(
            f"{name}: torch can't export this {kind.name} ({error_reason(root_cause(error))})",
            hint=f"A {kind.name} takes outputs {shape_text('n', *outputs)} and labels "
            f"{shape_text('n', *shape)} ({dtype}; its attributes target_shape and target_dtype say so), "
            f"and returns {kind.returns}.",
        ) from error
    return raw


def _user_function(source: object) -> tuple[Any, str]:
    """The object that a source names, and its name."""
    name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    function: Any = import_object(source) if isinstance(source, str) else source
    if isinstance(function, type):
        function = function()
    if not callable(function):
        raise ModelError(f"{name}", expected="a function or module of outputs and labels", got=type(function).__name__)
    return function, name


def import_loss(raw: bytes, outputs: Sequence[int]) -> Model:
    """A loss as a graph of `logits` and `y` that gives `loss` [n], of operators that can be differentiated. Raises
    `ModelError` if it is damaged, has other inputs or outputs, or uses what can't be handled."""
    graph = _read_user_graph(raw, outputs, "loss", (LOSS,), "one number per sample")
    try:
        graph_trace = trace_graph(graph)
    except ModelError as error:
        labels = graph.inputs[1]
        raise ModelError(
            f"the model's own loss: {error}",
            hint=f"Its labels are {labels.dtype} {shape_text('n', *labels.shape[1:])}. If they should be numbers of "
            'classes, set the attributes target_dtype = "int64" and target_shape of the loss (docs/export.md).',
        ) from error
    if (dims := graph_trace.dims(LOSS)) != (None,):
        raise ModelError(
            "what a loss returns",
            expected="one number per sample [n]",
            got=shape_text(*("n" if d is None else d for d in dims)) if dims else "one number for the whole batch",
            hint="Sum or average over all axes but the first (in torch, reduction='none', then .flatten(1).mean(1)).",
        )
    simplify_graph(graph, LOSS)
    _check_same_outputs(raw, graph, outputs, "loss")
    return Model(graph, Architecture("loss", (), (), (), (), tuple(outputs), ()))


def import_metric(raw: bytes, outputs: Sequence[int]) -> Graph:
    """A metric as a graph of `logits` and `y` that gives `sums` [k] and `value` []. Raises `ModelError` if it is
    damaged, has other inputs or outputs, or uses what can't be handled."""
    returns = "sums over samples [k] and what they come to []"
    graph = _read_user_graph(raw, outputs, "metric", (SUMS, VALUE), returns)
    sums, value = map(trace_graph(graph).dims, (SUMS, VALUE))
    if len(sums) != 1 or sums[0] is None or value != ():
        raise ModelError("what a metric returns", expected=returns, got=f"{shape_text(*sums)} and {shape_text(*value)}")
    # The sums of several batches are added before the value is computed, so it must not see a batch.
    if _reads_samples(graph):
        raise ModelError(
            "what a metric returns",
            expected="a value that is computed from the sums alone",
            got="one that reads outputs or labels",
            hint="Sums of many batches add up; the value is computed from the total.",
        )
    simplify_graph(graph, VALUE)
    _check_same_outputs(raw, graph, outputs, "metric")
    return graph


def check_labels(loss: Model | None, metric: Graph | None) -> None:
    """Make sure that a model's own loss and metric take the same labels. Raises `ModelError` if they don't."""
    if loss is None or metric is None:
        return
    loss_labels, metric_labels = ((p.dtype, tuple(p.shape[1:])) for p in (loss.graph.inputs[1], metric.inputs[1]))
    if loss_labels != metric_labels:
        raise ModelError(
            "the labels of the model's own metric",
            expected=f"those of its loss, {loss_labels[0]} {shape_text('n', *loss_labels[1])}",
            got=f"{metric_labels[0]} {shape_text('n', *metric_labels[1])}",
            hint=f"Set the metric's attributes target_shape = {loss_labels[1]} and target_dtype = "
            f'"{loss_labels[0]}", as the loss has them.',
        )


def _check_same_outputs(raw: bytes, graph: Graph, outputs: Sequence[int], kind: str) -> None:
    """Compare an imported loss or metric with its file on random data. Raises `ModelError` if they differ."""
    proto, rng, count = parse_model(raw, run_checker=False).graph, np.random.default_rng(0), 4
    initializer_names = {t.name for t in proto.initializer}
    inputs, names = [i.name for i in proto.input if i.name not in initializer_names], [o.name for o in proto.output]
    labels = graph.inputs[1]
    shape = (count, *(d for d in labels.shape[1:] if isinstance(d, int)))
    # Labels of type int64 are taken for classes, and outputs have one channel per class on their first axis.
    classes = max(1, outputs[0]) if outputs else 1
    is_whole = labels.dtype == np.int64
    y: Any = rng.integers(0, classes, shape) if is_whole else rng.uniform(0, 1, shape).astype(np.float32)
    values: list[Any] = [rng.standard_normal((count, *outputs), np.float32), y]
    before = raw_session(raw, names).run(dict(zip(inputs, values, strict=True)))
    after = OnnxSession(graph.to_bytes()).run({LOGITS: values[0], Y: y})
    for name, port in zip(names, graph.outputs, strict=True):
        if not np.allclose(before[name], after[port.name], rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            what = f"the {kind} computes something else once it is imported"
            raise ModelError(what, hint="Please report this with it.")


def _reads_samples(graph: Graph) -> bool:
    """Whether the value depends on outputs or labels other than through the sums."""
    of_samples = {LOGITS, Y}
    for node in graph.nodes:
        if not of_samples.isdisjoint(node.inputs):
            of_samples.update({*node.outputs} - {SUMS})
    return VALUE in of_samples


def embedded_user_graph(key: str, text: str) -> bytes:
    """The loss or metric in a model's file. Raises `ModelError` if it is damaged."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ModelError(f"metadata {key}", expected="an ONNX file in base64", got="something else") from error


def _read_user_graph(raw: bytes, outputs: Sequence[int], kind: str, names: tuple[str, ...], returns: str) -> Graph:
    """Read a graph of outputs and labels, and give its values the contract's names."""
    file_model = parse_model(raw, run_checker=False)
    proto = inline_model(file_model)
    check_valid_onnx(raw if proto is file_model else proto)
    graph = Graph.from_proto(upgrade_model(proto))
    if len(graph.inputs) != 2 or len(graph.outputs) != len(names):
        raise ModelError(
            f"the inputs and outputs of a {kind}",
            expected=f"outputs of the model and labels, {returns}",
            got=f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs",
            hint=f"A {kind} that doesn't read its labels has lost them in the export."
            if len(graph.inputs) < 2
            else "docs/export.md#a-loss-of-your-own says what a loss or metric returns.",
        )
    _rename_ports(graph, names)
    _check_inputs(graph.inputs, tuple(outputs), kind)
    graph.inputs[0].shape = ("N", *outputs)
    graph.inputs[1].shape = ("N", *graph.inputs[1].shape[1:])
    return graph


def _rename_ports(graph: Graph, outputs: tuple[str, ...]) -> None:
    """Give inputs and outputs the contract's names, and rename inner values that have one of these."""
    names = dict(zip((p.name for p in (*graph.inputs, *graph.outputs)), (LOGITS, Y, *outputs), strict=True))
    inner = {*graph.initializers, *(o for n in graph.nodes for o in n.outputs)} - set(names)
    used_names = inner | set(names.values())
    for name in sorted(inner.intersection(names.values())):
        names[name] = f"{name}."
        while names[name] in used_names:
            names[name] += "."
        used_names.add(names[name])
    for port in (*graph.inputs, *graph.outputs):
        port.name = names[port.name]
    graph.rename(names)


def _check_inputs(ports: Sequence[Port], outputs: tuple[int, ...], kind: str) -> None:
    outputs_port, labels_port = ports
    sizes = zip(outputs_port.shape[1:], outputs, strict=False)
    fits = len(outputs_port.shape) == 1 + len(outputs) and all(o == d or not isinstance(d, int) for d, o in sizes)
    if outputs_port.dtype != np.float32 or not fits:
        raise ModelError(
            f"the first input of a {kind}",
            expected=f"the model's outputs, float32 {shape_text('n', *outputs)}",
            got=f"{outputs_port.dtype} {shape_text(*outputs_port.shape)}",
        )
    has_fixed_sizes = bool(labels_port.shape) and all(isinstance(d, int) for d in labels_port.shape[1:])
    if labels_port.dtype not in _LABEL_DTYPES.values() or not has_fixed_sizes:
        raise ModelError(
            f"the labels of a {kind}",
            expected="float32 or int64, with fixed sizes from the second axis on",
            got=f"{labels_port.dtype} {shape_text(*labels_port.shape)}",
        )
