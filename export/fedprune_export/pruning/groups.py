"""Listing of a model's channel groups: where each is found, and what stays whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from fedprune.model.architecture import FIXED, Architecture, ChannelGroup


@dataclass(frozen=True, repr=False)
class Groups(Sequence[ChannelGroup]):
    """The channel groups of a model; prints as text.

    Attributes:
        notes: What the import changed or could not analyse.
    """

    architecture: Architecture
    notes: tuple[str, ...] = ()

    @property
    def stays(self) -> list[tuple[str, int]]:
        """Channel axes of weights that stay, in whole or in part: places such as `fc.weight[0]`, and how many indices.

        The kernel axes of convolutions are left out.
        """
        kernels = {n.weight: n.op for n in self.architecture.layers if n.weight in self.architecture.by_name}
        out = []
        for spec in self.architecture.tensors:
            axes = spec.axes[:2] if "Conv" in kernels.get(spec.name, "") else spec.axes
            for i, axis in enumerate(axes):
                size = sum(s.length for s in axis.segments if s.group == FIXED)
                if size and axis.length > 1:  # a depthwise filter reads one channel, which can't be cut
                    out.append((f"{spec.name}[{i}]", size))
        return out

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.architecture.name,
            "digest": self.architecture.digest,
            "groups": [
                {"name": g.name, "channels": g.size, "members": list(self.architecture.members(i))}
                for i, g in enumerate(self)
            ],
            "stays": [{"place": place, "indices": size} for place, size in self.stays],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{g.name}: {g.size} channels: {', '.join(self.architecture.summary(i))}" for i, g in enumerate(self)]
        stays = ", ".join(f"{place} ({size})" for place, size in self.stays) or "nothing"
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
