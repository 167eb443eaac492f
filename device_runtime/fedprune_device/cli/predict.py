"""`fedprune-device predict`: with the serving model of a board, or with a bundle."""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.cli import options_of, print_json
from fedprune.core.disk import path_exists, storage_errors
from fedprune.core.errors import BundleError, DataError, StorageError, UsageError, search_location
from fedprune.model.features import JUDGED_LABELS, labels_of
from fedprune.model.lengths import Lengths, Shape, fits_shape, free_axis, pad_to_bound, upper_shape
from fedprune.model.recipe import Recipe
from fedprune.model.scaling import BOARD
from fedprune.model.step_contract import LOGITS
from fedprune.runtime.bundle import Bundle, open_bundle
from fedprune.runtime.precision_files import graph_file
from fedprune_device.cli.column_names import name_columns
from fedprune_device.data.array_assembly import read_channels
from fedprune_device.data.array_source import load_data, number_classes, read_arrays
from fedprune_device.data.dataset import Channels
from fedprune_device.data.folder_layout import layout_of
from fedprune_device.data.labels import LogitAdjustment, Targets
from fedprune_device.data.layouts import IGNORED_CLASS, Unlabelled
from fedprune_device.data.sample_checks import checked_inputs, checked_samples
from fedprune_device.data.scaling import Scaling, scaling_of
from fedprune_device.data.sequences import LENGTHS
from fedprune_device.data.sources import SampleOptions, is_sample_folder
from fedprune_device.data.stored_array import Inputs
from fedprune_device.data.table_windows import is_table
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.serving.prediction_text import (
    MapSummary,
    file_output_rows,
    forecast_names,
    map_summary,
    position_rows,
    prediction_lines,
    quality_text,
    ranked_outputs,
    targets_of,
)
from fedprune_device.serving.predictor import Predictor
from fedprune_device.storage.directory_owner import OWNER_FILE

_MAX_PRINTED_NUMBERS = 10  # of an output of the model's own file, in the line of a sample
_MAX_NAMED_FOLDERS = 10  # folders of boards that an error names


@name_columns()
def predict(arguments: argparse.Namespace) -> None:
    adjustment, scaling = LogitAdjustment(), Scaling()
    recipe = Recipe()
    class_names: tuple[str, ...] = arguments.class_names
    if arguments.bundle is not None:
        bundle = open_bundle(arguments.bundle)
        predictor = Predictor(_graph_path(bundle, arguments.precision), threads=arguments.threads)
        class_names, recipe = class_names or bundle.class_names, bundle.recipe
        loss = recipe.loss
        if recipe.scaling == (BOARD,):
            raise UsageError(
                "--bundle with recipe.scaling 'board'",
                expected="a scale",
                got="the mean and deviation of a board, which the bundle lacks",
                hint="Give the board's own --state, or the bundle that `fedprune-device train` wrote.",
            )
        if arguments.data is not None:
            if loss != "cross_entropy":
                raise UsageError(f"--data with a model of loss {loss!r}", expected="one that predicts one class")
            classes = bundle.architecture.classes
            labels = load_data(arguments.data, class_names=class_names).y_train
            adjustment = LogitAdjustment.of(labels, replace(bundle.recipe, logit_adjustment=True), classes)
    elif arguments.precision is not None:
        raise UsageError(
            "--precision", expected="with --bundle", hint="A board's own precision is set by `run --serve`."
        )
    else:
        predictor, record = _open_slots(arguments.state).open(arguments.threads)
        adjustment, scaling, loss = record.adjustment, record.scaling, record.loss
    shape, targets = predictor.input_shape, None
    has_scores = labels_of(loss) in (*JUDGED_LABELS, "values")
    if _has_files(arguments.input) and has_scores and all(isinstance(size, int) for size in upper_shape(shape)):
        # A batch without samples shows the shape of the outputs, and so of the labels, at no cost.
        empty = np.zeros(
            (0, *(size for size in upper_shape(shape) if isinstance(size, int))), predictor.input_type.dtype
        )
        targets = targets_of(predictor.predict(empty), loss, IGNORED_CLASS if loss == "cross_entropy" else None)
    samples = _read_samples(arguments, predictor, class_names, targets)
    if samples.name:
        print(f"{samples.name} of {arguments.input}", file=sys.stderr)
    if recipe.scaling:
        outputs = predictor.predict(samples.x[:0])  # for their shape
        scaling = scaling_of(samples.x, outputs, recipe, samples.channels)
    logits = scaling.invert(adjustment(predictor.predict(scaling(samples.x))))
    names = class_names or forecast_names(logits, loss, samples.channels)
    file_outputs = predictor.file_outputs(logits)
    if arguments.output is not None:
        _write_outputs(arguments.output, logits, file_outputs)
    own_rows = file_output_rows(file_outputs, len(logits))
    if arguments.json:
        rows = _prediction_rows(logits, loss, arguments, names)
        print_json(
            [
                {**row, "file_outputs": {name: _json_value(value) for name, value in own.items()}} if own else row
                for row, own in zip(rows, own_rows, strict=True)
            ]
        )
    elif arguments.output is None:
        for line, own in zip(prediction_lines(logits, loss, arguments.top, names), own_rows, strict=True):
            print("; ".join([line, *(f"{name} {_short_text(value)}" for name, value in own.items())]))
    if samples.y is not None and len(samples.y) and has_scores:
        print(quality_text(logits, samples.y, loss), file=sys.stderr)


