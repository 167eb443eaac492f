"""Reads and imports a user's own loss or metric of outputs and labels: a torch function or module, or an ONNX file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from fedprune_export.importing.metadata import decode_file
from fedprune_export.importing.model_file import check_valid_onnx, parse_model, read_model_file
from fedprune_export.importing.normalise import simplify_graph
from fedprune_export.importing.packing import Piece, row_splitter
from fedprune_export.importing.raw_file import BatchLayout, RawFile
from fedprune_export.importing.torch_export import export_module, root_cause
from fedprune_export.importing.torch_loading import import_object, torch_package
from fedprune_export.importing.translation import upgrade_model
from fedprune_export.ir.graph import Array, Graph, Port
from fedprune_export.ir.trace import Trace, trace_graph
from fedprune_export.pruning.model import Model

# Keys of a model's metadata that hold its loss and its metric: ONNX files in base64.
LOSS_KEY, METRIC_KEY = "fedprune.loss", METRIC_METADATA

_LABEL_DTYPES = {"float32": np.dtype(np.float32), "int64": np.dtype(np.int64)}


class _Kind(NamedTuple):
    """A kind of user graph.

    Attributes:
        returns: What a function of torch returns, and `gives`, what a file gives.
        values: The contract's names of the file's outputs.
        compute: What the file computes, of the function and its arguments.
    """

    name: str
    returns: str
    gives: str
    values: tuple[str, ...]
    compute: Callable[..., Any]


def _metric_sums(metric: Any, *arguments: Any) -> tuple[Any, Any]:
    """The sums over the samples of a batch, and the metric's value for them."""
    torch, value = torch_package(), getattr(metric, "value", None)
    rows = metric(*arguments).float()
    if value is not None:
        sums = rows.sum(0)
        return sums, value(sums).reshape(()).float()
    sums = torch.stack([rows, torch.ones_like(rows)], 1).sum(0)
    return sums, sums[0] / sums[1]


_KINDS = {
    LOSS_KEY: _Kind(
        "loss", "one number per sample", "one number per sample", (LOSS,), lambda loss, *arguments: loss(*arguments)
    ),
    METRIC_KEY: _Kind(
        "metric",
        "one number per sample, or a row of numbers and a `value` of their sums",
        "sums over samples [k] and what they come to []",
        (SUMS, VALUE),
        _metric_sums,
    ),
}


@contextmanager
def _name_setting_in_errors(setting: str) -> Iterator[None]:
    """Let errors name the setting of a user's function, because the model's file may be correct."""
    try:
        yield
    except ModelError as error:
        raise error.with_subject(error.what, ("model", setting)) from error.__cause__


def embed_user_graph(key: str, source: object, outputs: Sequence[int], pieces: Sequence[Piece] = ()) -> str:
    """The text of a loss or metric in the metadata of a model with outputs [n, *outputs], by its key there.

    `source` is as in `ImportChoices`; an ONNX file of a metric gives the sums over samples [k] and the metric's value
    []. `pieces` are the model's outputs, if it has several: they are arguments of their own, before the labels. Raises
    `ModelError` if there is no such function, or torch can't export it; `MissingExtraError` if torch is needed and not
    installed.
    """
    kind = _KINDS[key]
    with _name_setting_in_errors(kind.name):
        return base64.b64encode(_read_user_graph(kind, source, outputs, pieces)).decode()


def _read_user_graph(kind: _Kind, source: object, outputs: Sequence[int], pieces: Sequence[Piece]) -> bytes:
    """A loss or metric as the bytes of an ONNX file."""
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


def import_user_graphs(texts: Mapping[str, str], outputs: Sequence[int]) -> tuple[Model | None, Graph | None]:
    """The loss and metric in a file's metadata: graphs of `logits` and `y` that give `loss` [n], of operators that can
    be differentiated, and `sums` [k] with `value` [].

    Raises `ModelError` if one is damaged, has other inputs or outputs, or uses what can't be handled, or if they don't
    take the same labels.
    """
    graphs: dict[str, Graph] = {}
    for key, kind in _KINDS.items():
        if key in texts:
            raw = decode_file(key, texts[key])
            with _name_setting_in_errors(kind.name):
                graphs[key] = _import_user_graph(kind, raw, tuple(outputs))
    loss, metric = graphs.get(LOSS_KEY), graphs.get(METRIC_KEY)
    if loss is not None and metric is not None:
        with _name_setting_in_errors("metric"):
            _check_same_labels(loss, metric)
    architecture = Architecture("loss", (), (), (), (), tuple(outputs), ())
    return None if loss is None else Model(loss, architecture), metric


