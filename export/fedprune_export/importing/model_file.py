"""Reads ONNX files with their external data; refuses damaged files, and data outside the model's folder."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import onnx

from fedprune.core.disk import MAX_READ_BYTES, open_file, read_file
from fedprune.core.errors import ModelError, error_reason, path_remedy, value_text
from fedprune.output.extras import install_command
from fedprune_export.importing.fused_operators import name_early_norms
from fedprune_export.importing.node_order import inner_graphs, sort_nodes

_NETWORK_NAME = re.compile(r"[a-z][a-z0-9_]{2,60}")  # what looks like a network's name more than like a file's


def read_model_file(path: Path) -> bytes:
    """The bytes of a model as one ONNX file, into which weights from files next to it are read.

    Raises `ModelError` if it can't be read, is no model, or its weights aren't there.
    """
    try:
        raw = read_file(path)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise ModelError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
        # A bare name such as resnet18 is most likely meant for timm.
        hint = "Give an ONNX file, a torch factory as package.module:factory, or timm:NAME."
        if _NETWORK_NAME.fullmatch(str(path)):
            if path.with_suffix(".py").is_file():
                hint += f" For a factory in {path}.py: {path}:FACTORY."
            else:
                install = f"{install_command('torch')}, then pip install timm"
                hint += f" If {path} is a network of timm: {install}, and give timm:{path}."
        raise ModelError(f"can't read {path}: {error.strerror or error}", hint=path_remedy(error, hint)) from error
    try:
        proto = parse_model(raw, run_checker=False)
        outside = [t for t in _tensors(proto.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
        if not outside:
            return raw
        _load_external_data(outside, path.parent)
        filled: bytes = proto.SerializeToString(deterministic=True)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return filled


def parse_model(raw: bytes, *, run_checker: bool = True) -> onnx.ModelProto:
    """The model that a file holds, with its nodes in order. Raises `ModelError` if it isn't one."""
    try:
        proto = onnx.load_model_from_string(raw)
        if not proto.ir_version or not proto.HasField("graph"):
            raise ValueError("it has no graph")
        sort_nodes(proto.graph)
        for node in proto.graph.node:
            # Without it onnx, and with it onnxruntime at fixed sizes, infers the shape of onesided=0.
            if node.op_type == "STFT" and not any(a.name == "onesided" for a in node.attribute):
                node.attribute.append(onnx.helper.make_attribute("onesided", 1))
    except Exception as error:
        raise ModelError(
            f"this is not a whole ONNX model ({error_reason(error)})",
            got=f"{len(raw)} bytes",
            hint="Export or copy the file again.",
        ) from error
    if run_checker:
        check_valid_onnx(proto)
    return proto


def check_valid_onnx(model: onnx.ModelProto) -> None:
    """Make sure that a model is valid ONNX, but for norms of onnxruntime in the standard's domain. Raises `ModelError`
    if it isn't valid."""
    try:
        onnx.checker.check_model(name_early_norms(model))
    except Exception as error:
        raise ModelError(
            f"the model is not valid ONNX ({error_reason(error)})",
            hint="Mend it where it was made; onnx.checker.check_model finds the same.",
        ) from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a graph: initialisers, constants, and those of graphs within."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in inner_graphs(node):
            yield from _tensors(inner)


def _load_external_data(tensors: list[onnx.TensorProto], folder: Path) -> None:
    """Read the external data of tensors. Each range must fit its tensor and lie in a plain file of the folder."""
    total = 0
    for tensor in tensors:
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        try:
            offset, length = (int(entry.get(k) or 0) for k in ("offset", "length"))
            needed = _byte_count(tensor)
            # Files may leave the length out, which reads as 0.
            if offset < 0 or length not in (0, needed):
                raise ValueError(f"{length} bytes of {value_text(tensor.name)}, which has {needed}")
            # Several tensors may refer to the same bytes, so the sizes of the files do not limit the memory.
            total += needed
            if total > MAX_READ_BYTES:
                raise ValueError(f"more than {MAX_READ_BYTES} bytes in all")
            tensor.raw_data = _read_range(folder, location, offset, needed)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"its external data can't be read ({error_reason(error)})",
                hint=f"Copy {location if len(location) < 200 else value_text(location)} of the same export "
                "into its folder.",
            ) from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _byte_count(tensor: onnx.TensorProto) -> int:
    if any(d < 0 for d in tensor.dims):
        raise ValueError(f"tensor {value_text(tensor.name)} has a negative size")
    numbers = math.prod(int(d) for d in tensor.dims)
    try:
        each = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"tensor {value_text(tensor.name)} is of no known type") from error
    return numbers * each


def _read_range(folder: Path, location: str, offset: int, length: int) -> bytes:
    path_parts = Path(location).parts
    if not location or "\0" in location or Path(location).is_absolute() or ".." in path_parts:
        raise ValueError(f"{value_text(location)} is not a file in the folder of the model")
    path = folder.resolve().joinpath(*path_parts)
    # A link could lead anywhere on this machine, and a model may come from anyone.
    if path.resolve() != path:
        raise ValueError(f"{value_text(location)} is a link")
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if offset + length > size:
            raise ValueError(f"{value_text(location)} has {size} bytes, not {offset + length}")
        file.seek(offset)
        return file.read(length)
