"""An imported model: normalised inference graph, weights by name, architecture, channel groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture, Axis, ChannelGroup
from fedprune.model.features import Features
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.importance.scoring import Ranks
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.trace import Trace, trace_graph
from fedprune_export.pruning.frozen_base import FrozenBase

# Key of a graph's metadata: per group its channels, best first, as the fleet that trained the model cut it. A digest of
# the groups stands with it, so that ranks are dropped after another analysis has formed other groups.
RANKS_KEY = "fedprune.ranks"

# Key of a graph's metadata: by activation, the least and greatest number that it has in the quantised file which the
# model was read from.
ACTIVATION_RANGES_KEY = "fedprune.activation_ranges"


@dataclass(frozen=True, repr=False)
class Groups(Sequence[ChannelGroup]):
    """The channel groups of a model; prints as text. `notes`: the import's changes, and parts that it can't analyse."""

    architecture: Architecture
    notes: tuple[str, ...] = ()

    @property
    def fixed_axes(self) -> list[tuple[str, int]]:
        """The channel axes of weights that stay, in whole or in part, such as `fc.weight[0]`, and how many indices.

        The kernel axes of convolutions are left out.
        """
        kernels = {n.weight: n.op for n in self.architecture.layers if n.weight in self.architecture.by_name}
        fixed_axes = []
        for spec in self.architecture.tensors:
            axes = spec.axes[:2] if "Conv" in kernels.get(spec.name, "") else spec.axes
            for i, axis in enumerate(axes):
                size = sum(s.length for s in axis.segments if s.group == FIXED)
                if size and axis.length > 1:  # a depthwise filter reads one channel, which can't be cut
                    fixed_axes.append((f"{spec.name}[{i}]", size))
        return fixed_axes

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.architecture.name,
            "digest": self.architecture.digest,
            "groups": [
                {"name": g.name, "channels": g.size, "members": list(self.architecture.members(i))}
                for i, g in enumerate(self)
            ],
            "stays": [{"place": place, "indices": size} for place, size in self.fixed_axes],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{g.name}: {g.size} channels: {', '.join(self.architecture.summary(i))}" for i, g in enumerate(self)]
        stays = ", ".join(f"{place} ({size})" for place, size in self.fixed_axes) or "nothing"
        lines += [f"stays: {stays}", "why: inputs and outputs of a model stay; notes name what else keeps channels"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    @overload
    def __getitem__(self, index: int) -> ChannelGroup: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ChannelGroup]: ...
    def __getitem__(self, index: int | slice) -> ChannelGroup | Sequence[ChannelGroup]:
        return self.architecture.groups[index]

    def __len__(self) -> int:
        return len(self.architecture.groups)


@dataclass(frozen=True, repr=False)
class Model:
    """An imported model.

    Attributes:
        graph: The normalised inference graph. Its only input is `x` with a free batch, its only output is `logits`;
            every weight and statistic is an initialiser under its tensor name; all other initialisers are constants.
        architecture: Channel groups, tensors and costs of that graph.
        notes: Changes by the import, and parts that it could not analyse, for people: one sentence each.
        values: Axes of every value at full width; None for an axis that follows the batch.
        frozen: Names of tensors that the model's author froze (`requires_grad=False` in torch).
        base: Which frozen weights are stored in low precision; these are constants of the graph and no tensors.
        loss: Its own loss, of `logits` and `y`, which gives `loss` [n]; None where it brings none.
        metric: Its own metric, of `logits` and `y` (`step_contract.METRIC_METADATA`); None where it brings none.
        class_names: Names of the classes, where its folder or the end of its file has them.
        ranks: Per group its channels, best first, as the fleet that trained it cut it; None where no fleet did.
        class_axes: The axes of its outputs that may be those of the classes, which losses read on axis 1.
        training_graphs: Training graphs that were derived from it (`training.step_graph.training_step`), by features
            and unit.
    """

    graph: Graph
    architecture: Architecture
    notes: tuple[str, ...] = ()
    values: Mapping[str, tuple[Axis | None, ...]] = field(default_factory=dict, repr=False)
    frozen: tuple[str, ...] = ()
    base: FrozenBase | None = None
    loss: Model | None = field(default=None, repr=False)
    metric: Graph | None = field(default=None, repr=False)
    class_names: tuple[str, ...] = ()
    ranks: Ranks | None = field(default=None, repr=False, compare=False)
    class_axes: tuple[int, ...] = field(default=(1,), repr=False)
    # Exports, checks and jobs of one model ask for the same graphs.
    training_graphs: dict[tuple[Features, str], Graph] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        a = self.architecture
        sizes = f"{len(a.tensors)} tensors, {len(a.groups)} channel groups"
        return f"Model({a.name}: {list(a.input_shape)} to {list(a.output_shape)}, {sizes})"

    @property
    def tensors(self) -> Tensors:
        """Weights and statistics by name, in the architecture's order."""
        return {t.name: self.graph.initializers[t.name] for t in self.architecture.tensors}

    @property
    def base_file(self) -> bytes | None:
        """The file of the frozen weights in low precision; None where there are none."""
        return None if self.base is None else tensorfile.encode(self.base.tensors(self.graph.initializers))

    @cached_property
    def trace(self) -> Trace:
        """Shapes and types of the graph's values at several batch sizes.

        Raises `ModelError` if the batch can't vary, a value would be huge, or an operator makes no sense.
        """
        return trace_graph(self.graph)

    @property
    def groups(self) -> Groups:
        """The channels that can only be kept or cut together, and what stays; prints as text."""
        return Groups(self.architecture, self.notes)

    def check_selection(self, selection: Selection) -> None:
        """Make sure that a selection is one of this model's channels.

        Raises `BundleError` if it belongs to another architecture.
        """
        if selection.architecture.digest != self.architecture.digest:
            raise BundleError(
                "selection belongs to another architecture",
                expected=self.architecture.digest[:12],
                got=selection.architecture.digest[:12],
            )
