"""A board's own samples: read, checked, split, counted. They never leave the board; only counts do."""

from __future__ import annotations

import inspect
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import is_there
from fedprune.core.errors import DataError, StorageError, remedy, shape_text
from fedprune.core.imports import own_module
from fedprune.core.rng import keyed
from fedprune.core.zip_limits import check_members
from fedprune.model.lengths import Shape, fits, free_axis
from fedprune_device.data.labels import Targets
from fedprune_device.data.sequences import LENGTHS, Rows, fitted, fitted_labels, rows_of
from fedprune_device.data.splits import TEST_SHARE
from fedprune_device.data.stored_array import Inputs, StoredArray, joined, member, moved_out, select

Array = npt.NDArray[Any]

_SPLITS = ("train", "test", "val")
_NO_SAMPLES = np.zeros((0, 0), np.float32)

_SCALE = "Scale images yourself as the model expects them, such as x.astype('float32') / 255."


@dataclass(frozen=True, eq=False)
class LocalData:
    """Training, test and validation samples of one device.

    Attributes:
        x_train: Inputs [n, ...]: float32, or int64 for token ids; large ones may be stored on the disk.
        y_train: Labels: classes as whole numbers [n], or [n, ...] of places; or float32 [n] or [n, ...], 0 or 1 per
            class or numbers to predict. Those of places may be stored on the disk.
            The inputs themselves, the same object, where samples have no labels.
        x_test: Inputs that are never trained on; may be empty. What is measured on them is reported alone.
        y_test: Their labels.
        x_val: Inputs that are never trained on, by which training and fleet decide; may be empty.
        y_val: Their labels.
        rows: Where the inputs are rows [n, numbers and length]: what the rows hold.
        spool: A folder for copies of large arrays, which are otherwise held in memory.

    Raises:
        DataError: Types, lengths or shapes don't fit, a number is not finite, or a class or token id is negative.
    """

    x_train: Inputs
    y_train: Inputs
    x_test: Inputs
    y_test: Inputs
    x_val: Inputs = field(default_factory=lambda: _NO_SAMPLES)
    y_val: Inputs = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: Rows | None = field(default=None, kw_only=True)
    spool: Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        x: Inputs
        y: Inputs
        for split in _SPLITS:
            if split == "val" and not len(self.y_val) and not len(self.x_val):
                x, y = self.x_train[:0], self.y_train[:0]
            else:
                x, y = checked_samples(getattr(self, f"x_{split}"), getattr(self, f"y_{split}"), split)
            object.__setattr__(self, f"x_{split}", x)
            object.__setattr__(self, f"y_{split}", y)
        if not len(self.y_train):
            raise DataError("training data is empty", expected="at least one sample", got=0)
        for split in filter(lambda s: len(getattr(self, f"y_{s}")), _SPLITS[1:]):
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if x.shape[1:] != self.x_train.shape[1:]:
                raise DataError(f"shape of one {split} sample", expected=self.x_train.shape[1:], got=x.shape[1:])
            for one, other, what in ((self.x_train, x, "inputs"), (self.y_train, y, "labels")):
                if (_type(one), one.shape[1:]) != (_type(other), other.shape[1:]):
                    raise DataError(f"type of {split} {what}", expected=_kind(one), got=_kind(other))

    @property
    def samples(self) -> int:
        return len(self.y_train)

    def snapshot(self, shape: Shape | None = None, targets: Targets | None = None) -> LocalData:
        """The samples as a model takes them, padded where their length varies; else itself, which never changes."""
        if shape is None or free_axis(shape) is None:
            return self
        arrays: list[Inputs] = []
        for split in _SPLITS:
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            some = fitted(x, self.rows, shape) if len(x) else _NO_SAMPLES
            arrays += [some, some if y is x else fitted_labels(y, some, shape, targets, self.spool)]
        return LocalData(*arrays)

    @property
    def unlabelled(self) -> bool:
        """Whether the samples have no labels but themselves, which a model is to reproduce."""
        return self.y_train is self.x_train

    @property
    def bytes(self) -> int:
        """Memory that all samples and labels take."""
        kinds = "x" if self.unlabelled else "xy"
        return sum(getattr(self, f"{kind}_{split}").nbytes for kind in kinds for split in _SPLITS)

    def with_validation(self, share: float, seed: int = 0, device: str = "") -> LocalData:
        """The same with a share of the training samples (below 1) as validation samples, unless it has some; seed and
        device name decide which.
        """
        if not 0 <= share < 1:
            raise DataError("share of the training samples for validation", expected="0 to below 1", got=share)
        aside = int(self.samples * share)
        if not aside or len(self.y_val):
            return self
        order = keyed(seed, "validation", device).permutation(self.samples)
        train, val = np.sort(order[aside:]), np.sort(order[:aside])
        own, aside_of = (_select(self.x_train, self.y_train, rows) for rows in (train, val))
        return LocalData(*own, self.x_test, self.y_test, *aside_of, rows=self.rows, spool=self.spool)

    def moved_out(self, spool: Path) -> LocalData:
        """The same with large arrays in temporary files in `spool`, which are deleted with this process."""
        x = {split: _moved_out(getattr(self, f"x_{split}"), spool) for split in _SPLITS}
        y = {split: _moved_out(getattr(self, f"y_{split}"), spool, any_type=True) for split in _SPLITS}
        y = x if self.unlabelled else y
        arrays = x["train"], y["train"], x["test"], y["test"], x["val"], y["val"]
        return LocalData(*arrays, rows=self.rows, spool=spool)

    def check(
        self,
        targets: Targets,
        shape: Shape | None = None,
        *,
        token_ids: bool | None = None,
    ) -> None:
        """Check labels and inputs against a model; raises `DataError`. In `shape`, names and None are any size."""
        own = (
            free_axis(shape or ()) is None
            and targets.loss != "cross_entropy"
            and targets.takes_whole == (self.x_train.dtype.kind == "i")
        )
        if self.unlabelled and not (own and fits(self.x_train.shape[1:], targets.shape)):
            raise DataError(
                "the samples have no labels",
                expected=f"labels {shape_text('n', *targets.shape)} for loss {targets.loss}",
                got=f"inputs {shape_text('n', *self.x_train.shape[1:])} alone",
                hint="Files of a class lie in a folder of its name. Without labels a model learns to reproduce its "
                "inputs, which its outputs must be as large as.",
            )
        for y in filter(len, (self.y_train, self.y_test, self.y_val)):
            targets(y)
        if shape is not None:
            check_shape(self.x_train, shape)
        if token_ids is not None:
            check_type(self.x_train, token_ids)


