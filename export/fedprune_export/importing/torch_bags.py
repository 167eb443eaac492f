"""Exports EmbeddingBag as a lookup and a sum, mean or maximum: torch's exporter writes a loop over the samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def export_embedding_bags(torch: Any) -> Iterator[None]:
    """Let calls of `embedding_bag` on identifiers [n, length] be lookups while a module is exported.

    Flat identifiers with offsets stay as they are: their bags differ in length from sample to sample.
    """
    embedding_bag = torch.nn.functional.embedding_bag

    class Bags(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            bags = _bags(torch, *args, **(kwargs or {})) if function is embedding_bag else None
            return function(*args, **(kwargs or {})) if bags is None else bags

    with Bags():
        yield


def _bags(
    torch: Any,
    ids: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """The bags [n, width] of identifiers [n, length]; None for other calls. The arguments are torch's own."""
    if ids.dim() != 2 or offsets is not None or max_norm is not None:
        return None
    rows = torch.nn.functional.embedding(ids, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if padding_idx is None:
        return {"sum": rows.sum, "mean": rows.mean, "max": rows.amax}[mode](1)
    # Padding counts neither in a mean nor for a maximum; a bag of nothing else is 0.
    counts = (ids != padding_idx % weight.shape[0]).unsqueeze(-1)
    if mode == "max":
        largest = torch.where(counts, rows, -math.inf).amax(1)
        return torch.where(counts.any(1), largest, 0.0)
    total = (rows * counts).sum(1)
    return total if mode == "sum" else total / counts.sum(1).clamp(min=1)
