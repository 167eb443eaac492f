"""Types of models' inputs by onnxruntime's names."""

import numpy as np
import pytest

from fedprune.core.errors import ModelError
from fedprune.model.input_type import InputType


@pytest.mark.parametrize("kind", ["float", "float16", "double", "bool", "uint8", "int16", "int64"])
def test_a_tensor_of_numbers_has_numpys_type(kind: str) -> None:
    assert InputType.of(f"tensor({kind})").dtype == np.dtype({"float": "float32"}.get(kind, kind))


@pytest.mark.parametrize("kind", ["tensor(string)", "tensor(bfloat16)", "tensor(complex64)", "seq(tensor(float))"])
def test_inputs_of_other_kinds_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ModelError) as error:
        InputType.of(kind)
    assert kind.removeprefix("tensor(").removesuffix(")") in str(error.value)
