"""How fast a machine can multiply and move memory at most: what no form of a layer can beat for long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedprune.planning.profile import HardwareProfile
from fedprune.runtime.session import Session
from fedprune_export.ir.graph import Graph, Port

_SIDE = 768  # of the square matrices that are multiplied: large enough for the peak, three of them in a common cache

_MOVED = 2**24  # numbers of each array that is added: far more than caches hold

_RUNS = 7


@dataclass(frozen=True)
class Speed:
    """A machine's bounds.

    Attributes:
        flops: Float32 operations per second; a multiplication and an addition are two.
        bytes_s: Bytes of main memory per second, read plus written.
        here: Whether it is this machine's, so that times measured here can be compared with it.
    """

    flops: float
    bytes_s: float
    source: str
    here: bool = False


def promised(profile: HardwareProfile, threads: int = 0) -> Speed:
    """The peak figures of a profile.

    Args:
        threads: Threads that compute, which have their share of the cores' peak; 0 for all cores.
    """
    share = min(1.0, threads / profile.cpu.cores) if threads else 1.0
    count = "all" if share == 1 else str(threads)
    source = f"profile {profile.name}, {count} of {profile.cpu.cores} cores"
    return Speed(profile.compute.peak_flops * share, profile.memory.bandwidth_bytes_s, source)


def bounds(profile: HardwareProfile | None, threads: int) -> Speed:
    """The peak figures of a profile or, without one, of this machine."""
    return measured(threads) if profile is None else promised(profile, threads)


def measured(threads: int = 1) -> Speed:
    """This machine's peak with a product of matrices and a sum of long vectors; the fastest of some runs counts.

    Raises `ModelError` if onnxruntime doesn't run the graphs.
    """
    square = np.full((_SIDE, _SIDE), 0.5, np.float32)
    line = np.ones(_MOVED, np.float32)
    product = _fastest(_graph("MatMul", square, threads))
    moved = _fastest(_graph("Add", line, threads))
    return Speed(2 * _SIDE**3 / product, 3 * line.nbytes / moved, f"measured here, {threads} threads", here=True)


def _graph(op: str, value: np.ndarray, threads: int) -> Callable[[], object]:
    graph = Graph([Port(n, value.dtype, value.shape) for n in "ab"], [Port("c", value.dtype, value.shape)])
    graph.emit(op, "a", "b", out="c")
    session, feeds = Session(graph.to_bytes(), threads=threads), {"a": value, "b": value.copy()}
    return lambda: session.run(feeds)


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)
