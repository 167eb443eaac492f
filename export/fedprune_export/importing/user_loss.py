"""A loss of a user's own, of outputs and labels: a torch function or module, or an ONNX file."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.errors import ModelError, reason, shape_text
from fedprune.core.imports import own_module
from fedprune.model.architecture import Architecture
from fedprune.model.step_contract import LOGITS, LOSS, Y
from fedprune_export.importing.inlining import prepared
from fedprune_export.importing.model_file import check, parse, read_model_file
from fedprune_export.importing.normalise import simplified
from fedprune_export.importing.torch_export import exported, innermost, torch_package
from fedprune_export.importing.translation import upgraded
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.trace import trace
from fedprune_export.pruning.model import Model

KEY = "fedprune.loss"
"""Key of a model's metadata that holds its loss: an ONNX file in base64."""

_TYPES = {"float32": np.dtype(np.float32), "int64": np.dtype(np.int64)}


@dataclass(frozen=True)
class _Labels:
    """What a loss of torch is given as labels: its attributes `target_shape` and `target_dtype` say it."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, loss: Any, outputs: Sequence[int], name: str) -> _Labels:
        """By default labels are like outputs. Raises `ModelError` if the attributes are of another kind."""
        shape = getattr(loss, "target_shape", tuple(outputs))
        dtype = str(getattr(loss, "target_dtype", "float32")).rpartition(".")[2]
        if dtype not in _TYPES or not isinstance(shape, (tuple, list)) or not all(isinstance(d, int) for d in shape):
            raise ModelError(
                f"{name}: target_shape and target_dtype",
                expected="one sample's labels, such as (32, 32), and float32 or int64",
                got=f"{shape}, {dtype}",
            )
        return cls(tuple(shape), dtype)


def read_loss(source: object, outputs: Sequence[int]) -> bytes:
    """A loss as the bytes of an ONNX file, for a model with outputs [n, *outputs].

    Args:
        source: An ONNX file; `package.module:function`; or a torch function or module. It takes outputs and labels, and
            returns one number per sample [n]. Labels are like outputs, unless its attributes `target_shape` (of one
            sample) and `target_dtype` ("int64") say something else.

    Raises:
        ModelError: There is no such loss, or torch can't export it.
        MissingExtraError: torch is needed and not installed.
    """
    if isinstance(source, (str, Path)) and ":" not in str(source):
        return read_model_file(Path(source))
    name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    loss: Any = _named(source) if isinstance(source, str) else source
    torch = torch_package()
    if isinstance(loss, type):
        loss = loss()
    if not callable(loss):
        raise ModelError(f"{name}", expected="a function or module of outputs and labels", got=type(loss).__name__)
    labels = _Labels.of(loss, outputs, name)

    class Loss(torch.nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, outputs: Any, labels: Any) -> Any:
            return loss(outputs, labels)

    module = Loss()
    if isinstance(loss, torch.nn.Module):
        module.loss = loss
    samples = torch.zeros((2, *outputs)), torch.zeros((2, *labels.shape), dtype=getattr(torch, labels.dtype))
    try:
        raw: bytes = exported(module.eval(), samples).SerializeToString(deterministic=True)
    except Exception as error:
        raise ModelError(
            f"{name}: torch can't export this loss ({reason(innermost(error))})",
            hint=f"A loss takes outputs {shape_text('n', *outputs)} and labels {shape_text('n', *labels.shape)} "
            f"({labels.dtype}; its attributes target_shape and target_dtype say so), and returns one number per "
            "sample.",
        ) from error
    return raw


def import_loss(raw: bytes, outputs: Sequence[int]) -> Model:
    """A loss as a graph of `logits` and `y` that gives `loss` [n], of operators that can be differentiated.

    Raises:
        ModelError: It is damaged, has other inputs or outputs, or uses what can't be handled.
    """
    given = parse(raw, whole=False)
    proto = prepared(given)
    check(raw if proto is given else proto)
    graph = Graph.from_proto(upgraded(proto))
    if len(graph.inputs) != 2 or len(graph.outputs) != 1:
        raise ModelError(
            "the inputs and outputs of a loss",
            expected="outputs of the model and labels, one number per sample",
            got=f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs",
            hint="A loss that doesn't read its labels has lost them in the export.",
        )
    _rename(graph)
    _check_inputs(graph.inputs, tuple(outputs))
    graph.inputs[0].shape = ("N", *outputs)
    graph.inputs[1].shape = ("N", *graph.inputs[1].shape[1:])
    seen = trace(graph)
    if (dims := seen.dims(LOSS)) != (None,):
        raise ModelError(
            "what a loss returns",
            expected="one number per sample [n]",
            got=shape_text(*("n" if d is None else d for d in dims)),
            hint="Sum or average over all axes but the first: reduction='none', then .flatten(1).mean(1).",
        )
    simplified(graph, set(graph.initializers), [], output=LOSS)
    return Model(graph, Architecture("loss", (), (), (), (), tuple(outputs), ()))


def embed(raw: bytes, loss: bytes) -> bytes:
    """A model's file with its loss in it."""
    proto = parse(raw)
    kept = [p for p in proto.metadata_props if p.key != KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key=KEY, value=base64.b64encode(loss).decode())
    out: bytes = proto.SerializeToString(deterministic=True)
    return out


