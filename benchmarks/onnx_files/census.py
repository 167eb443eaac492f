"""What becomes of one file: imported, predictions compared, cut, trained, a step compared; or why not."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

import fedprune_export as fx
from benchmarks.onnx_files.shelf import Facts, Shelf, inputs_of
from fedprune.core.errors import FedpruneError
from fedprune.model.recipe import Recipe
from fedprune.model.step_contract import LOSS, Y, next_name
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file, with_weights
from fedprune_export.checks.parity import random_labels, step_feeds
from fedprune_export.importing.quantised.proof import without_saturation
from fedprune_export.ir.graph import Graph

Array = npt.NDArray[Any]
Record = dict[str, Any]

LEARNING_RATE = 0.05
BOARD, DENSITY = "raspberry-pi-4b", 0.5

# Largest differences of predictions, relative to the largest of onnxruntime's: files of lower precision round each
# layer's values to 11 bits, or to 256 steps.
MAX_ERRORS = {"float32": 1e-5, "float16": 5e-3, "int8": 5e-2}
# Of how far a step moves predictions or weights: it is computed in float32, torch's in float64.
MAX_STEP_ERROR = 1e-3

# The model's outputs as the loss takes them, and as a file that ends in probabilities gives them.
_ENDS: dict[str, Callable[[Array], Array]] = {
    "": lambda y: y,
    "softmax": lambda y: np.exp(_log_softmax(y)),
    "log-softmax": lambda y: _log_softmax(y),
    "sigmoid": lambda y: 1 / (1 + np.exp(-np.clip(y, -80, 80))),
}


def _log_softmax(y: Array) -> Array:
    y = y - y.max(1, keepdims=True)
    logits: Array = y - np.log(np.exp(y).sum(1, keepdims=True))
    return logits


def squares(*tensors: Any) -> Any:
    """A loss of several outputs (and labels [n], which it ignores): their mean squares."""
    *outputs, labels = tensors
    return sum(o.square().flatten(1).mean(1) for o in outputs) + 0 * labels


squares.target_shape = ()  # type: ignore[attr-defined]
squares.target_dtype = "int64"  # type: ignore[attr-defined]


def judge(folder: Path, name: str) -> Record:
    """The record of a file; `verdict` is the last that it passed: wrong, refused, imported, cut or trained."""
    logging.disable(logging.WARNING)
    shelf = Shelf(folder)
    facts = shelf.facts(name)
    record: Record = {"kind": facts.kind, "exporter": facts.exporter, "verdict": "refused", **_file_facts(folder, name)}
    try:
        _examine(folder / f"{name}.onnx", facts, shelf.arrays(name), record)
    except FedpruneError as error:
        # A refusal has to say what to do.
        record |= {"error": str(error).removeprefix(f"{folder / name}.onnx: "), "way_out": _has_hint(error)}
    except Exception as error:  # noqa: BLE001 (whatever isn't a FedpruneError is a crash)
        record |= {"error": f"{type(error).__name__}: {error}", "verdict": "crashed"}
    record["said"] = _summary(record.get("notes", []))
    record["as_expected"] = record["verdict"] == ("refused" if facts.refused else "trained")
    return record


def _has_hint(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says what to do."""
    return error is not None and (bool(getattr(error, "hint", "")) or _has_hint(error.__cause__))


def _summary(notes: list[str]) -> str:
    """Notes in short, for a table: each one's first sentence, long lists cut off."""
    heads = [note.partition(". ")[0].replace("|", "/").rstrip(".") for note in notes]
    counts = Counter(head if len(head) < 90 else head[:80].rsplit(" ", 1)[0] + " …" for head in heads)
    return "; ".join(list(counts)[:4]) + (f"; {len(counts) - 4} more" if len(counts) > 4 else "")


def _file_facts(folder: Path, name: str) -> Record:
    proto = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    return {
        "opset": opset,
        "nodes": len(proto.graph.node),
        "size": (folder / f"{name}.onnx").stat().st_size,
        "draws": any(n.op_type.startswith("Random") or n.op_type == "Bernoulli" for n in proto.graph.node),
    }


