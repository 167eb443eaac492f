"""The share of the model that each node gets: set by the user, by the strategy, or by the nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from fedprune.core import validation
from fedprune.core.errors import ConfigError, ProtocolError, meant, shown
from fedprune.jobs.job import Job
from fedprune.jobs.state import Device, State
from fedprune.model.architecture import Architecture, kept_share, widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.plan import PlanSearch
from fedprune.strategies.allocation import Allocator, Fixed, Fleet, Tiers, check_density
from fedprune.strategies.strategy import Strategy

# A density, or the name of a hardware profile for which widths are planned.
DensityOrProfile = float | str

# What users may say: one density for all; a list of tiers; a density by node; or None for the strategy's own tiers or,
# where it has none, what nodes answer.
Densities = float | str | Sequence[float] | Mapping[int, DensityOrProfile] | Callable[[int], DensityOrProfile] | None

# Every node is asked for its own share.
ASK = "ask"


@dataclass(frozen=True)
class NodeShare:
    """A node's part of the model.

    Attributes:
        widths: Channels per group.
        density: The share of them all that these are.
        accumulate: Parts in which it works through a batch, unless the recipe asks for more.
    """

    widths: tuple[int, ...]
    density: float
    accumulate: int = 1


class Allocation:
    """Decides on nodes' shares, and remembers what nodes answered. Raises `ConfigError` if a density is not above 0 and
    at most 1, or there is no such profile."""

    def __init__(self, job: Job, strategy: Strategy, architecture: Architecture, wishes: Densities = None) -> None:
        self._job, self._strategy, self._architecture = job, strategy, architecture
        self._said: dict[int, NodeShare] = {}
        self._by_node: Callable[[int], DensityOrProfile] | None = None
        self._fleet = Fleet(job, architecture, State(model=""))
        self._allocator: Allocator | None = None
        if wishes is None:
            self._allocator = strategy.allocator
        elif isinstance(wishes, str):
            if wishes != ASK:
                self._by_node = lambda node: wishes
                # A profile that doesn't exist or fit shows now, not in the first round.
                self.of(wishes, 1)
        elif isinstance(wishes, Mapping):
            self._by_node = _named(dict(wishes))
        elif callable(wishes):
            self._by_node = wishes
        elif isinstance(wishes, Sequence):
            self._allocator = Tiers(tuple(cast(Sequence[float], wishes)))
        else:
            self._allocator = Fixed(wishes)

    @property
    def asks(self) -> bool:
        """Whether nodes are asked."""
        return self._allocator is None and self._by_node is None

    def unknown(self, nodes: Sequence[int]) -> list[int]:
        """The nodes that are to be asked: those that haven't answered yet."""
        return [n for n in nodes if n not in self._said] if self.asks else []

    def heard(self, node: int, density: object, profile: object, samples: object) -> None:
        """Note the share that a node asks for by its answer.

        Raises:
            ProtocolError: It is neither a density nor a profile that comes with fedprune.
            PlanError: No width fits that profile.
        """
        if isinstance(profile, str) and density is None:
            available = profile_store.shipped()  # names only: text from a node never names a file here
            if profile not in available:
                raise ProtocolError(f"a node's profile {shown(profile)}{meant(profile, available)} isn't known here")
            count = samples if isinstance(samples, int) and 1 <= samples <= 10**9 else 1
            self._said[node] = self.of(profile, count)
            return
        checked = validation.number("a node's density", density, 0, 1, above=True, error=ProtocolError)
        self._said[node] = self.of(checked, 1)

    def deal(self, nodes: Sequence[int], round_: int) -> dict[int, NodeShare]:
        """The shares of a round's nodes; without those that were asked and haven't answered. Raises `ConfigError` if
        nothing is known of a node."""
        if self._by_node is not None:
            return {n: self.of(self._by_node(n), 1) for n in nodes}
        if self._allocator is None:
            return {n: self._said[n] for n in nodes if n in self._said}
        state = self._fleet.state
        state.round = round_
        for node in sorted(nodes):
            if str(node) not in state.devices:
                state.devices[str(node)] = Device(session=0, online=True, profile={}, probe=None, samples=1)
                self._allocator.admit(self._fleet, str(node), None)
        self._allocator.open(self._fleet)
        devices = {n: state.devices[str(n)] for n in nodes}
        return {n: NodeShare(d.widths, d.density) for n, d in devices.items()}

    def of(self, wish: DensityOrProfile, samples: int) -> NodeShare:
        """The share of a density, or the one that is planned for a profile.

        Raises:
            ConfigError: It is neither.
            ProfileError: There is no such profile.
            PlanError: No width fits it.
        """
        if isinstance(wish, str):
            recipe = partial(self._recipe, wish, samples)
            plan = PlanSearch(self._architecture, profile_store.find(wish), recipe, samples).plan()
            return NodeShare(plan.widths, kept_share(self._architecture, plan.widths), plan.accumulate)
        check_density("density of a node", wish)
        return NodeShare(widths_at(self._architecture, wish), float(wish))

    def _recipe(self, name: str, samples: int, widths: tuple[int, ...]) -> Recipe:
        """A node's recipe at these widths."""
        return self._strategy.planned_recipe(self._job, name, widths, kept_share(self._architecture, widths), samples)


def _named(wishes: dict[int, DensityOrProfile]) -> Callable[[int], DensityOrProfile]:
    def of(node: int) -> DensityOrProfile:
        if node not in wishes:
            raise ConfigError(
                f"density of node {node}",
                expected="one for every node",
                got=f"those of {len(wishes)} others",
                hint="Node ids are new in every run: give a function of the id, or density='ask'.",
            )
        return wishes[node]

    return of
