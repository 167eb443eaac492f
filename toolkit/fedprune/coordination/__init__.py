"""The course of a job: events in, commands out, no input or output of its own."""

from fedprune.coordination.coordinator import Coordinator
from fedprune.coordination.state import Phase, State

__all__ = ["Coordinator", "Phase", "State"]