def load_data(
    source: str, seed: int = 0, device: str = "", validation_share: float = 0.0, *, spool: Path | None = None
) -> LocalData:
    """Read a device's data; large arrays of an `.npz` file stay there and are read as batches are drawn.

    Raises `DataError` if the source can't be read or doesn't hold usable samples; the message names it.

    Args:
        source: A `.npz` file with `x`, `y` (or `x_train`, `y_train`) and, if there are such, `x_test`, `y_test`,
            `x_val`, `y_val`, or without any `y...`; for a model of several inputs an array under the name of each in
            place of `x`; with `lengths` (`lengths_train` ...) where samples are padded; or
            `package.module:function`. The function may take `device` and
            `seed` and returns a `LocalData`, a mapping with a file's names, (x, y) or (x_train, y_train, x_test,
            y_test).
        seed: Seed of the split where the source has no test samples.
        device: The device's name: it keys the split.
        validation_share: Share of the training samples that is set aside for validation, where the source has no
            validation samples.
        spool: A folder for copies of large arrays that a file has compressed or a function returns; without one they
            are held in memory.

    Returns:
        Checked data. The same source, seed and device always give the same split.
    """
    found = _found(source, seed, device, spool)
    try:
        data = found if isinstance(found, LocalData) else _assemble(found, seed, device, spool)
        del found
        if spool is not None:
            data = data.moved_out(spool)
        return data.with_validation(validation_share, seed, device)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def load_inputs(source: str, shape: Shape | None = None, *, token_ids: bool = False) -> Inputs:
    """Read samples without labels; a source's labels are ignored, and `x_test` is preferred (`load_data`)."""
    found, rows = _found(source, 0, "", None), None
    try:
        if isinstance(found, LocalData):
            rows = found.rows
            found = {"x_train": found.x_train, **({"x_test": found.x_test} if len(found.x_test) else {})}
        elif not isinstance(found, np.ndarray):
            found, rows = _packed(_named(found), None)
        if isinstance(found, dict):
            name = next((n for n in ("x_test", "x_train", "x") if n in found), None)
            if name is None:
                raise DataError("array 'x' is missing", got=", ".join(map(str, found)) or "nothing")
            found = found[name]
        x = checked_inputs(found if isinstance(found, StoredArray) else np.asarray(found), "unlabelled")
        check_type(x, token_ids)
        if shape is not None:
            x = fitted(x, rows, shape)
            check_shape(x, shape)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return x


