"""Bringing a user's model in: an ONNX file, or a torch module named as `package.module:factory`.

torch modules are exported unoptimised, because optimised exports fuse batch norms into convolutions and merge equal
weights of different layers; what then remains to be simplified is folded here, without touching weights.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import onnx

from fedprune.errors import MissingExtraError, ModelError, shown
from fedprune_export.channels import analyse
from fedprune_export.imported import Model
from fedprune_export.importing.normalise import normalise

PARAMETERS_KEY = "fedprune.parameters"
"""Metadata of an ONNX file that lists its trainable tensors, where its author knew them."""

_TORCH_HINT = (
    "pip install torch --index-url https://download.pytorch.org/whl/cpu (small CPU wheel), "
    "then pip install 'fedprune[export]'."
)


def load(source: str | Path, *, name: str | None = None, input_shape: Sequence[int] | None = None) -> Model:
    """Import a model.

    Args:
        source: An ONNX file, or `package.module:factory`, where the factory returns a torch module.
        name: The architecture's name; by default that of the file or factory.
        input_shape: One sample's shape, where a torch module doesn't say it in `input_shape`.

    Raises:
        ModelError: There is no such model, it is damaged, or it uses what can't be handled.
        MissingExtraError: torch is needed and not installed.
    """
    raw = read_source(source, input_shape=input_shape)
    text = str(source)
    default = text.rpartition(":")[2] if _is_factory(text) else Path(text).stem
    try:
        return import_onnx(raw, name or default)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error


def read_source(source: str | Path, *, input_shape: Sequence[int] | None = None) -> bytes:
    """A model as the bytes of one ONNX file, which `import_onnx` takes.

    Args:
        source: As for `load`.
        input_shape: As for `load`.

    Raises:
        ModelError: There is no such model or it is damaged.
        MissingExtraError: torch is needed and not installed.
    """
    text = str(source)
    if _is_factory(text):
        return export_torch(_factory(text), input_shape=input_shape, name=text)
    return _read_file(Path(source))


def import_onnx(raw: bytes, name: str) -> Model:
    """Import an ONNX model from memory; the same bytes and name always give the same architecture.

    Models below opset 17 are raised by onnx, which may name values another way in another version: then the same
    architecture is only sure with the same version of onnx.

    Raises:
        ModelError: It is damaged, or uses what can't be handled.
    """
    proto = _parse(raw)
    listed = {p.key: p.value for p in proto.metadata_props}.get(PARAMETERS_KEY)
    parameters: frozenset[str] | None = None
    if listed is not None:
        parameters = _parameters(listed, {t.name for t in proto.graph.initializer})
    normal = normalise(proto, parameters)
    found = analyse(normal.graph, normal.parameters, normal.trace, name)
    notes = tuple(dict.fromkeys([*normal.notes, *found.notes]))
    return Model(normal.graph, found.architecture, notes, found.values)


def _parameters(listed: str, held: AbstractSet[str]) -> frozenset[str]:
    """The names of the trainable tensors that a file's metadata lists."""
    try:
        names = json.loads(listed)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ModelError(f"metadata {PARAMETERS_KEY}", expected="a list of tensor names", got=shown(listed))
    missing = [n for n in names if n not in held]
    if missing:
        raise ModelError(f"metadata {PARAMETERS_KEY} names a tensor that isn't there", got=shown(missing[0]))
    return frozenset(names)


