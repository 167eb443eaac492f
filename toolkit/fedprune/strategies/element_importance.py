"""How important single elements are: squared gradients that devices report, sizes, or what the server saw move.

Importances and masks are PR-FL's (arXiv 2403.15439), the third kind is FedGMR's (arXiv 2512.05372);
`docs/strategies/pr-fl.md` says where the sources are silent and how they are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, shown
from fedprune.model.selection import Tensors, mesh
from fedprune.strategies.importance.element_ranking import magnitudes, prunable, with_floors
from fedprune.strategies.importance.scoring import ordered, ranks
from fedprune.strategies.values import Memories, Ranking, Report, Scene

Floats = npt.NDArray[np.float32]

Kind = Literal["squares", "size", "taylor"]

ORDER = "order"
"""Memory: the order of elements that holds until the next interval ends."""

STORE = "importance"
"""Memory: importances as far as they are known (0 where not)."""

SUM, COUNT = "importance/sum", "importance/count"
"""Memory: what devices reported since the last interval ended, and how many reported something of each element."""

SEEN = "importance/seen"
"""Memory: the round of every device's last update that was added up: buffered updates come again in later rounds."""

BEFORE = "importance/before"
"""Memory: the model when the last interval ended."""


@dataclass(frozen=True)
class Importance:
    """Ranks elements anew every so many rounds; in between masks change with densities alone.

    Attributes:
        kind: `squares`: the squared gradients of devices' last steps, which the recipe's `report_squares` asks for,
            stretched over all tensors of a device from 0 to 1, and averaged over the devices that reported something
            other than 0. What an interval brings replaces what was known before. Elements of which nothing is known
            come by |w|, times the least that is known of their tensor (PR-FL). `size`: |w|. `taylor`: |(w − w') · w|,
            with w' the model an interval before: what the loss would lose, to first order (FedGMR's `wg`).
        interval: Rounds between two orders.
        floor: Share of every tensor, by |w|, that every mask keeps.
    """

    kind: Kind = "squares"
    interval: int = 50
    floor: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError("kind of importance", expected=" or ".join(get_args(Kind)), got=shown(self.kind))
        if self.interval < 1:
            raise ConfigError("interval of importances", expected="1 round or more", got=self.interval)
        if not 0 <= self.floor <= 1:
            raise ConfigError("floor of element masks", expected="from 0 to 1", got=self.floor)

    def rank(self, scene: Scene) -> Ranking:
        """Channels in their own order, and the order of elements that holds."""
        return Ranking(ranks(ordered(scene.architecture)), self._order(scene))

    def learn(self, scene: Scene, reports: Callable[[], Iterator[Report]]) -> Memories:
        """The order, if it is new, and what devices reported."""
        out: Memories = {}
        if self._begins(scene):
            out[ORDER] = self._order(scene)
            if self.kind == "taylor":
                out[BEFORE] = {n: scene.model[n] for n in prunable(scene.architecture)}
        if self.kind == "squares":
            sums, counts, seen = _gathered(scene, reports())
            if seen:
                out |= {SUM: dict(sums), COUNT: dict(counts), SEEN: dict(scene.memory.get(SEEN, {})) | seen}
            if scene.round % self.interval == 0:
                out |= {STORE: _known(scene, sums, counts), SUM: {}, COUNT: {}}
        return out

    def _begins(self, scene: Scene) -> bool:
        """Whether a round is the first of an interval."""
        return ORDER not in scene.memory or (scene.round - 1) % self.interval == 0

    def _order(self, scene: Scene) -> Tensors:
        if not self._begins(scene):
            return dict(scene.memory[ORDER])
        order = size = magnitudes(scene.model, prunable(scene.architecture))
        if self.kind != "size":
            known = self._importance(scene)
            least = _least(known)
            order = {n: _filled(v, known.get(n), least) for n, v in size.items()}
        return with_floors(order, scene.model, self.floor)

    def _importance(self, scene: Scene) -> Tensors:
        """What is known of elements; 0 where nothing is."""
        if self.kind == "squares":
            return dict(scene.memory.get(STORE, {}))
        before = scene.memory.get(BEFORE, {})
        return {n: np.abs((scene.model[n] - v) * scene.model[n]) for n, v in before.items()}


def _known(scene: Scene, sums: Tensors, counts: Tensors) -> Tensors:
    """Importances at the end of an interval: its means, and what was known before where it brought nothing."""
    before = scene.memory.get(STORE, {})
    out: Tensors = {}
    for name, total in sums.items():
        mean = total / np.maximum(counts[name], 1)
        out[name] = np.where(mean > 0, mean, before.get(name, np.zeros_like(mean))).astype(np.float32)
    return out


def _filled(size: Floats, known: Floats | None, least: float) -> Floats:
    """Importances of a tensor; where there is none, |w| times the least of the tensor or, without any, of the model."""
    if known is None:
        return np.multiply(size, least, dtype=np.float32)
    positive = known[known > 0]
    unit = positive.min() if positive.size else np.float32(least)
    return np.where(known > 0, known, size * unit).astype(np.float32)


def _least(store: Tensors) -> float:
    """The least importance above 0 of all; 1 where there is none."""
    found = [float(v[v > 0].min()) for v in store.values() if (v > 0).any()]
    return min(found, default=1.0)


def _gathered(scene: Scene, reports: Iterator[Report]) -> tuple[Tensors, Tensors, dict[str, npt.NDArray[np.int64]]]:
    """Sums and counts of the interval with those of new reports, and of which rounds these are.

    Most updates of asynchronous rounds come again, or bring nothing: then nothing is new, and nothing need be stored.
    """
    names = prunable(scene.architecture)
    shapes = {n: scene.architecture.by_name[n].shape for n in names}
    known = {k: scene.memory.get(k, {}) for k in (SUM, COUNT)}
    sums, counts = ({n: np.array(known[k].get(n, np.zeros(shapes[n], np.float32))) for n in names} for k in known)
    before = scene.memory.get(SEEN, {})
    seen: dict[str, npt.NDArray[np.int64]] = {}
    for report in reports:
        turn, maps = report.cut.turn, report.trained.selection.maps
        if not report.squares or (turn.device in before and int(before[turn.device][0]) >= turn.round):
            continue
        seen[turn.device] = np.array([turn.round], np.int64)
        parts = {n: v.astype(np.float64) for n, v in report.squares.items()}
        low = min(float(v.min()) for v in parts.values())
        high = max(float(v.max()) for v in parts.values())
        for name in names:
            if name in parts and high > low:
                share = (parts[name] - low) / (high - low)
                sums[name][mesh(maps(name))] += share.astype(np.float32)
                counts[name][mesh(maps(name))] += share > 0
    return sums, counts, seen