def check_shape(x: Inputs, shape: Shape) -> None:
    """Check samples [n, ...] against one sample's shape (names and None: any size); raises `DataError`."""
    if not fits(x.shape[1:], shape):
        raise DataError(
            "shape of one sample",
            expected=shape_text(*shape) if free_axis(shape) is not None else shape,
            got=x.shape[1:],
            hint="Prepare the data as the model's input wants it (channels first).",
        )


def check_type(x: Inputs, token_ids: bool) -> None:
    """Check the samples' type against a model's input; raises `DataError`."""
    if (x.dtype.kind == "i") != token_ids:
        raise DataError(
            "type of inputs",
            expected="whole numbers (token ids)" if token_ids else "float32",
            got=x.dtype,
            hint="Save token ids as int64." if token_ids else _SCALE,
        )


def _found(source: str, seed: int, device: str, spool: Path | None) -> object:
    path = Path(source)
    if source.endswith(".npz") or is_there(path, file=True):
        return read_arrays(path, spool)
    if ":" in source:
        return _call(source, seed, device)
    raise DataError(
        f"data source {source!r}",
        expected="a file or folder that exists, or package.module:function",
        got="none of these",
        hint="docs/device.md#data lists what it may be.",
    )


def checked_samples(x: object, y: object, split: str = "") -> tuple[Inputs, Inputs]:
    """Samples [n, ...] and labels in the types of `LocalData`; raises `DataError`, which names the `split`."""
    if y is x:
        inputs = checked_inputs(_inputs(x), split)
        return inputs, inputs
    labels = _checked_labels(_inputs(y), split)
    kind = f"{split} " if split else ""
    inputs = checked_inputs(_inputs(x), split)
    if len(inputs) != len(labels):
        raise DataError(f"number of {kind}labels", expected=len(inputs), got=len(labels))
    return inputs, labels


def _checked_labels(labels: Inputs, split: str) -> Inputs:
    kind = f"{split} " if split else ""
    if labels.dtype.kind not in "iufb" or labels.ndim < 1:
        raise DataError(
            f"{kind}labels",
            expected="classes as whole numbers, or numbers, [n, ...]",
            got=f"{labels.dtype} {labels.shape}",
        )
    if isinstance(labels, StoredArray):
        first = 0
        for chunk in labels.chunks() if labels.dtype.kind == "f" and not labels.checked else ():
            _check_finite(chunk, f"{kind}labels", first)
            first += len(chunk)
        return replace(labels, checked=True)
    if labels.ndim > 1 and labels.dtype.kind in "iu":
        return np.ascontiguousarray(labels)  # of their own width: masks are as many labels as there are pixels
    if labels.ndim == 1 and labels.dtype.kind != "f":
        if len(labels) and int(labels.min()) < 0:
            raise DataError(
                f"a {kind}label is negative",
                expected="0 or more",
                got=int(labels.min()),
                hint="Number the classes from 0; save numbers to predict as float32.",
            )
        return np.ascontiguousarray(labels, np.int64)
    labels = np.ascontiguousarray(labels, np.float32)
    _check_finite(labels, f"{kind}labels", 0)
    return labels


def checked_inputs(inputs: Inputs, split: str = "") -> Inputs:
    """Inputs as float32 or int64; arguments and errors are those of `checked_samples`."""
    kind = f"{split} " if split else ""
    if inputs.dtype.kind != "f" and inputs.dtype not in (np.int32, np.int64):
        raise DataError(f"type of {kind}inputs", expected="float32", got=inputs.dtype, hint=_SCALE)
    if inputs.ndim < 2:
        raise DataError(f"{kind}inputs", expected="[n, ...]", got=inputs.shape)
    if not isinstance(inputs, StoredArray):
        inputs = np.ascontiguousarray(inputs, np.int64 if inputs.dtype.kind == "i" else np.float32)
        _check_numbers(inputs, kind, 0)
        return inputs
    if inputs.checked:
        return inputs
    first = 0
    for chunk in inputs.chunks():
        _check_numbers(chunk, kind, first)
        first += len(chunk)
    return replace(inputs, checked=True)


