"""The peak memory of a process that trains with a graph, and graphs that are written to keep it within a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedprune.core.errors import PlanError
from fedprune.core.text import quantity
from fedprune.model.architecture import Architecture
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.liveness import execution_order, live_bytes
from fedprune_export.training.checkpointing import ValueSizes, recomputed, value_sizes

PROCESS_BYTES = 65_000_000
"""Python, numpy and onnxruntime with a session, without the MQTT client and the agent that a board's process also has
(`fedprune.planning.costs.PROCESS_BYTES`)."""

NODE_BYTES = 6_100  # what onnxruntime holds per node of a loaded graph

GAPS, GAPS_AGAIN = 0.09, 0.3
"""The allocator's fragmentation, as a share of the values that live at once; in graphs that compute values again, too,
which come and go more often. Measured, as the two above, with five nets at three widths on x86
(`benchmarks/memory.py`)."""

_TRIES = 6


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one step, in bytes.

    Attributes:
        process: Interpreter, libraries, the loaded graph.
        inputs: What the step is fed: weights, state, samples.
        values: Most that lives at once while it runs: activations, gradients, next weights and state.
        gaps: Idle memory of the allocator then.
    """

    process: int
    inputs: int
    values: int
    gaps: int

    @property
    def peak(self) -> int:
        return self.process + self.inputs + self.values + self.gaps


@dataclass(frozen=True)
class Fitted:
    """A training graph within a memory limit.

    `before`: what the step took without values that are computed again; `work`: what that adds, as a share of the
    step's estimated work.
    """

    graph: Graph
    memory: TrainingMemory
    before: TrainingMemory
    values: int = 0
    work: float = 0.0

    def describe(self) -> str:
        line = f"memory of a training step: {_mb(self.memory.peak)}"
        if not self.values:
            return line
        return (
            f"{line} instead of {_mb(self.before.peak)}: {self.values} values computed again, {self.work:.0%} more work"
        )


def training_memory(graph: Graph, sizes: ValueSizes) -> TrainingMemory:
    """Memory of a step of a training graph."""
    live = live_bytes(execution_order(graph), sizes.bytes, [p.name for p in graph.outputs])
    return taken(graph, sizes, max(live, default=0), GAPS)


def fitted(graph: Graph, architecture: Architecture, widths: Sequence[int], batch: int, limit: int) -> Fitted:
    """A training graph that computes again just as much as it must to stay within a limit.

    Raises `PlanError` if it doesn't fit, whatever is computed again. `widths`: channels of every group for which the
    limit is meant; `batch`: samples that are worked on at once; `limit`: bytes that the training process may take at
    its peak.
    """
    sizes = value_sizes(graph, architecture, tuple(widths), batch)
    before = training_memory(graph, sizes)
    best = Fitted(graph, before, before)
    wanted = limit
    for _ in range(_TRIES):
        if best.memory.peak <= limit:
            return best
        fixed = best.memory.process + best.memory.inputs
        found = recomputed(graph, sizes, max(0, int((wanted - fixed) / (1 + GAPS_AGAIN))))
        after = taken(found.graph, sizes, found.live_bytes, GAPS_AGAIN)
        again = Fitted(found.graph, after, before, found.values, found.work)
        if again.memory.peak <= limit:
            return again
        wanted -= max(again.memory.peak - limit, limit // 100)
        best = min(best, again, key=lambda f: f.memory.peak)
    raise PlanError(
        f"a training step of {architecture.name} doesn't fit its memory limit, whatever is computed again",
        expected=f"at most {_mb(limit)}",
        got=f"{_mb(best.memory.peak)} at batch {batch} ({_mb(before.peak)} with nothing computed again)",
        hint="Use a smaller batch, --set accumulate=2 (a batch in parts), a lower --density or a higher limit.",
    )


def taken(graph: Graph, sizes: ValueSizes, values: int, gaps: float) -> TrainingMemory:
    """Memory of a step whose values are known.

    `values`: most bytes of values that live at once; `gaps`: idle memory of the allocator, as a share of that.
    """
    inputs = sum(sizes.bytes.get(p.name, 0) for p in graph.inputs)
    return TrainingMemory(PROCESS_BYTES + NODE_BYTES * len(graph.nodes), inputs, values, round(gaps * values))


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 10**5 else quantity(count, "byte", form=",")
