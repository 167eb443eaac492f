"""The metrics of an evaluation that waits until something reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property


class LazyMetrics(Mapping[str, float]):
    """Metrics that `evaluate` returns when they are first read: in time for what decides by them, and where nothing
    does, after the next round has begun."""

    def __init__(self, evaluate: Callable[[], Mapping[str, float]]) -> None:
        self._evaluate = evaluate

    @cached_property
    def _values(self) -> Mapping[str, float]:
        return self._evaluate()

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