def _check_numbers(inputs: Array, kind: str, first: int) -> None:
    """Refuse negative token ids and numbers that are not finite; `first` is the number of the first sample."""
    if inputs.dtype.kind == "i":
        if inputs.size and int(inputs.min()) < 0:
            raise DataError(f"{kind}inputs hold a negative token id", expected="0 or more", got=int(inputs.min()))
    else:
        _check_finite(inputs, f"{kind}inputs", first)


def _check_finite(some: Array, what: str, first: int) -> None:
    if not np.isfinite(some).all():
        bad = first + int(np.flatnonzero(~np.isfinite(some.reshape(len(some), -1)).all(1))[0])
        raise DataError(f"{what} hold numbers that are not finite", got=f"sample {bad}")


def _moved_out(x: Inputs, spool: Path, *, any_type: bool = False) -> Inputs:
    if isinstance(x, StoredArray):
        return x
    stored = moved_out(x, spool, any_type=any_type)
    return replace(stored, checked=True) if isinstance(stored, StoredArray) else stored


def _type(array: Inputs) -> np.dtype[Any]:
    """An array's type; whole numbers of any width are one, as labels in memory keep their own."""
    return np.dtype(np.int64) if array.dtype.kind in "iu" else array.dtype


def _kind(array: Inputs) -> str:
    return f"{array.dtype} [{', '.join(['n', *map(str, array.shape[1:])])}]"


def read_arrays(path: Path, spool: Path | None = None) -> dict[str, Inputs]:
    """The arrays of an `.npz` file by name; objects in it are refused, not unpickled.

    Large uncompressed arrays stay in the file; compressed ones are copied to the folder `spool`, or held in memory
    without one. Raises `DataError` if it isn't such a file.
    """
    try:
        with path.open("rb") as raw:
            check_members(raw, str(path), DataError)
            with np.load(raw, allow_pickle=False) as file:
                if not hasattr(file, "files"):
                    raise DataError(f"{path} is a single array", expected="an .npz file with x and y")
                return arrays_of(path, file, spool)
    except (DataError, StorageError):
        raise
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=remedy(error)) from error
    except Exception as error:  # what is damaged makes zipfile, numpy and its parser of headers raise anything
        raise DataError(
            f"{path} is not an .npz file of plain arrays{why_unreadable(error)}",
            hint="Write it with numpy.savez(path, x=..., y=...).",
        ) from error


def arrays_of(path: Path, file: Any, spool: Path | None = None) -> dict[str, Inputs]:
    entries = {info.filename.removesuffix(".npy"): info for info in file.zip.infolist()}
    return {
        name: member(path, file.zip, entries[name], spool, any_type=name.partition("_")[0] != "x")
        for name in file.files
    }


def why_unreadable(error: Exception) -> str:
    """numpy's error about a file in brackets, without its advice to allow pickles; may be empty."""
    text = str(error)
    if "Object arrays" in text:
        return " (it holds objects, which are never unpickled)"
    # What is neither a zip archive nor an array numpy takes for a pickle.
    return "" if not text or "pickle" in text or isinstance(error, zipfile.BadZipFile) else f" ({text})"


def _call(source: str, seed: int, device: str) -> object:
    module_name, _, name = source.partition(":")
    try:
        function = getattr(own_module(module_name), name)
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
    if isinstance(found, (tuple, list)):
        names = {2: ("x", "y"), 4: ("x_train", "y_train", "x_test", "y_test")}.get(len(found))
        if names is None:
            raise DataError("data", expected="2 or 4 arrays", got=len(found))
        found = dict(zip(names, found, strict=True))
    if not isinstance(found, dict):
        raise DataError("data", expected="arrays, a mapping or LocalData", got=type(found).__name__)
    return found


def _packed(found: dict[str, Any], spool: Path | None) -> tuple[dict[str, Any], Rows | None]:
    """Arrays of several inputs, by name, as parts of one: in the alphabetical order of the names, as models take them.

    Lengths of padded samples follow the numbers of each, and what these rows hold is returned, too. What is large is
    written to a file in `spool`, or held in memory without one. Raises `DataError` if they don't belong together.
    """
    if any(name.partition("_")[0] == "x" for name in found):
        return _with_lengths(found, spool)
    splits: dict[str, dict[str, Inputs]] = {}
    for name, array in found.items():
        base, _, end = name.rpartition("_")
        own, split = (base, f"_{end}") if base and end in _SPLITS else (name, "")
        if own != "y":
            splits.setdefault(split, {})[own] = _inputs(array)
    names = sorted(set().union(*splits.values()))
    if len(names) < 2:
        return found, None
    out = {name: array for name, array in found.items() if name.partition("_")[0] == "y"}
    for split, arrays in splits.items():
        if sorted(arrays) != names or len({len(a) if a.ndim else -1 for a in arrays.values()}) > 1:
            raise DataError(
                f"arrays of several inputs{split and f' ({split[1:]})'}",
                expected=f"{', '.join(names)}, each with as many samples",
                got=", ".join(f"{n} {_kind(a)} of {len(a)}" if a.ndim else f"{n} []" for n, a in arrays.items()),
            )
        types = [array.stored if isinstance(array, StoredArray) else array.dtype for array in arrays.values()]
        whole = all(found.kind in "iu" and found != np.uint8 for found in types)
        dtype = np.dtype(np.int64 if whole else np.float32)
        out[f"x{split}"] = joined([arrays[name] for name in names], dtype, spool)
    return out, None


