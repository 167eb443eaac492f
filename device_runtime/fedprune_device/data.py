"""A board's own samples: read, checked, split, counted. They never leave the board; only counts do."""

from __future__ import annotations

import importlib
import inspect
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.chance import keyed
from fedprune.errors import DataError

Array = npt.NDArray[Any]

TEST_SHARE = 0.2
"""Share of the samples that is set aside where a source brings no test split of its own."""

_SMOOTHING = 0.1


@dataclass(frozen=True, eq=False)
class LocalData:
    """Training and test samples of one device.

    Attributes:
        x_train: Inputs, float32 [n, ...].
        y_train: Labels, int64 [n].
        x_test: Inputs that are never trained on; may be empty.
        y_test: Their labels.

    Raises:
        DataError: Types, lengths or shapes don't fit, a number is not finite, or a label is negative.
    """

    x_train: npt.NDArray[np.float32]
    y_train: npt.NDArray[np.int64]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            x, y = _checked(getattr(self, f"x_{split}"), getattr(self, f"y_{split}"), split)
            object.__setattr__(self, f"x_{split}", x)
            object.__setattr__(self, f"y_{split}", y)
        if not len(self.y_train):
            raise DataError("training data is empty", expected="at least one sample", got=0)
        if len(self.y_test) and self.x_test.shape[1:] != self.x_train.shape[1:]:
            raise DataError("shape of one test sample", expected=self.x_train.shape[1:], got=self.x_test.shape[1:])

    @property
    def samples(self) -> int:
        """Training samples."""
        return len(self.y_train)

    def check(self, classes: int, shape: tuple[int | str | None, ...] | None = None) -> None:
        """Check the data against a model.

        Args:
            classes: Entries of the model's output.
            shape: One sample's shape as the model takes it; names and None stand for any size.

        Raises:
            DataError: A label is not below `classes`, or samples have another shape.
        """
        top = int(max(self.y_train.max(), self.y_test.max() if len(self.y_test) else 0))
        if top >= classes:
            raise DataError(
                "a label is out of range",
                expected=f"0 to {classes - 1} ({classes} classes)",
                got=top,
                hint="Number the classes from 0 in the order that all devices share.",
            )
        if shape is not None:
            check_shape(self.x_train, shape)


def load_data(source: str, seed: int = 0, device: str = "") -> LocalData:
    """Read a device's data.

    Args:
        source: A `.npz` file with `x`, `y` (or `x_train`, `y_train`) and, if there is one, `x_test`,
            `y_test`; or `package.module:function`. The function may take `device` and `seed` and returns a
            `LocalData`, a mapping with a file's names, (x, y) or (x_train, y_train, x_test, y_test).
        seed: Seed of the split where the source has no test samples.
        device: The device's name: it keys the split.

    Returns:
        Checked data. The same source, seed and device always give the same split.

    Raises:
        DataError: The source can't be read or doesn't hold usable samples; the message names it.
    """
    found = _found(source, seed, device)
    try:
        return found if isinstance(found, LocalData) else _assemble(found, seed, device)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def load_inputs(source: str, shape: tuple[int | str | None, ...] | None = None) -> npt.NDArray[np.float32]:
    """Read samples without labels; where a source has labels, nobody looks at them.

    Args:
        source: As for `load_data`, but no label is needed. Of a source with `x_test` those samples are read, else all.
        shape: One sample's shape as the model takes it; names and None stand for any size.

    Raises:
        DataError: The source can't be read or doesn't hold usable samples; the message names it.
    """
    found = _found(source, 0, "")
    try:
        if isinstance(found, LocalData):
            found = {"x_train": found.x_train, **({"x_test": found.x_test} if len(found.x_test) else {})}
        elif not isinstance(found, np.ndarray):
            found = _named(found)
        if isinstance(found, dict):
            name = next((n for n in ("x_test", "x_train", "x") if n in found), None)
            if name is None:
                raise DataError("array 'x' is missing", got=", ".join(map(str, found)) or "nothing")
            found = found[name]
        x = _checked_inputs(np.asarray(found), "unlabelled")
        if shape is not None:
            check_shape(x, shape)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return x


def check_shape(x: Array, shape: tuple[int | str | None, ...]) -> None:
    """Check samples against a model's input.

    Args:
        x: Samples [n, ...].
        shape: One sample's shape as the model takes it; names and None stand for any size.

    Raises:
        DataError: They have another shape.
    """
    got = x.shape[1:]
    if len(got) != len(shape) or any(isinstance(d, int) and d != g for d, g in zip(shape, got, strict=True)):
        raise DataError(
            "shape of one sample",
            expected=shape,
            got=got,
            hint="Prepare the data as the model's input wants it (channels first).",
        )


