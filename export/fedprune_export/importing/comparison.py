"""Compares a model's source with the model that a job started with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.sources import torch_module
from fedprune_export.importing.user_graphs import LOSS_KEY, METRIC_KEY

_USER_GRAPH_KEYS = (LOSS_KEY, METRIC_KEY)


@dataclass(frozen=True)
class ModelChanges:
    """What differs between two reads of a model.

    Attributes:
        graph: Whether operators, shapes, names or choices differ.
        tensors: Names of tensors with other values.
        loss: Whether the later read has another loss of the user's own; none isn't another one.
        metric: As `loss`.
    """

    graph: bool
    tensors: frozenset[str]
    loss: bool
    metric: bool


def compare_models(before: bytes, after: bytes) -> ModelChanges:
    """The differences between two files of a model, each as `read_source` returns it."""
    (old, old_tensors, old_user_graphs), (new, new_tensors, new_user_graphs) = _split_file(before), _split_file(after)
    common = old_tensors.keys() & new_tensors.keys()
    tensors = frozenset(n for n in common if old_tensors[n].tobytes() != new_tensors[n].tobytes())
    changed = (key in new_user_graphs and new_user_graphs[key] != old_user_graphs.get(key) for key in _USER_GRAPH_KEYS)
    return ModelChanges(old != new, tensors, *changed)


def drawn_tensors(source: str, raw: bytes, names: frozenset[str], read: Callable[[], bytes]) -> frozenset[str]:
    """Tensors whose values a factory draws at random in every call, such as untrained weights.

    `raw` is the model's file after one call of the factory `source`, and `names` are the tensors in question. `read`
    exports the file again, which takes longer than one more call of the factory.
    """
    state, tensors = torch_module(source).state_dict(), _split_file(raw)[1]
    drawn = frozenset(n for n in names & state.keys() if not np.array_equal(_numpy_values(state[n]), tensors[n]))
    # Tensors that are no parameters or buffers have no name outside the file.
    return drawn if drawn == names else drawn | (names & compare_models(raw, read()).tensors)


def _numpy_values(tensor: Any) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()
    return values


def _split_file(raw: bytes) -> tuple[bytes, dict[str, npt.NDArray[Any]], dict[str, str]]:
    """A model's file in parts: everything but values, the values of its tensors, and loss and metric."""
    proto = parse_model(raw, run_checker=False)
    user_graphs = {p.key: p.value for p in proto.metadata_props if p.key in _USER_GRAPH_KEYS}
    other_properties = [p for p in proto.metadata_props if p.key not in _USER_GRAPH_KEYS]
    del proto.metadata_props[:]
    proto.metadata_props.extend(other_properties)
    tensors = {}
    for tensor in proto.graph.initializer:
        tensors[tensor.name] = onnx.numpy_helper.to_array(tensor)
        shape, kind, name = list(tensor.dims), tensor.data_type, tensor.name
        # The rest of the file must be equal bytes if only values differ.
        tensor.CopyFrom(onnx.TensorProto(name=name, dims=shape, data_type=kind))
    graph: bytes = proto.SerializeToString(deterministic=True)
    return graph, tensors, user_graphs
