"""Lower precision: norms folded, float16, int8, each with the graphs by which a board makes it of new weights."""

from fedprune_export.precision.lowered import Lowered, lower
from fedprune_export.precision.trial import Trial, Trials

__all__ = ["Lowered", "Trial", "Trials", "lower"]