def with_loss_of(other: bytes, raw: bytes) -> bytes:
    """A model's file with another one's loss in it, if that has one."""
    text = next((p.value for p in parse(other).metadata_props if p.key == KEY), None)
    return raw if text is None else embed(raw, embedded(text))


def embedded(text: str) -> bytes:
    """The loss in a model's file. Raises `ModelError` if it is damaged."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ModelError(f"metadata {KEY}", expected="a loss in base64", got="something else") from error


def _named(source: str) -> Any:
    module_name, _, function = source.rpartition(":")
    try:
        return getattr(own_module(module_name), function)
    except ImportError as error:
        raise ModelError(
            f"can't import {module_name} ({reason(error)})",
            hint="Run the command in the folder of the module, or install its package.",
        ) from error
    except AttributeError as error:
        raise ModelError(f"module {module_name} has no {function}") from error
    except Exception as error:
        raise ModelError(f"importing {module_name} failed ({type(error).__name__}: {reason(error)})") from error


def _rename(graph: Graph) -> None:
    """Give inputs and output the contract's names, and nothing else one of these."""
    ports = dict(
        zip((graph.inputs[0].name, graph.inputs[1].name, graph.outputs[0].name), (LOGITS, Y, LOSS), strict=True)
    )
    inner = {*graph.initializers, *(o for n in graph.nodes for o in n.outputs)} - set(ports)
    names = ports | {name: f"{name}." for name in inner if name in (LOGITS, Y, LOSS)}
    graph.inputs[0].name, graph.inputs[1].name, graph.outputs[0].name = LOGITS, Y, LOSS
    graph.initializers = {names.get(k, k): v for k, v in graph.initializers.items()}
    for node in graph.nodes:
        node.inputs = [names.get(i, i) for i in node.inputs]
        node.outputs = [names.get(o, o) for o in node.outputs]


def _check_inputs(ports: Sequence[Port], outputs: tuple[int, ...]) -> None:
    taken, labels = ports
    if (
        taken.dtype != np.float32
        or any(isinstance(d, int) and d != o for d, o in zip(taken.shape[1:], outputs, strict=False))
        or len(taken.shape) != 1 + len(outputs)
    ):
        raise ModelError(
            "the first input of a loss",
            expected=f"the model's outputs, float32 {shape_text('n', *outputs)}",
            got=f"{taken.dtype} {shape_text(*taken.shape)}",
        )
    if labels.dtype not in _TYPES.values() or not labels.shape or not all(isinstance(d, int) for d in labels.shape[1:]):
        raise ModelError(
            "the labels of a loss",
            expected="float32 or int64, with fixed sizes from the second axis on",
            got=f"{labels.dtype} {shape_text(*labels.shape)}",
        )