def _prediction_rows(
    logits: npt.NDArray[np.float32], loss: str, arguments: argparse.Namespace, names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """A row per sample, with the outputs of the text: of outputs per position a summary, `--output` writes them."""

    def name_of(number: int) -> str | int:
        return names[number] if number < len(names) else number

    if logits.ndim > 2:
        shape = {"positions": logits.shape[2:]}
        return [
            {"sample": i, "outputs": map_summary(logits[i]).to_dict()}
            if counts is None
            else {"sample": i, **shape, "outputs": [{"class": name_of(c), "count": n} for c, n in counts.items()]}
            for i, counts in enumerate(position_rows(logits, loss, arguments.top))
        ]
    name_key, value_key = ("class", "score") if labels_of(loss) in JUDGED_LABELS else ("output", "value")
    return [
        {"sample": i, "outputs": [{name_key: name_of(c), value_key: v} for c, v in row.items()]}
        for i, row in enumerate(ranked_outputs(logits, loss, arguments.top))
    ]


def _short_text(value: object) -> str:
    """A number, text or row as JSON with few digits; of a long row or a map only how large it is."""
    if isinstance(value, MapSummary):
        return f"{' x '.join(map(str, value.shape))} (--output FILE.npz writes it)"
    if isinstance(value, list) and len(value) > _MAX_PRINTED_NUMBERS:
        return f"[{len(value)} numbers]"
    if isinstance(value, list):
        return f"[{', '.join(map(_short_text, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _json_value(value: object) -> object:
    return value.to_dict() if isinstance(value, MapSummary) else value


def _write_outputs(path: Path, logits: npt.NDArray[np.float32], file_outputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write the logits as .npy or, with the outputs of the user's own file, as .npz."""
    if path.suffix != ".npz":
        with path.open("wb") as file:
            np.save(file, logits)
        return
    # Not np.savez: it takes names of arrays as arguments, among which a file's output may be called like its own.
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in {**file_outputs, LOGITS: logits}.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, value, allow_pickle=False)


def _graph_path(bundle: Bundle, precision: str | None) -> Path:
    if precision is None:
        return bundle.folder
    if precision not in bundle.precisions:
        raise BundleError(
            f"{bundle.folder} has no {precision}",
            expected=", ".join(bundle.precisions) or "float32 alone",
            hint=f"Export it with --precision {precision}.",
        )
    return bundle.path(graph_file(precision))


def _open_slots(state: Path) -> ModelSlots:
    pointer = state / "serving" / "serving.json"
    with storage_errors(f"can't read {pointer}"):
        if not state.is_dir():
            raise StorageError(
                f"there is no folder {state}",
                hint=f"Give the folder that `fedprune-device run --state` uses.{search_location(state)}",
            )
        # Opened only to report an unreadable folder as such, and not as one without a model.
        if pointer.is_file():
            pointer.open("rb").close()
        elif state_folders := sorted(p.parent.name for p in state.glob(f"*/{OWNER_FILE}")):
            raise StorageError(
                f"{state} isn't a board's state folder",
                expected=f"one of those in it: {', '.join(state_folders[:_MAX_NAMED_FOLDERS])}",
            )
    return ModelSlots(state / "serving")


@dataclass(frozen=True, eq=False)
class _InputSamples:
    x: Inputs
    y: npt.NDArray[Any] | None
    name: str = ""
    lengths: Inputs | None = None
    channels: Channels | None = None


def _has_files(path: Path) -> bool:
    """Whether a board reads a path as files or a table, not as arrays."""
    return is_sample_folder(path) or is_table(path)


def _read_samples(
    arguments: argparse.Namespace, predictor: Predictor, class_names: tuple[str, ...], targets: Targets | None = None
) -> _InputSamples:
    """The samples of any source that a board can train on, or of arrays without labels."""
    shape, input_type = predictor.input_shape, predictor.input_type
    source, split = str(arguments.input), arguments.split
    if not _has_files(arguments.input) and (path_exists(arguments.input, file=True) or ":" not in source):
        arrays = number_classes(read_arrays(arguments.input, single=True), class_names, source)
        samples = _arrays_of_split(arrays, split)
        if samples is not None:
            return _pad_samples(_check_samples(samples, source), shape)
        if "y" not in arrays and "y_train" not in arrays:
            raise DataError(f"{source}: no {split or ''} samples", expected="x", got=", ".join(arrays) or "nothing")
    options = options_of(SampleOptions, arguments, data=source)
    layout = layout_of(arguments.input, class_names) if split is None and is_sample_folder(arguments.input) else None
    if isinstance(layout, Unlabelled) and not layout.splits:
        unsplit = replace(options, test_share=0.0, validation_share=0.0)
        data = unsplit.fixed(class_names).snapshot(shape, targets, input_type)
        return _InputSamples(data.x_train, None, channels=data.channels)
    data = options.fixed(class_names).snapshot(shape, targets, input_type)
    split = split or ("test" if len(data.y_test) else "train")
    x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
    if not len(y):
        raise DataError(f"{source}: no {split} samples")
    labels = None if y is x else np.asarray(y)
    return _InputSamples(x, labels, f"the {split} samples", channels=data.channels)


def _arrays_of_split(arrays: Mapping[str, Inputs], split: str | None) -> _InputSamples | None:
    """The arrays of a split: by default test samples, or all if none are for testing; None without the split."""
    names = {"x_test": "y_test", "x": "y", "x_train": "y_train", "x_val": "y_val"}
    candidates = names if split is None else [f"x_{split}"]
    if split == "train" and "x_test" in arrays:
        candidates = ["x_train", "x"]  # a file with test samples of its own trains on all of x
    chosen_name = next((n for n in candidates if n in arrays), None)
    if chosen_name is None:
        return None
    y = None if names[chosen_name] not in arrays else np.asarray(arrays[names[chosen_name]])
    return _InputSamples(
        arrays[chosen_name],
        y,
        "" if chosen_name == "x" else chosen_name,
        arrays.get(chosen_name.replace("x", LENGTHS, 1)),
        read_channels(dict(arrays), arrays[chosen_name], arrays.get(names[chosen_name])),
    )


def _check_samples(samples: _InputSamples, source: str) -> _InputSamples:
    if not samples.x.shape or not len(samples.x):
        raise DataError(f"{source} holds no samples", expected="inputs [n, ...]", got=samples.x.shape)
    try:
        if samples.y is None:
            return replace(samples, x=checked_inputs(samples.x))
        x, y = checked_samples(samples.x, samples.y)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return replace(samples, x=x, y=np.asarray(y))


def _pad_samples(samples: _InputSamples, shape: Shape) -> _InputSamples:
    """Pad samples, and ignore the labels of padded positions."""
    axis = free_axis(shape)
    if samples.lengths is None or axis is None:
        return samples
    x, y, lengths = np.asarray(samples.x), samples.y, np.asarray(samples.lengths)
    padded_length = x.shape[axis + 1] if fits_shape(x.shape[1:], shape) else 0
    min_length = next(size.lower for size in shape if isinstance(size, Lengths))
    x = pad_to_bound(x, (*shape[:axis], Lengths(min_length, padded_length), *shape[axis + 1 :]), lengths)
    if y is not None and y.dtype.kind == "i" and y.shape == (len(x), padded_length):
        y = np.where(np.arange(padded_length) < lengths[:, None], y, -1)
    return replace(samples, x=x, y=y)
