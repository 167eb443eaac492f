"""ReLUs on given sides: float64 on the linear piece of a network on which a float32 run was.

Rounding puts a few of millions of inputs next to zero on the other side, in either engine. Gradients then differ by a
thousand times what rounding itself costs, which says nothing about how exact either engine is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from support.oracles.torch_operators import OPERATORS

Tensor = torch.Tensor

UNITS = ("Relu", "Clip")


@contextmanager
def sides(inputs: Iterable[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Within it, `torch_graph.run` keeps the inputs of ReLUs and clips, in order.

    Args:
        inputs: Inputs of an earlier run, by which each unit's side is decided.
    """
    seen: list[Tensor] = []
    given = None if inputs is None else iter(inputs)

    def unit(a: Mapping[str, Any], x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        seen.append(x.detach())
        by = seen[-1] if given is None else next(given).to(x.dtype)
        least, most = (bound if end is None else end.item() for end, bound in ((low, -math.inf), (high, math.inf)))
        return torch.where((by > least) & (by < most), x, by.clamp(least, most))

    def relu(a: Mapping[str, Any], x: Tensor) -> Tensor:
        return unit(a, x, torch.zeros(()))

    before = {op: OPERATORS[op] for op in UNITS}
    OPERATORS.update({"Relu": relu, "Clip": unit})
    try:
        yield seen
    finally:
        OPERATORS.update(before)
