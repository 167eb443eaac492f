"""Inputs of nodes that say sizes, which a cut writes anew: the analysis lets them name a number of channels."""

from __future__ import annotations

TARGETS = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Resize": 3}
"""Per operator the input that is the shape of its output."""
