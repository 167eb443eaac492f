"""`fedprune-device train`: train a bundle on this machine's samples, without a server."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedprune.core import atomic_file, tensorfile
from fedprune.core.cli import options_of, print_json
from fedprune.core.disk import storage_errors
from fedprune.core.errors import DataError, FedpruneError, UsageError
from fedprune.core.metrics import METRICS
from fedprune.core.text import quantity
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.runtime.bundle import BASE, INFERENCE, TRAINING, WEIGHTS, Bundle, open_bundle
from fedprune.runtime.bundle_folder import check_bundle_folder, read_files, write_bundle
from fedprune.runtime.precision_files import files_of, weights_file
from fedprune_device.cli.column_names import name_columns
from fedprune_device.cli.options import default_threads
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import LogitAdjustment
from fedprune_device.data.scaling import scale_entries, scale_samples
from fedprune_device.data.sources import SampleOptions
from fedprune_device.serving.predictor import Predictor
from fedprune_device.serving.reduced_precision import PrecisionCheck, lower_model
from fedprune_device.training.evaluation import PROBE_SAMPLES, Evaluation
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingControl, TrainingResult, TrainingTask

# Seconds between two updates of the progress line on a terminal; elsewhere, as in a log, each is a line of its own.
_PROGRESS_INTERVAL_S = 1.0
_PROGRESS_LINE_INTERVAL_S = 10.0


@name_columns()
def train(arguments: argparse.Namespace) -> None:
    bundle = open_bundle(arguments.bundle)
    recipe = _recipe(bundle, arguments)
    check_bundle_folder(arguments.out, bundle.target)
    # Copies of samples are kept on the result's disk: the system's temporary folder may be in memory.
    parents = arguments.out.absolute().parents
    writable_parent = next((folder for folder in parents if os.access(folder, os.W_OK | os.X_OK)), None)
    with storage_errors("can't make a folder for copies of samples"):
        folder = tempfile.TemporaryDirectory(prefix=".fedprune-", dir=writable_parent, ignore_cleanup_errors=True)
    with folder as spool:
        _train(bundle, recipe, arguments, Path(spool))


def _train(bundle: Bundle, recipe: Recipe, arguments: argparse.Namespace, spool: Path) -> None:
    options = options_of(SampleOptions, arguments)
    samples = options.fixed(bundle.class_names, spool)
    threads = arguments.threads or default_threads()
    trainer = Trainer(bundle.path(TRAINING), threads=threads, base=bundle.base)
    targets = trainer.targets(recipe, bundle.architecture.classes)
    data = samples.snapshot(trainer.input_shape, targets, trainer.input_type)
    # The names of the trained bundle's classes are those that its labels were numbered by.
    classes, class_names = bundle.architecture.classes, options.class_names or bundle.class_names
    if options.class_names and len(class_names) != classes:
        print(
            f"the trained bundle has no names of classes: expected {classes}, got {len(class_names)}", file=sys.stderr
        )
        class_names = ()
    try:
        data, scaling = scale_samples(data, recipe)
        training = _LocalTraining(bundle, recipe, data, trainer, arguments.seed, threads)
    except DataError as error:
        raise DataError(f"{arguments.data}: {error}") from error
    del trainer  # `finish` frees its memory before the new model is loaded, so no other reference may be left
    report: Callable[[str], None] = (lambda line: None) if arguments.json else partial(print, flush=True)
    report(f"{quantity(data.samples, 'training sample')}, {quantity(len(data.y_test), 'test sample')}")
    before = training.measure(Predictor(bundle.folder, threads=threads), "before")
    report(f"before: {_metrics_text(before)}")
    with _interruptible() as interrupted, _progress() as progress:
        result = training.train(progress, interrupted.is_set)
    summary = f"{quantity(result.steps, 'step')} in {result.seconds:.1f} s"
    report(f"trained: {summary}, loss {result.loss_first:.4g} -> {result.loss_last:.4g}")
    files, after = training.finish(result)
    report(f"after: {_metrics_text(after)}")
    kept_recipe = replace(bundle.recipe, scaling=scale_entries(scaling, data))
    write_bundle(arguments.out, files, bundle.selection, kept_recipe, bundle.target, class_names, bundle.base)
    size = sum(map(len, files.values()))
    if arguments.json:
        body = {"out": str(arguments.out), "bytes": size, "samples": data.samples, "test_samples": len(data.y_test)}
        result_row = {key: getattr(result, key) for key in ("steps", "seconds", "loss_first", "loss_last")}
        print_json({**body, **result_row, "before": before, "after": after})
    report(f"{arguments.out}: {quantity(len(files), 'file')}, {size:,} bytes")
    if interrupted.is_set():
        raise KeyboardInterrupt(
            f"after {result.steps} of {quantity(recipe.steps(data.samples), 'step')}; "
            f"{arguments.out} holds what was trained until then"
        )


def _recipe(bundle: Bundle, arguments: argparse.Namespace) -> Recipe:
    body = bundle.recipe.to_dict() | dict(arguments.set)
    for name in ("epochs", "lr"):
        if getattr(arguments, name) is not None:
            body[name] = getattr(arguments, name)
    recipe = Recipe.from_dict(body)
    if recipe.features != bundle.recipe.features:
        changed = [name for name, value in recipe.to_dict().items() if value != bundle.recipe.to_dict().get(name)]
        raise UsageError(
            f"the recipe needs another training graph than {bundle.folder} has",
            got=", ".join(f"{name}={body[name]}" for name in changed),
            hint="Export the bundle again with these settings (fedprune-export ... --set KEY=VALUE).",
        )
    return recipe


class _LocalTraining:
    """The training of a bundle: measures the model before and after, trains it, and makes the files of the result."""

    def __init__(
        self, bundle: Bundle, recipe: Recipe, data: LocalData, trainer: Trainer, seed: int, threads: int
    ) -> None:
        self._bundle, self._recipe, self._data, self._trainer = bundle, recipe, data, trainer
        self._seed, self._threads, self._classes = seed, threads, bundle.architecture.classes
        self._targets = trainer.targets(recipe, self._classes)
        data.check(self._targets, trainer.input_shape, input_type=trainer.input_type)
        adjustment = LogitAdjustment.of(data.y_train, recipe, self._classes)
        self._evaluation = Evaluation(data, recipe, self._classes, adjustment, trainer.objective(recipe, self._classes))

    def measure(self, model: Predictor, when: str) -> dict[str, float]:
        """Measure a model on the test samples: each metric by its name, none without samples."""
        self._evaluation.measure(model, when)
        metrics = self._evaluation.metrics
        values = {name: metrics.get(f"{name}_{when}") for name in METRICS}
        return {name: float(value) for name, value in values.items() if value is not None}

    def train(self, progress: Callable[[int, int], None], enough: Callable[[], bool]) -> TrainingResult:
        """Train until all epochs are done, or `enough()` is true."""
        weights, widths = tensorfile.load_tensors(self._bundle.path(WEIGHTS)), self._bundle.selection.widths
        task = TrainingTask(self._recipe, self._classes, self._seed, device="", round=1, widths=widths)
        return self._trainer.train(weights, self._data, task, TrainingControl(progress, enough=enough))

    def finish(self, result: TrainingResult) -> tuple[dict[str, bytes], dict[str, float]]:
        """The files of the trained bundle, and the metrics of its model. The trainer is gone afterwards."""
        tensors: Tensors = {n: result.tensors[n] for n in self._bundle.selection.shapes()}
        if self._recipe.calibrate and self._trainer.has_batch_norm:
            tensors = self._trainer.calibrate(tensors, self._data, self._recipe, seed=self._seed, device="")
        loss = None
        if not self._trainer.has_batch_norm:
            loss = self._trainer.loss(tensors, self._data, self._recipe, self._classes, PROBE_SAMPLES)
        del self._trainer  # its memory is needed to load the new model
        files = read_files(self._bundle)
        files[WEIGHTS] = tensorfile.encode(tensors)
        with tempfile.TemporaryDirectory(prefix="fedprune-") as name:
            folder = Path(name)
            for file in (INFERENCE, WEIGHTS):
                (folder / file).write_bytes(files[file])
            if self._bundle.base is not None:
                atomic_file.link_or_copy(self._bundle.base, folder / BASE, sync=False)
            model = Predictor(folder, threads=self._threads)
            self._evaluation.check(model, loss)
            after = self.measure(model, "after")
            for precision in self._bundle.precisions:
                self._lower(folder, precision, files, tensors, model)
        return files, after

    def _lower(
        self,
        folder: Path,
        precision: str,
        files: dict[str, bytes],
        tensors: Mapping[str, Any],
        float32_model: Predictor,
    ) -> None:
        """Convert the new weights to a lower precision; drop it if its predictions differ from float32's."""
        for file in files_of(precision):
            (folder / file).write_bytes(files[file])
        try:
            judge = PrecisionCheck(float32_model, self._data, self._recipe, self._targets)
            lower_model(folder, precision, tensors, self._data, judge)
            files[weights_file(precision)] = (folder / weights_file(precision)).read_bytes()
        except FedpruneError as error:  # a failed conversion must not lose a finished training
            print(f"{precision} is left out: {error}", file=sys.stderr)
            for file in files_of(precision):
                del files[file]


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{METRICS[name].title} {value:.4f}" for name, value in metrics.items()) or "no test samples"


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let the first SIGINT or SIGTERM set an event; the second one interrupts."""
    interrupted = threading.Event()

    def on_signal(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous_handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show steps on stderr: one changing line on a terminal, elsewhere a line every ten seconds and at the end."""
    is_terminal, began = sys.stderr.isatty(), time.monotonic()
    interval_s = _PROGRESS_INTERVAL_S if is_terminal else _PROGRESS_LINE_INTERVAL_S
    last_shown = began

    def show_step(done: int, total: int) -> None:
        nonlocal last_shown
        now = time.monotonic()
        if now - last_shown >= interval_s or done == total:
            last_shown = now
            start, end = ("\r", " ") if is_terminal else ("", "\n")
            print(f"{start}step {done} of {total}, {now - began:.0f} s", end=end, file=sys.stderr, flush=True)

    try:
        yield show_step
    finally:
        if is_terminal and last_shown > began:
            print(file=sys.stderr)
