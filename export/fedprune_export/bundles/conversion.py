"""Converts models for other programs: to a torch state dict, or to one ONNX file with the weights inside."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_digest
from fedprune.core.errors import BundleError, MissingExtraError, ModelError, StorageError, error_reason
from fedprune.core.text import first_few, quantity
from fedprune.model.architecture import TensorKind
from fedprune.model.step_contract import LOGITS, RANDOM_METADATA, X
from fedprune.runtime.bundle import INFERENCE, TRAINING, WEIGHTS, Bundle, open_bundle
from fedprune.runtime.onnx_subgraph import metadata_of
from fedprune.runtime.prediction_head import PredictionHead
from fedprune.strategies.importance.scoring import Ranks
from fedprune_export.bundles.inference import check_origin, inference_graph
from fedprune_export.checks.parity import PARITY_SAMPLES, compare_with_graph, rerun, run_model
from fedprune_export.importing import import_onnx, metadata
from fedprune_export.importing.hub_folder import BATCH_COUNTER
from fedprune_export.importing.metadata import PARAMETERS_KEY, original_names, tied_names
from fedprune_export.importing.packing import INPUTS_KEY, Piece, read_packing, row_splitter
from fedprune_export.importing.prediction_head import attach_head, own_outputs
from fedprune_export.importing.torch_export import sample_inputs
from fedprune_export.ir.drafts import NORMAL_OPSET
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.rounding import check_outputs
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.pruning.model import RANKS_KEY, Model

Array = npt.NDArray[Any]

_ORIGIN = "the model that it was made of"

# In a board's state folder: the file that names its active model, and the folders that models take turns in.
_POINTER = "serving/serving.json"
_SLOTS = ("a", "b")


@dataclass(frozen=True)
class ConversionSource:
    """A model to convert. `tensors`: its weights and statistics by name, in their order."""

    graph: Graph
    tensors: Mapping[str, Array]
    title: str
    bundle: Bundle | None = None
    is_whole: bool = False


def read_folder(folder: str | Path) -> ConversionSource:
    """The submodel of a bundle, or the newest intact model that a board serves, which may be running.

    Raises `BundleError` if the folder is neither a bundle nor a board's state folder, or it is damaged, and
    `StorageError` if a board's has no such model.
    """
    bundle = None
    if (Path(folder) / _POINTER).is_file():
        folder, title = _served_model(Path(folder))
    else:
        bundle = open_bundle(folder)
        folder, title = bundle.folder, "the bundle's model"
    return ConversionSource(inference_graph(folder), tensorfile.load_tensors(folder / WEIGHTS), title, bundle)


def _served_model(state: Path) -> tuple[Path, str]:
    """The folder of a board's newest model whose files are intact, and a text that names its origin."""
    pointer = state / _POINTER
    try:
        rows = json.loads(json.loads(pointer.read_bytes())["body"])["models"]
        for row in rows:
            folder = pointer.parent / str(row["slot"])
            title = f"the board's model after round {int(row['round'])} of job {row['job']}"
            # Only the board's own two slots: the file is input, and must not lead elsewhere on the disk.
            if row["slot"] in _SLOTS and _is_intact(folder, row["files"]):
                return folder, title
    except OSError as error:
        raise StorageError(f"can't read {pointer}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{pointer} is damaged ({type(error).__name__}: {error})") from error
    raise StorageError(f"{state} has no model that is intact", hint="Let the board finish another round first.")


def _is_intact(folder: Path, files: dict[str, str]) -> bool:
    try:
        return all(file_digest(folder / name) == files[name] for name in (INFERENCE, WEIGHTS))
    except OSError:
        return False


def full_model_source(model: Model, weights: Path | None = None) -> ConversionSource:
    """A whole model, with the weights of a file if one is given. Raises `BundleError` if they are not the model's."""
    if weights is not None:
        model = with_weights(model, tensorfile.load_tensors(weights), str(weights))
    return ConversionSource(model.graph, model.tensors, "the whole model", is_whole=True)