def _examine(path: Path, facts: Facts, arrays: Mapping[str, Array], record: Record) -> None:
    own = facts.loss == "own"
    choices = {"loss": squares if own else facts.loss, **facts.choices}
    recipe = Recipe(loss="custom" if own else facts.loss, lr=LEARNING_RATE, momentum=0.0, batch_size=4)
    inputs = inputs_of(arrays)
    model = fx.load(path, **choices)
    record |= {"verdict": "imported", "notes": list(model.notes), "groups": len(model.groups)}
    x = packed(model, inputs)
    error = 0.0
    # Torch and boards draw other numbers.
    if not record["draws"]:
        error, end = prediction_error(model, x, raw_outputs(path, facts, inputs))
        record |= {"prediction_error": error, "end": end}
    if not error <= MAX_ERRORS[facts.rounding]:
        record |= {"verdict": "wrong", "error": f"predictions differ from onnxruntime's by {error:.2g}"}
        return
    plan = fx.plan(model, BOARD, recipe=recipe, density=DENSITY)
    fx.training_step(model, recipe.features)
    with tempfile.TemporaryDirectory() as bundle:
        report = fx.export(model, plan, Path(bundle) / "bundle")
    sizes = report.to_dict()
    kept = sizes["after"]["parameters"] / sizes["before"]["parameters"]
    record |= {"verdict": "trained", "parity": report.parity, "kept": kept}
    record |= {} if record["draws"] else step_errors(model, recipe, x, arrays)
    errors = [record[key] for key in ("step_error", "graph_step_error") if record.get(key) is not None]
    # Negated, so that an error that is not a number counts.
    if not max(errors, default=0.0) <= MAX_STEP_ERROR:
        record |= {"verdict": "wrong", "error": f"a step differs from torch's by {max(errors):.2g}"}


def packed(model: Any, inputs: Mapping[str, Array]) -> Array:
    """Samples as the model takes them: several inputs are a row, in the order of their names."""
    kind = model.graph.inputs[0].dtype
    if len(inputs) == 1:
        return next(iter(inputs.values())).astype(kind)
    rows = [inputs[name].reshape(len(inputs[name]), -1).astype(kind) for name in sorted(inputs)]
    return np.concatenate(rows, 1)


