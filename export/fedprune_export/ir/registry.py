"""Rules by operator: how the passes of the compiler let one function per operator be registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedprune.core.errors import ModelError

_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def registrar(rules: dict[str, _Rule], kind: str) -> Callable[..., Callable[[_Rule], _Rule]]:
    """A decorator factory that takes operators and registers a rule for them.

    Args:
        rules: Where the rules are kept.
        kind: What they are called in messages.

    Raises:
        ModelError: (when a rule is registered) One of the operators has a rule already.
    """

    def rule(*operators: str) -> Callable[[_Rule], _Rule]:
        def register(function: _Rule) -> _Rule:
            for operator in operators:
                before = rules.setdefault(operator, function)
                if before is not function:
                    both = [f"{f.__module__}.{f.__qualname__}" for f in (before, function)]
                    raise ModelError(f"operator {operator} has two {kind} rules", got=" and ".join(both))
            return function

        return register

    return rule