def with_weights(model: Model, tensors: Mapping[str, Array], where: str, ranks: Ranks | None = None) -> Model:
    """A model with other weights, such as the server's global ones.

    Further tensors, such as torch's counters, are left out. `ranks` are recorded in the model instead of those of its
    old weights. Raises `BundleError` if the tensors are not the model's.
    """
    for spec in model.architecture.tensors:
        value = tensors.get(spec.name)
        if value is None or value.shape != spec.shape or value.dtype != np.float32:
            raise BundleError(
                f"{where} holds no weights of {model.architecture.name}: tensor {spec.name}",
                expected=f"float32 {spec.shape}",
                got="nothing" if value is None else f"{value.dtype} {value.shape}",
                hint="A submodel's weights are in its bundle: give that instead.",
            )
    graph = model.graph.copy()
    graph.initializers.update({t.name: tensors[t.name] for t in model.architecture.tensors})
    graph.metadata.pop(RANKS_KEY, None)
    if ranks is not None:
        graph.metadata[RANKS_KEY] = metadata.ranks_text(model.architecture, ranks)
    return replace(model, graph=graph, ranks=ranks)


def onnx_file(graph: Graph, names: Iterable[str], name: str, opset: int | None = None) -> bytes:
    """A model as one ONNX file with its weights inside, which can be imported again. Outputs of its prediction head
    follow the logits.

    `opset` is by default the graph's own, or one that every supported onnxruntime loads. Raises `ModelError` if the
    graph can't be written at that opset.
    """
    # A graph at another opset is imported again: importing translates its operators to the forms that can be lowered.
    written = graph
    if opset not in (None, graph.opset) and graph.opset != NORMAL_OPSET:
        written = import_onnx(graph.to_bytes(), name).graph
    proto = written.to_proto(opset=opset)
    properties = {p.key: p.value for p in proto.metadata_props}
    properties[PARAMETERS_KEY] = json.dumps(list(names))
    attach_head(proto, properties)
    onnx.helper.set_model_props(proto, properties)
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def scatter_bundle(bundle: Bundle, model: Model, *, keep: bool = False) -> dict[str, Array]:
    """Scatter the tensors of a bundle into those of the whole model.

    With `keep` the model's own weights stay in the channels that the bundle lacks. Otherwise these weights are 0, so
    that the channels add nothing; statistics stay in any case. Raises `BundleError` if the bundle is not the model's.
    """
    check_origin(bundle, model)
    statistics = {t.name for t in model.architecture.tensors if t.kind in (TensorKind.STAT_MEAN, TensorKind.STAT_VAR)}
    targets = {n: v if keep or n in statistics else np.zeros_like(v) for n, v in model.tensors.items()}
    return dict(bundle.selection.scatter(tensorfile.load_tensors(bundle.path(WEIGHTS)), targets))