def class_counts(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """Samples per class.

    Raises:
        DataError: A label is out of range.
    """
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DataError("a label is out of range", expected=f"0 to {classes - 1}", got=f"{y.min()} to {y.max()}")
    return np.bincount(y, minlength=classes).astype(np.int64)


def log_prior(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Log of the smoothed label shares: log((n_c + 0.1) / (n + 0.1·C)).

    It is added to the logits in the loss (logit adjustment, Menon et al., arXiv:2007.07314) and, because a
    device predicts for its own surroundings, to those of its own predictions.

    Raises:
        DataError: A label is out of range.
    """
    counts = class_counts(y, classes).astype(np.float64)
    shares = (counts + _SMOOTHING) / (counts.sum() + _SMOOTHING * classes)
    return np.asarray(np.log(shares), np.float32)


def class_presence(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """1 for every class that has a sample, else 0.

    Raises:
        DataError: A label is out of range.
    """
    return np.asarray(class_counts(y, classes) > 0, np.float32)


def class_weights(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Loss weights that make all present classes count alike: n / (present classes · n_c), 0 for absent ones.

    Raises:
        DataError: A label is out of range.
    """
    counts = class_counts(y, classes).astype(np.float64)
    present = counts > 0
    out = np.zeros(classes, np.float64)
    out[present] = counts.sum() / (present.sum() * counts[present])
    return np.asarray(out, np.float32)


def _found(source: str, seed: int, device: str) -> object:
    path = Path(source)
    if source.endswith(".npz") or path.is_file():
        return _read_npz(path)
    if ":" in source:
        return _call(source, seed, device)
    raise DataError(
        f"data source {source!r}",
        expected="a .npz file that exists or package.module:function",
        got="neither",
    )


def _checked(x: object, y: object, split: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    labels, kind = np.asarray(y), f"{split} " if split else ""
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{kind}labels", expected="whole numbers [n]", got=f"{labels.dtype} {labels.shape}")
    inputs = _checked_inputs(np.asarray(x), split)
    if len(inputs) != len(labels):
        raise DataError(f"number of {kind}labels", expected=len(inputs), got=len(labels))
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"a {kind}label is negative", expected="0 or more", got=int(labels.min()))
    return inputs, np.ascontiguousarray(labels, np.int64)


def _checked_inputs(inputs: Array, split: str) -> npt.NDArray[np.float32]:
    kind = f"{split} " if split else ""
    if inputs.dtype.kind != "f":
        raise DataError(
            f"type of {kind}inputs",
            expected="float32",
            got=inputs.dtype,
            hint="Scale images yourself as the model expects them, such as x.astype('float32') / 255.",
        )
    if inputs.ndim < 2:
        raise DataError(f"{kind}inputs", expected="[n, ...]", got=inputs.shape)
    inputs = np.ascontiguousarray(inputs, np.float32)
    if not np.isfinite(inputs).all():
        bad = int(np.flatnonzero(~np.isfinite(inputs.reshape(len(inputs), -1)).all(1))[0])
        raise DataError(f"{kind}inputs hold numbers that are not finite", got=f"sample {bad}")
    return inputs


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise DataError(f"{path} is a single array", expected="an .npz file with x and y")
            return {name: file[name] for name in file.files}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not an .npz file of plain arrays{why_unreadable(error)}",
            hint="Write it with numpy.savez(path, x=..., y=...).",
        ) from error


def why_unreadable(error: Exception) -> str:
    """What numpy's error says of a file, without its advice to allow pickles; in brackets, or empty."""
    text = str(error)
    if "Object arrays" in text:
        return " (it holds objects, which are never unpickled)"
    # What is neither a zip archive nor an array numpy takes for a pickle.
    return "" if not text or "pickle" in text or isinstance(error, zipfile.BadZipFile) else f" ({text})"


def _call(source: str, seed: int, device: str) -> object:
    module_name, _, name = source.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does: the user's own modules lie in the current folder
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), name)
        known = {"device": device, "seed": seed}
        takes = inspect.signature(function).parameters
        return function(**{k: v for k, v in known.items() if k in takes})
    except DataError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(
            f"data source {source} failed ({type(error).__name__}: {error})",
            hint="Run the function by itself on this device.",
        ) from error


def _named(found: object) -> dict[str, Any]:
    """Arrays by name, from a mapping or a tuple."""
    if isinstance(found, (tuple, list)):
        names = {2: ("x", "y"), 4: ("x_train", "y_train", "x_test", "y_test")}.get(len(found))
        if names is None:
            raise DataError("data", expected="2 or 4 arrays", got=len(found))
        found = dict(zip(names, found, strict=True))
    if not isinstance(found, dict):
        raise DataError("data", expected="arrays, a mapping or LocalData", got=type(found).__name__)
    return found


def _assemble(arrays: object, seed: int, device: str) -> LocalData:
    found = _named(arrays)
    suffix = "_train" if "x_train" in found else ""
    try:
        x, y = np.asarray(found[f"x{suffix}"]), np.asarray(found[f"y{suffix}"])
    except KeyError as error:
        raise DataError(
            f"array {error.args[0]!r} is missing",
            expected="x and y (or x_train and y_train)",
            got=", ".join(map(str, found)) or "nothing",
        ) from error
    if ("x_test" in found) != ("y_test" in found):
        raise DataError("test data", expected="both x_test and y_test, or neither")
    if "x_test" in found:
        return LocalData(x, y, np.asarray(found["x_test"]), np.asarray(found["y_test"]))
    x, y = _checked(x, y, "")  # before the split, so that an error names the sample by its place in the source
    order = keyed(seed, "split", device).permutation(len(y))
    aside = int(len(y) * TEST_SHARE)
    train, test = np.sort(order[aside:]), np.sort(order[:aside])
    return LocalData(x[train], y[train], x[test], y[test])
