"""The mixture of boards that large fleets are made of."""

from __future__ import annotations

SHARES = {
    "raspberry-pi-4b": 0.30,
    "raspberry-pi-5": 0.15,
    "raspberry-pi-3b-plus": 0.15,
    "raspberry-pi-zero-2w": 0.15,
    "jetson-nano": 0.08,
    "jetson-orin-nano": 0.07,
    "generic-x86-64": 0.10,
}
"""Shares of profiles: mostly small boards, some better ones, a few machines that were there anyway."""

SAMPLES = (50, 500)
"""The fewest and the most samples of a board."""
