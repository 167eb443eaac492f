"""The share of the model that each node gets: set by the user, by the strategy, or by the nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from fedprune.core import validation
from fedprune.core.errors import ConfigError, ProtocolError, did_you_mean, value_text
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice, State
from fedprune.model.architecture import Architecture, kept_share, widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.plan_search import PlanSearch
from fedprune.strategies.allocation import Allocator, Fixed, Fleet, Tiers, check_density
from fedprune.strategies.strategy import Strategy

# A density, or the name of a hardware profile for which widths are planned.
DensityOrProfile = float | str

# What users may say: one density for all; a list of tiers; a density by node; or None for the strategy's own tiers or,
# where it has none, what nodes answer.
Densities = float | str | Sequence[float] | Mapping[int, DensityOrProfile] | Callable[[int], DensityOrProfile] | None

ASK_NODES = "ask"  # every node is asked for its own share


@dataclass(frozen=True)
class NodeShare:
    """A node's part of the model.

    Attributes:
        widths: Channels per group that the node gets.
        density: Its share of all channels of the model.
        accumulate: Micro-batches in which it works through a batch, unless the recipe asks for more.
    """

    widths: tuple[int, ...]
    density: float
    accumulate: int = 1


class FlowerAllocation:
    """Decides which share of the model each Flower node trains: one density for all, one by node, the strategy's own
    choice, or the node's answer when it is asked. Raises `ConfigError` if a density is not above 0 and at most 1, or
    there is no such profile."""

    def __init__(self, job: Job, strategy: Strategy, architecture: Architecture, requested: Densities = None) -> None:
        self._job, self._strategy, self._architecture = job, strategy, architecture
        self._share_of_node: dict[int, NodeShare] = {}
        self._density_of_node: Callable[[int], DensityOrProfile] | None = None
        self._fleet = Fleet(job, architecture, State(model=""))
        self._allocator: Allocator | None = None
        if requested is None:
            self._allocator = strategy.allocator
        elif isinstance(requested, str):
            if requested != ASK_NODES:
                self._density_of_node = lambda node: requested
                # A profile that doesn't exist or fit shows now, not in the first round.
                self.share_of(requested, 1)
        elif isinstance(requested, Mapping):
            self._density_of_node = _density_by_node(dict(requested))
        elif callable(requested):
            self._density_of_node = requested
        elif isinstance(requested, Sequence):
            self._allocator = Tiers(tuple(cast(Sequence[float], requested)))
        else:
            self._allocator = Fixed(requested)

    def nodes_to_ask(self, nodes: Sequence[int]) -> list[int]:
        """The nodes that haven't answered yet; none if nodes aren't asked."""
        if self._allocator is not None or self._density_of_node is not None:
            return []
        return [n for n in nodes if n not in self._share_of_node]

    def note_answer(self, node: int, density: object, profile: object, samples: object) -> None:
        """Note the share that a node asks for by its answer. Raises `ProtocolError` if it is neither a density nor a
        profile that comes with fedprune, and `PlanError` if no width fits that profile."""
        if isinstance(profile, str) and density is None:
            available = profile_store.shipped_profile_names()  # names only: text from a node never names a file here
            if profile not in available:
                suggestion = did_you_mean(profile, available)
                raise ProtocolError(f"a node's profile {value_text(profile)}{suggestion} isn't known here")
            count = samples if isinstance(samples, int) and 1 <= samples <= 10**9 else 1
            self._share_of_node[node] = self.share_of(profile, count)
            return
        checked = validation.check_number("a node's density", density, 0, 1, above=True, error=ProtocolError)
        self._share_of_node[node] = self.share_of(checked, 1)

    def share_out(self, nodes: Sequence[int], round_: int) -> dict[int, NodeShare]:
        """The shares of a round's nodes; without those that were asked and haven't answered. Raises `ConfigError` if
        nothing is known of a node."""
        if self._density_of_node is not None:
            return {n: self.share_of(self._density_of_node(n), 1) for n in nodes}
        if self._allocator is None:
            return {n: self._share_of_node[n] for n in nodes if n in self._share_of_node}
        state = self._fleet.state
        state.round = round_
        for node in sorted(nodes):
            if str(node) not in state.devices:
                state.devices[str(node)] = JobDevice(session=0, online=True, profile={}, probe=None, samples=1)
                self._allocator.admit(self._fleet, str(node), None)
        self._allocator.open(self._fleet)
        devices = {n: state.devices[str(n)] for n in nodes}
        return {n: NodeShare(d.widths, d.density) for n, d in devices.items()}

    def share_of(self, requested: DensityOrProfile, samples: int) -> NodeShare:
        """The share of a density, or the share that is planned for a profile. Raises `ConfigError` if it is neither,
        `ProfileError` if there is no such profile, and `PlanError` if no width fits it."""
        if isinstance(requested, str):
            recipe = partial(self._recipe, requested, samples)
            plan = PlanSearch(self._architecture, profile_store.find_profile(requested), recipe, samples).search()
            return NodeShare(plan.widths, kept_share(self._architecture, plan.widths), plan.accumulate)
        check_density("density of a node", requested)
        return NodeShare(widths_at(self._architecture, requested), float(requested))

    def _recipe(self, name: str, samples: int, widths: tuple[int, ...]) -> Recipe:
        """A node's recipe at these widths."""
        return self._strategy.planned_recipe(self._job, name, widths, kept_share(self._architecture, widths), samples)


def _density_by_node(densities: dict[int, DensityOrProfile]) -> Callable[[int], DensityOrProfile]:
    def density_of(node: int) -> DensityOrProfile:
        if node not in densities:
            raise ConfigError(
                f"density of node {node}",
                expected="one for every node",
                got=f"those of {len(densities)} others",
                hint="Node ids are new in every run: give a function of the id, or density='ask'.",
            )
        return densities[node]

    return density_of