def _with_lengths(found: dict[str, Any], spool: Path | None) -> tuple[dict[str, Any], Rows | None]:
    splits = [name.removeprefix("x") for name in found if name.partition("_")[0] == "x"]
    own = [name for name in found if name.partition("_")[0] == LENGTHS]
    if not own:
        return found, None
    if sorted(own) != sorted(f"{LENGTHS}{split}" for split in splits):
        expected = ", ".join(f"{LENGTHS}{split}" for split in splits)
        raise DataError("arrays of lengths", expected=expected, got=", ".join(own))
    pairs = [(_inputs(found[f"x{split}"]), _inputs(found[f"{LENGTHS}{split}"])) for split in splits]
    rows = rows_of(pairs)
    out = {name: array for name, array in found.items() if name not in own}
    for split, (x, lengths) in zip(splits, pairs, strict=True):
        whole = x.dtype in (np.int32, np.int64)
        out[f"x{split}"] = joined([x, lengths], np.dtype(np.int64 if whole else np.float32), spool)
    return out, rows


def _assemble(arrays: object, seed: int, device: str, spool: Path | None) -> LocalData:
    found, rows = _named(arrays), None
    if found.keys() & {"y", "y_train"} or any(name.partition("_")[0] == LENGTHS for name in found):
        found, rows = _packed(found, spool)
    suffix = "_train" if "x_train" in found else ""
    x: Inputs
    y: Inputs
    try:
        x = _inputs(found[f"x{suffix}"])
        y = _inputs(found[f"y{suffix}"]) if found.keys() & {"y", "y_train", "y_test", "y_val"} else x
    except KeyError as error:
        raise DataError(
            f"array {error.args[0]!r} is missing",
            expected="x and y (or x_train and y_train)",
            got=", ".join(map(str, found)) or "nothing",
        ) from error
    for split in () if y is x else ("test", "val"):
        if (f"x_{split}" in found) != (f"y_{split}" in found):
            raise DataError(f"{split} data", expected=f"both x_{split} and y_{split}, or neither")

    def pair(split: str) -> tuple[Inputs, Inputs]:
        inputs = _inputs(found[f"x_{split}"])
        return inputs, inputs if y is x else _inputs(found[f"y_{split}"])

    own: Any = pair("val") if "x_val" in found else ()
    if "x_test" in found:
        return LocalData(x, y, *pair("test"), *own, rows=rows)
    x, y = checked_samples(x, y, "")  # before the split, so that an error names the sample by its place in the source
    order = keyed(seed, "split", device).permutation(len(y))
    aside = int(len(y) * TEST_SHARE)
    train, test = np.sort(order[aside:]), np.sort(order[:aside])
    return LocalData(*_select(x, y, train), *_select(x, y, test), *own, rows=rows)


def _select(x: Inputs, y: Inputs, rows: npt.NDArray[np.int64]) -> tuple[Inputs, Inputs]:
    some = select(x, rows)
    return some, some if y is x else select(y, rows)


def _inputs(found: object) -> Inputs:
    return found if isinstance(found, StoredArray) else np.asarray(found)


class SampleSource(Protocol):
    """Samples that may become more or other ones: each round takes those that there are when it begins."""

    @property
    def samples(self) -> int:
        """Training samples now; the agent's loop asks for it, so that it must be known already."""

    def snapshot(self, shape: Shape | None = None, targets: Targets | None = None) -> LocalData:
        """A round's samples; raises `DataError` if there are none.

        In `shape`, that of a model's input, names and None stand for any size. `targets` are the labels that its loss
        takes; without them, as for predictions, a source may leave the labels out.
        """