def raw_outputs(path: Path, facts: Facts, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime computes from the file as it is, in batches of the file's size."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    file: Any = path
    if facts.rounding == "int8":  # processors without VNNI would saturate
        file = without_saturation(Graph.from_proto(onnx.load(path))).to_unlowered_proto().SerializeToString()
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    count = len(next(iter(inputs.values())))
    # Of a free batch two sizes, so that samples would show that they depend on each other.
    bounds = [0, 2, count] if not facts.batch else [*range(0, count, facts.batch), count]
    names, batches = [o.name for o in session.get_outputs()], []
    for first, last in pairwise(bounds):
        rows = np.arange(first, first + (facts.batch or last - first)) % count
        feeds = {n: np.moveaxis(v[rows], 0, facts.axes.get(n, 0)) for n, v in inputs.items()}
        batches.append(session.run(names, {n: np.ascontiguousarray(v) for n, v in feeds.items()}))
    outputs = {}
    for i, name in enumerate(names):
        parts = [b[i] for b in batches]
        if isinstance(parts[0], np.ndarray):
            axis = facts.axes.get(name, 0)
            if facts.batch == 1 and parts[0].shape[axis : axis + 1] != (1,):  # without the batch of 1
                parts = [np.expand_dims(part, axis) for part in parts]
            outputs[name] = np.moveaxis(np.concatenate(parts, axis), axis, 0)[:count]
        elif isinstance(parts[0], list) and isinstance(parts[0][0], dict):  # ZipMap's
            outputs[name] = np.array([[row[k] for k in sorted(row)] for part in parts for row in part])[:count]
    return outputs


def prediction_error(model: Any, x: Array, expected: Mapping[str, Array]) -> tuple[float, str]:
    """The distance of predictions from onnxruntime's, and what makes the file's numbers of the logits."""
    session = OnnxSession(onnx_file(model.graph, [t.name for t in model.architecture.tensors], "census"))
    outputs = session.run({"x": x})
    worst, used = 0.0, ""
    for name, value in expected.items():
        own_name = "logits_" if name == "logits" else name
        if own_name in outputs:
            worst = max(worst, distance(outputs[own_name], value))
            continue
        rows = outputs["logits"]
        candidates = {end: distance(make(rows), value) for end, make in _ENDS.items()}
        if len(expected) > 1:
            candidates = {"": _nearest_columns(rows, value, expected)}
        end = min(candidates, key=lambda key: candidates[key])
        worst, used = max(worst, candidates[end]), used or end
    return worst, used


def _nearest_columns(rows: Array, value: Array, expected: Mapping[str, Array]) -> float:
    """The distance of one of several outputs, which stand in one row in their order; or which is the only one."""
    flat = rows.reshape(len(rows), -1)
    first = 0
    for other in expected.values():
        size = int(np.prod(other.shape[1:]))
        if other is value and flat.shape[1] >= first + size:
            return min(distance(flat[:, first : first + size].reshape(value.shape), value), distance(rows, value))
        first += size
    return distance(rows, value)


def distance(values: Array, expected: Array) -> float:
    """The largest difference, relative to the largest number expected; of whole numbers the share that differs."""
    if values.size != expected.size:
        return float("inf")
    values = values.reshape(expected.shape)
    if expected.dtype.kind not in "f":
        return float(np.mean(values != expected))
    scale = max(float(np.abs(expected).max(initial=0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(values.astype(np.float64) - expected.astype(np.float64)).max(initial=0)) / scale


def step_errors(model: Any, recipe: Any, x: Array, arrays: Mapping[str, Array]) -> Record:
    """How far a step is from torch's: of the net where torch has it, and of the graph, differentiated by torch."""
    session = OnnxSession(fx.training_step(model, recipe.features).to_bytes(), training=True)
    classes = model.architecture.classes
    y = arrays.get("y")
    if y is None:
        y = random_labels(recipe, len(x), classes, session.inputs[Y])
    else:
        y = y.astype(np.int64 if session.inputs[Y][0] == "tensor(int64)" else np.float32)
        y = y.reshape(len(x), *session.inputs[Y][1][1:])
    outputs = session.run(step_feeds(session, recipe, model.tensors, x, y, classes))
    tensors = {name: outputs.get(next_name(name), value) for name, value in model.tensors.items()}
    record: Record = {"loss": float(outputs[LOSS])}
    if "after" in arrays:
        graphs = [model.graph, with_weights(model, tensors, "a step").graph]
        before, after = (_logits(graph, x).reshape(len(x), -1) for graph in graphs)
        moved = arrays["after"] - arrays["before"]
        record["step_error"] = distance(after.astype(np.float64) - before, moved) if moved.size == after.size else None
    record["graph_step_error"] = _graph_step_error(model, recipe, x, y, tensors)
    return record


def _logits(graph: Any, x: Array) -> Array:
    logits: Array = OnnxSession(graph.to_bytes()).run({"x": x})["logits"]
    return logits


def _graph_step_error(model: Any, recipe: Any, x: Array, y: Array, tensors: Mapping[str, Array]) -> float | None:
    """The largest difference of a step's weights from torch's, over the largest move; None where the oracle lacks an
    operator or the loss is the model's own."""
    import torch

    from benchmarks.onnx_files.make_torch import loss_of
    from fedprune_export.ir.dropout import remove_dropouts
    from support.oracles.torch_graph import run

    if recipe.loss == "custom":
        return None
    graph = model.graph.copy()
    remove_dropouts(graph)
    weights = {n: torch.from_numpy(np.array(v)).double() for n, v in model.tensors.items()}
    trained = {t.name: weights[t.name].requires_grad_() for t in model.architecture.trainable}
    trained = {n: v for n, v in trained.items() if n not in model.frozen}
    try:
        outputs = run(graph, weights, torch.from_numpy(x), training=True)
    except NotImplementedError:
        return None
    loss_of(outputs, torch.from_numpy(y), recipe.loss).backward()
    moves = {n: -LEARNING_RATE * v.grad.numpy() for n, v in trained.items() if v.grad is not None}
    scale = max(float(np.abs(m).max()) for m in moves.values())
    errors = [np.abs(tensors[n].astype(np.float64) - model.tensors[n] - m).max() for n, m in moves.items()]
    return float(max(errors)) / scale
