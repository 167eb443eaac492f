"""The type of a model's input: float32, or the whole numbers that its file takes, such as token ids and pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, ModelError, value_text

_WHOLE = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_ONNX_NAMES = {"float": "float32", "float16": "float16", "double": "float64", **{name: name for name in _WHOLE}}
_IDENTIFIERS = (np.dtype(np.int32), np.dtype(np.int64))


@dataclass(frozen=True)
class InputType:
    """The type of the numbers that a graph takes as samples."""

    dtype: np.dtype[Any]

    @classmethod
    def of(cls, name: str) -> InputType:
        """The type of onnxruntime's name, such as "tensor(uint8)"; raises `ModelError` for one without numbers."""
        text = name.removeprefix("tensor(").removesuffix(")")
        if text not in _ONNX_NAMES:
            raise ModelError("type of the model's inputs", expected=", ".join(_ONNX_NAMES), got=value_text(text))
        return cls(np.dtype(_ONNX_NAMES[text]))

    @property
    def is_whole(self) -> bool:
        return self.dtype.kind != "f"

    @property
    def is_bytes(self) -> bool:
        """Whether samples are bytes, as pictures are before they are scaled."""
        return self.dtype == np.uint8

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The smallest and largest whole number. Integers of 32 and 64 bits are identifiers, which begin at 0."""
        if self.dtype.kind == "b":
            return 0, 1
        limits = np.iinfo(self.dtype)
        return (0 if self.dtype in _IDENTIFIERS else int(limits.min)), int(limits.max)

    def __str__(self) -> str:
        if not self.is_whole:
            return "float32"
        if self.dtype in _IDENTIFIERS:
            return "whole numbers (token ids)"
        return "whole numbers from {} to {}".format(*self.bounds)

    @property
    def hint(self) -> str:
        """What to do with samples of another type."""
        if not self.is_whole:
            return "Scale images yourself as the model expects them, such as x.astype('float32') / 255."
        return "Give pixels as they are, as uint8." if self.is_bytes else "Save them as int64."

    def check_range(self, x: npt.NDArray[Any]) -> None:
        """Raise `DataError` if whole numbers are out of the type's range."""
        if not self.is_whole or x.dtype.kind not in "iu" or not x.size:
            return
        low, high = self.bounds
        smallest, largest = int(x.min()), int(x.max())
        if smallest < low or largest > high:
            got = smallest if smallest < low else largest
            raise DataError("a number of the inputs", expected=f"from {low} to {high}", got=got)

    def convert(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Samples in this type. Raises `DataError` for fractions, and for numbers that the type doesn't have."""
        if self.is_whole != (x.dtype.kind in "iub"):
            raise DataError("type of the inputs", expected=str(self), got=x.dtype, hint=self.hint)
        self.check_range(x)
        return x.astype(self.dtype, copy=False)


FLOATS = InputType(np.dtype(np.float32))
