"""`fedprune-device predict`: with the serving model of a board, or with a bundle."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.archive_limits import check_members
from fedprune.bundle import Bundle, open_bundle
from fedprune.cli import whole_number
from fedprune.disk import storage_errors
from fedprune.errors import BundleError, DataError, ExitCode, StorageError, UsageError, remedy
from fedprune.precision import PRECISIONS, graph_file
from fedprune_device.data import checked_inputs, checked_samples, load_data, why_unreadable
from fedprune_device.labels import targets
from fedprune_device.own_labels import OwnLabels
from fedprune_device.predictions import described, judged
from fedprune_device.predictor import Predictor
from fedprune_device.slots import Slots


def add_predict_command(commands: Any) -> None:
    """Add `predict`."""
    predict = commands.add_parser("predict", help="predict with the serving model, also while the agent runs")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--state", type=Path, metavar="DIR", help="the serving model of a running or stopped agent")
    source.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of fedprune-export")
    predict.add_argument("--input", type=Path, required=True, metavar="FILE", help=".npy, or .npz with x (and y)")
    out = predict.add_mutually_exclusive_group()
    out.add_argument("--output", type=Path, metavar="FILE", help="write the logits to this .npy file")
    out.add_argument("--top", type=whole_number, default=1, metavar="K", help="print the K likeliest (default: 1)")
    predict.add_argument("--data", metavar="SRC", help="with --bundle: adjust logits to the label shares of this data")
    predict.add_argument(
        "--threads", type=whole_number, default=threads(), metavar="N", help="default: half of the cores"
    )
    predict.add_argument("--precision", choices=PRECISIONS, help="with --bundle: the precision, of those that it has")
    predict.set_defaults(run=_predict)


def threads() -> int:
    """Half of the cores: predictions and the system need some, too."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def _predict(arguments: argparse.Namespace) -> int:
    own = OwnLabels()
    class_names: tuple[str, ...] = ()
    if arguments.bundle is not None:
        bundle = open_bundle(arguments.bundle)
        predictor = Predictor(_graph(bundle, arguments.precision), threads=arguments.threads)
        class_names, loss = bundle.class_names, bundle.recipe.loss
        if arguments.data is not None:
            if loss != "cross_entropy":
                raise UsageError(f"--data with a model of loss {loss!r}", expected="one that predicts one class")
            classes = bundle.architecture.classes
            labels = targets(load_data(arguments.data).y_train, loss, classes)
            own = OwnLabels.of(labels, replace(bundle.recipe, logit_adjustment=True), classes)
    elif arguments.precision is not None:
        raise UsageError("--precision", expected="with --bundle", hint="What a board serves at says its `run --serve`.")
    else:
        predictor, record = _slots(arguments.state).open(arguments.threads)
        own, loss = record.own, record.loss
    x, y = _inputs(arguments.input)
    logits = own(predictor.predict(x))
    if arguments.output is not None:
        with arguments.output.open("wb") as file:
            np.save(file, logits)
    else:
        for line in described(logits, loss, arguments.top, class_names):
            print(line)
    if y is not None and len(y):
        print(judged(logits, y, loss), file=sys.stderr)
    return int(ExitCode.OK)


def _graph(bundle: Bundle, precision: str | None) -> Path:
    """The graph of a bundle at a precision."""
    if precision is None:
        return bundle.folder
    if precision not in bundle.precisions:
        raise BundleError(
            f"{bundle.folder} has no {precision}",
            expected=", ".join(bundle.precisions) or "float32 alone",
            hint=f"Export it with --precision {precision}.",
        )
    return bundle.path(graph_file(precision))


def _slots(state: Path) -> Slots:
    """The serving models of a state folder that is there and may be read."""
    pointer = state / "serving" / "serving.json"
    with storage_errors(f"can't read {pointer}"):
        if not state.is_dir():
            raise StorageError(
                f"there is no folder {state}", hint="Give the folder that `fedprune-device run --state` uses."
            )
        if pointer.is_file():
            pointer.open("rb").close()
    return Slots(state / "serving")


def _inputs(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    try:
        with path.open("rb") as raw:
            check_members(raw, str(path), DataError)
            found = np.load(raw, allow_pickle=False)
            if isinstance(found, np.ndarray):
                x, y = found, None
            else:
                x, y = found["x"], found["y"] if "y" in found.files else None
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=remedy(error)) from error
    except DataError:
        raise
    except Exception as error:  # what is damaged makes zipfile, zlib, numpy and its parser of headers raise anything
        raise DataError(
            f"{path} can't be read as arrays{why_unreadable(error)}", expected="a .npy array, or an .npz file with x"
        ) from error
    if not x.shape or not len(x):
        raise DataError(f"{path} holds no samples", expected="inputs [n, ...]", got=x.shape)
    try:
        if y is None:
            return checked_inputs(x), None
        return checked_samples(x, y)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