def state_dict(tensors: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    """Tensors as a torch module's state dict has them: with the counters of its batch norms, and all names of each.

    Raises `ModelError` if it is damaged. `graph`: a graph of the model, which says what other names tensors have.
    """
    state: dict[str, Array] = {}
    aliases, names = tied_names(graph.metadata), original_names(graph.metadata)
    for name, value in tensors.items():
        state |= dict.fromkeys((names.get(name, name), *aliases.get(name, ())), value)
        norm = name.removesuffix("running_var")
        if norm != name and f"{norm}running_mean" in tensors:
            # torch's strict loading wants the counters of batch norms, though no inference reads them.
            state[norm + BATCH_COUNTER] = np.zeros((), np.int64)
    return state


def agreement_text(error: float) -> str:
    """A text that says how close a file's outputs are to those of its source."""
    return f"its outputs equal the source's {f'to within {error:.1e}' if error else 'exactly'}"


def ports_text(graph: Graph) -> str:
    """A text that says what the ports of an ONNX file are called, if it has outputs of the user's own file, too."""
    outputs = own_outputs(graph.metadata)
    return f"; its input is {X}, its outputs are {LOGITS} and the file's own: {first_few(outputs)}" if outputs else ""


def lost_draws_note(bundle: Bundle) -> str:
    """A sentence on the dropouts and random numbers that a bundle trains with: its submodel has none. Empty without."""
    draws = json.loads(metadata_of(bundle.path(TRAINING).read_bytes()).get(RANDOM_METADATA, "{}"))
    if not draws:
        return ""
    return (
        f"The file lacks {quantity(len(draws), 'random draw')} (dropouts, noise) of the bundle's training step: "
        "imported again, it trains without. to-onnx of the whole model keeps them."
    )


def check_onnx_parity(raw: bytes, graph: Graph) -> float:
    """The distance of an ONNX file's outputs from a graph's, on random samples.

    Raises `ModelError` if they are too far from it, or onnxruntime doesn't load the file.
    """
    x = sample_feeds(graph, PARITY_SAMPLES)[X]
    return compare_with_graph(run_model(raw, x), graph, x, "the ONNX file", _ORIGIN).value


def check_state_parity(
    state: Mapping[str, Array], graph: Graph, reference: Graph, module: Any = None, hint: str = ""
) -> float:
    """The distance of the outputs of a model with a state dict's tensors from a reference's, on random samples.

    `module` is the same model in torch, which loads the state dict, too. Raises `ModelError` if outputs differ too
    much, or the module doesn't load the state dict.
    """
    x, pieces = sample_feeds(reference, PARITY_SAMPLES)[X], read_packing(graph.metadata, INPUTS_KEY)
    if pieces:  # some inputs may index a table, and torch refuses negative indices: only 0 and 1
        x = np.abs(x) % 2
    filled, names = graph.copy(), original_names(graph.metadata)
    filled.initializers.update({n: state[names.get(n, n)] for n in graph.initializers if names.get(n, n) in state})
    outputs = run_model(filled.to_bytes(), x)
    error = compare_with_graph(outputs, reference, x, "the model with this state dict", _ORIGIN, hint).value
    if module is None:
        return error
    module_outputs = _module_outputs(module, state, graph, pieces, x)
    hint = hint or (
        "If it draws numbers that are in no state dict, such as buffers with persistent=False, let it draw the same "
        "ones each time, or make them persistent. Otherwise please report this with the model."
    )
    # A module ends where its user's file does, and its classes are where they are there.
    head, raw = PredictionHead.of(graph.metadata), reference.to_bytes()

    def run(model: bytes, x: Array) -> Array:
        logits = run_model(model, x)
        return _rows([logits] if head is None else head.outputs(logits).values())

    subject = f"a new torch module with it computes something else than {_ORIGIN}"
    return max(error, check_outputs(module_outputs, run(raw, x), rerun(run, raw, x), subject, hint).value)


def _module_outputs(module: Any, state: Mapping[str, Array], graph: Graph, pieces: Sequence[Piece], x: Array) -> Array:
    """Outputs of a torch module with a state dict, a row per sample; buffers that the state dict lacks stay as they
    are. `pieces`: its inputs, if it has several."""
    torch = _torch()
    try:
        # Not strict: buffers that don't count, such as a table of positions, may be missing; the check below is ours.
        missed, unknown = module.load_state_dict(_torch_tensors(state), strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise ModelError(f"the torch module doesn't load the state dict ({error_reason(error)})") from error
    parameters = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    lacking = sorted(n for n in missed if n in parameters - {*metadata.unused_parameters(graph.metadata)})
    if lacking or unknown:
        raise ModelError(
            "the state dict is not the torch module's",
            expected=f"a tensor {lacking[0]}" if lacking else "no other tensors",
            got="none" if lacking else f"a tensor {unknown[0]}",
        )
    module.eval()
    arguments = [torch.from_numpy(x)]
    if pieces:
        samples, _ = sample_inputs(module, None, None, False, "the torch module")
        chunks = dict(zip(sorted(module.input_shape), row_splitter(pieces)(*arguments), strict=True))
        arguments = [chunks[name].to(s.dtype) for name, s in zip(module.input_shape, samples, strict=True)]
    with torch.no_grad():
        outputs = module(*arguments)
    return _rows([o.numpy() for o in ((outputs,) if isinstance(outputs, torch.Tensor) else outputs)])


def _rows(values: Iterable[Array]) -> Array:
    return np.concatenate([value.reshape(len(value), -1) for value in values], 1)


def write_state_dict(path: Path, state: Mapping[str, Array]) -> int:
    """Write a state dict; returns the file's size.

    A file that isn't named `.safetensors` is for `torch.load(..., weights_only=True)`. Raises `MissingExtraError` if
    torch is needed and not installed, `StorageError` if the disk fails.
    """
    if path.suffix == ".safetensors":
        raw = tensorfile.encode(state)
    else:
        buffer = io.BytesIO()
        _torch().save(_torch_tensors(state), buffer)
        raw = buffer.getvalue()
    write_atomically(path, raw)
    return len(raw)


def _torch_tensors(state: Mapping[str, Array]) -> dict[str, Any]:
    # Copies, since torch warns of read-only arrays, such as those of a mapped file.
    return {n: _torch().from_numpy(np.array(v)) for n, v in state.items()}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "a .pt file needs torch, which is not installed", hint="Write a .safetensors file, or", extra="torch"
        ) from error
    return torch
