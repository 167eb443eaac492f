"""How far, and with what momentum, the server moves its model towards what devices learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError

Float64s = npt.NDArray[np.float64]

MAX_RATE = 1000.0


@dataclass(frozen=True)
class ServerStep:
    """One step of the server's optimiser, SGD on the pseudo-gradient w_t − w̄.

    Attributes:
        rate: Share of the way, above 0; above 1 it goes beyond the mean.
        momentum: β, from 0 to below 1.
        damped: The velocity is a moving average, v ← β·v + (1 − β)·rate·(w̄ − w_t), instead of FedAvgM's sum,
            v ← β·v + rate·(w̄ − w_t).
    """

    rate: float = 1.0
    momentum: float = 0.0
    damped: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise BundleError("server momentum", expected="from 0 to below 1", got=self.momentum)
        if not 0 < self.rate <= MAX_RATE:
            raise BundleError("server rate", expected=f"above 0 and at most {MAX_RATE:g}", got=self.rate)

    def towards(self, base: npt.NDArray[Any], mean: Float64s, *, measured: bool) -> Float64s:
        """w_t + rate·(w̄ − w_t); w̄ itself at a rate of 1.

        Statistics (`measured`) never go beyond the mean: a variance could become negative.
        """
        rate = min(self.rate, 1.0) if measured else self.rate
        if rate == 1:
            return mean
        out: Float64s = base + rate * (mean - base)
        return out

    def moving(
        self, base: npt.NDArray[Any], mean: Float64s, velocity: npt.NDArray[np.float32]
    ) -> tuple[Float64s, Float64s]:
        """w_t + v, and v.

        The rate scales the move that enters v, as FedBuff (Nguyen et al. 2022, Alg. 1) hands its sum of moves, each
        scaled by its own staleness, to the server's optimiser: v keeps what came before at the rate of its own round.
        """
        gain = 1.0 - self.momentum if self.damped else 1.0
        speed: Float64s = self.momentum * velocity.astype(np.float64) + gain * self.rate * (mean - base)
        following: Float64s = base + speed
        return following, speed
