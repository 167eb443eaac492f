"""Tables of operators: families that several passes agree on, and registries with one rule (a function) per operator.

The rules themselves are in `fedprune_export.operators`, one file per family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from fedprune.core.errors import ModelError

ONE_TO_ONE = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Softplus"),
    *("Softsign", "ThresholdedRelu", "Identity", "Dropout", "Cast", "Neg", "Abs", "Exp", "Log", "Sqrt"),
    *("Reciprocal", "Erf", "Clip"),
)
MANY_TO_ONE = ("Add", "Sub", "Mul", "Div", "PRelu", "Pow", "Max", "Min", "Sum", "Mean")
# Operators that compute every index of the output from the same index of the inputs.
ELEMENTWISE = frozenset({*ONE_TO_ONE, *MANY_TO_ONE})

# Operators that only rearrange their first input.
REARRANGEMENTS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})

SOFTMAXES = frozenset({"LogSoftmax", "Softmax"})

SIZE_OPERATORS = ("Shape", "Size")  # where shape arithmetic begins

# Operators whose output is the input's memory.
VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity"})

# Arrays that a step keeps until their gradient is computed; in most networks they take more memory than the weights.
INPUT, OUTPUT, BOTH = "input", "output", "both"
# The arrays that the gradient of each operator reads, which a step has to keep; operators that aren't listed read none.
GRADIENT_READS: dict[str, str] = {}


def gradient_reads(what: str, *operators: str) -> None:
    """Register what the gradients of these operators read: `INPUT`, `OUTPUT` or `BOTH`."""
    GRADIENT_READS.update(dict.fromkeys(operators, what))


_Rule = TypeVar("_Rule", bound=Callable[..., Any])
_Table = TypeVar("_Table", bound=Mapping[str, Any])


def load_rules(table: _Table) -> _Table:
    """Import all files of `fedprune_export.operators`, which register their rules, and return a table of rules.

    These files use rooms above this one, so they can't be imported before a table is first read.
    """
    import_module("fedprune_export.operators")
    return table


def registrar(rules: dict[str, _Rule], kind: str) -> Callable[..., Callable[[_Rule], _Rule]]:
    """A decorator factory that takes operators and registers a rule for them.

    Registering raises `ModelError` if one of the operators has a rule already.
    """

    def rule(*operators: str) -> Callable[[_Rule], _Rule]:
        def register(function: _Rule) -> _Rule:
            for operator in operators:
                # Two rules of one operator would make the order of imports decide.
                before = rules.setdefault(operator, function)
                if before is not function:
                    both = [f"{f.__module__}.{f.__qualname__}" for f in (before, function)]
                    raise ModelError(f"operator {operator} has two {kind} rules", got=" and ".join(both))
            return function

        return register

    return rule
