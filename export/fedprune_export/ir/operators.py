"""Families of operators, by name: what several passes of the compiler need to agree on."""

from __future__ import annotations

ONE_TO_ONE = (
    "Relu",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "Elu",
    "Selu",
    "Celu",
    "HardSigmoid",
    "HardSwish",
    "Softplus",
    "Softsign",
    "ThresholdedRelu",
    "Identity",
    "Dropout",
    "Cast",
    "Neg",
    "Abs",
    "Exp",
    "Log",
    "Sqrt",
    "Reciprocal",
    "Erf",
    "Clip",
)
MANY_TO_ONE = ("Add", "Sub", "Mul", "Div", "PRelu", "Pow", "Max", "Min", "Sum", "Mean")
ELEMENTWISE = frozenset({*ONE_TO_ONE, *MANY_TO_ONE})
"""Operators that compute every index of the output from the same index of the inputs."""

REARRANGEMENTS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators that only arrange their first input anew."""

VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
"""Operators whose output is the input's memory."""