def export_torch(made: Any, *, input_shape: Sequence[int] | None = None, name: str = "module") -> bytes:
    """A torch module in evaluation mode as ONNX bytes, with all weights under their `state_dict` names.

    Args:
        made: The module, or a pair of the module and an example input (with a batch).
        input_shape: One sample's shape; else that of the example, else the module's attribute `input_shape`.
        name: What to call it in messages.

    Raises:
        ModelError: It can't be exported, or weights were lost on the way.
        MissingExtraError: torch or onnxscript is not installed.
    """
    torch = _torch()
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{name} made no model", expected="a torch module", got=type(module).__name__)
    shape = input_shape or (tuple(example.shape[1:]) if example is not None else None)
    shape = shape or getattr(module, "input_shape", None)
    if not shape:
        raise ModelError(
            f"{name}: the input shape is unknown",
            hint="Give the module an attribute input_shape (such as (3, 32, 32)), or fedprune-export --input-shape.",
        )
    modes = [(part, part.training) for part in module.modules()]
    device = next((p.device for p in module.parameters()), "cpu")
    module.eval()
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (torch.zeros((2, *map(int, shape)), device=device),),
                dynamo=True,
                optimize=False,
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                external_data=False,
                verbose=False,
            )
        proto: onnx.ModelProto = program.model_proto
    except Exception as error:
        raise ModelError(
            f"{name}: torch can't export it ({_reason(error)})",
            hint="Check that the module takes one tensor with a batch of any size and returns one tensor.",
        ) from error
    finally:
        for part, training in modes:
            part.training = training
    proto = onnx.load_model_from_string(proto.SerializeToString())
    trainable = [n for n, _ in module.named_parameters()]
    held = {t.name for t in proto.graph.initializer}
    lost = [n for n in trainable if n not in held]
    if lost:
        raise ModelError(
            f"{name}: weights were lost or fused in the export",
            expected=f"{len(trainable)} tensors",
            got=f"{len(trainable) - len(lost)} (without {', '.join(lost[:5])})",
            hint="Every parameter must be used by the forward pass in evaluation mode.",
        )
    norms = [
        f"{prefix}.{field}" if prefix else field
        for prefix, part in module.named_modules()
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        for field in ("running_mean", "running_var")
    ]
    norms = [n for n in norms if n in held]
    onnx.helper.set_model_props(proto, {PARAMETERS_KEY: json.dumps([*trainable, *norms])})
    proto.producer_version = ""
    del proto.graph.metadata_props[:]
    for node in proto.graph.node:  # stack traces and paths of the machine that exported it
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.initializer, *proto.graph.value_info):
        del value.metadata_props[:]
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def _is_factory(text: str) -> bool:
    module, colon, function = text.rpartition(":")
    return bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))


def _factory(text: str) -> Any:
    module_name, _, function = text.rpartition(":")
    _torch()
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does: the user's own modules lie in the current folder
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except ImportError as error:
        raise ModelError(
            f"can't import {module_name} ({_reason(error)})",
            hint="Run the command in the folder of the module, or install its package.",
        ) from error
    except AttributeError as error:
        raise ModelError(f"module {module_name} has no {function}") from error
    except Exception as error:
        raise ModelError(f"importing {module_name} failed ({type(error).__name__}: {_reason(error)})") from error
    try:
        return factory() if callable(factory) and not hasattr(factory, "state_dict") else factory
    except Exception as error:
        raise ModelError(f"{text} failed ({type(error).__name__}: {_reason(error)})") from error


def _read_file(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"can't read {path}: {error.strerror or error}",
            hint="Give an ONNX file, or a torch factory as package.module:factory.",
        ) from error
    try:
        proto = _parse(raw, whole=False)
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer):
            onnx.load_external_data_for_model(proto, str(path.parent))
            raw = proto.SerializeToString(deterministic=True)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except Exception as error:
        files = sorted({e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"})
        raise ModelError(
            f"{path}: its external data can't be read ({_reason(error)})",
            hint=f"Copy {', '.join(files)} of the same export beside it.",
        ) from error
    return raw


def _parse(raw: bytes, *, whole: bool = True) -> onnx.ModelProto:
    try:
        proto = onnx.load_model_from_string(raw)
        if not proto.ir_version or not proto.HasField("graph"):
            raise ValueError("it has no graph")
        if whole:
            onnx.checker.check_model(proto)
    except Exception as error:
        raise ModelError(
            f"this is not a whole ONNX model ({_reason(error)})",
            got=f"{len(raw)} bytes",
            hint="Export or copy the file again.",
        ) from error
    return proto


def _torch() -> Any:
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f"a torch module needs {error.name or 'torch'}, which is not installed", hint=_TORCH_HINT
        ) from error
    return torch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines, logs and deprecation warnings to itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