def _import_user_graph(kind: _Kind, raw: bytes, outputs: tuple[int, ...]) -> Graph:
    proto = inline_model(parse_model(raw, run_checker=False))
    check_valid_onnx(proto)
    graph = Graph.from_proto(upgrade_model(proto))
    if len(graph.inputs) != 2 or len(graph.outputs) != len(kind.values):
        raise ModelError(
            f"the inputs and outputs of a {kind.name}",
            expected=f"outputs of the model and labels, {kind.gives}",
            got=f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs",
            hint=f"A {kind.name} that doesn't read its labels has lost them in the export."
            if len(graph.inputs) < 2
            else "docs/export.md#a-loss-of-your-own says what a loss or metric returns.",
        )
    file_names = [port.name for port in (*graph.inputs, *graph.outputs)]
    _rename_ports(graph, file_names, (LOGITS, Y, *kind.values))
    _check_inputs(graph.inputs, outputs, kind.name)
    graph.inputs[0].shape = ("N", *outputs)
    graph.inputs[1].shape = labels_shape = ("N", *graph.inputs[1].shape[1:])
    try:
        graph_trace = trace_graph(graph)
    except ModelError as error:
        raise ModelError(
            f"the model's own {kind.name}: {error}",
            hint=f"Its labels are {graph.inputs[1].dtype} {shape_text('n', *labels_shape[1:])}. If they should be "
            'numbers of classes, set the attributes target_dtype = "int64" and target_shape of the '
            f"{kind.name} (docs/export.md).",
        ) from error
    (_check_loss if kind is _KINDS[LOSS_KEY] else _check_metric)(graph, graph_trace)
    simplify_graph(graph, kind.values[-1])
    values = _random_arguments(graph, outputs)
    computed = OnnxSession(graph.to_bytes()).run(dict(zip((LOGITS, Y), values, strict=True)))
    RawFile(raw, file_names[2:], BatchLayout()).check(
        dict(zip(file_names[:2], values, strict=True)),
        {name: computed[port.name] for name, port in zip(file_names[2:], graph.outputs, strict=True)},
        f"the {kind.name} computes something else once it is imported",
        "Please report this with it.",
    )
    return graph


def _check_loss(graph: Graph, graph_trace: Trace) -> None:
    if (dims := graph_trace.dims(LOSS)) != (None,):
        raise ModelError(
            "what a loss returns",
            expected="one number per sample [n]",
            got=shape_text(*("n" if d is None else d for d in dims)) if dims else "one number for the whole batch",
            hint="Sum or average over all axes but the first (in torch, reduction='none', then .flatten(1).mean(1)).",
        )


def _check_metric(graph: Graph, graph_trace: Trace) -> None:
    sums, value = map(graph_trace.dims, (SUMS, VALUE))
    if len(sums) != 1 or sums[0] is None or value != ():
        raise ModelError(
            "what a metric returns",
            expected=_KINDS[METRIC_KEY].gives,
            got=f"{shape_text(*sums)} and {shape_text(*value)}",
        )
    # The sums of several batches are added before the value is computed, so it must not see a batch.
    samples = {LOGITS, Y}
    for node in graph.nodes:
        if not samples.isdisjoint(node.inputs):
            samples.update({*node.outputs} - {SUMS})
    if VALUE in samples:
        raise ModelError(
            "what a metric returns",
            expected="a value that is computed from the sums alone",
            got="one that reads outputs or labels",
            hint="Sums of many batches add up; the value is computed from the total.",
        )


def _random_arguments(graph: Graph, outputs: tuple[int, ...]) -> tuple[Array, Array]:
    """Outputs and labels of some samples."""
    random, samples, labels = np.random.default_rng(0), 4, graph.inputs[1]
    shape = (samples, *(d for d in labels.shape[1:] if isinstance(d, int)))
    # Labels of type int64 are taken for classes, and outputs have one channel per class on their first axis.
    classes = max(1, outputs[0]) if outputs else 1
    y: Array = random.integers(0, classes, shape) if labels.dtype == np.int64 else random.random(shape, np.float32)
    return random.standard_normal((samples, *outputs), np.float32), y


def _check_same_labels(loss: Graph, metric: Graph) -> None:
    loss_labels, metric_labels = ((p.dtype, tuple(p.shape[1:])) for p in (loss.inputs[1], metric.inputs[1]))
    if loss_labels != metric_labels:
        raise ModelError(
            "the labels of the model's own metric",
            expected=f"those of its loss, {loss_labels[0]} {shape_text('n', *loss_labels[1])}",
            got=f"{metric_labels[0]} {shape_text('n', *metric_labels[1])}",
            hint=f"Set the metric's attributes target_shape = {loss_labels[1]} and target_dtype = "
            f'"{loss_labels[0]}", as the loss has them.',
        )


def _rename_ports(graph: Graph, old: Sequence[str], new: Sequence[str]) -> None:
    """Give inputs and outputs the contract's names, and rename inner values that have one of these."""
    names = dict(zip(old, new, strict=True))
    inner_names = {*graph.initializers, *(o for n in graph.nodes for o in n.outputs)}
    names |= {name: graph.fresh(name) for name in new if name in inner_names and name not in names}
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
