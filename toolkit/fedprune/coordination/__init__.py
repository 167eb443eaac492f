"""A job's rounds: decisions (events in, commands out, no clock), and updates checked, limited and summed.

Not here: carrying commands out and keeping updates (the server's `engine` and `executor`, or the simulator).
"""

from collections.abc import Collection

from fedprune.coordination.asynchronous import AsynchronousCoordinator
from fedprune.coordination.base import Coordinator
from fedprune.coordination.masked import MaskedCoordinator
from fedprune.coordination.synchronous import SynchronousCoordinator
from fedprune.jobs.job import Job
from fedprune.jobs.state import Phase, State
from fedprune.model.architecture import Architecture
from fedprune.strategies import compose

__all__ = ["AsynchronousCoordinator", "Coordinator", "Phase", "State", "SynchronousCoordinator", "make_coordinator"]


def make_coordinator(job: Job, architecture: Architecture, state: State, frozen: Collection[str] = ()) -> Coordinator:
    """The coordinator of a job: asynchronous if its strategy's schedule is, else synchronous, with updates as they are
    or masked. Raises `ConfigError` if the job's strategy or its options are wrong."""
    schedule = compose(job).schedule
    if schedule is not None and schedule.asynchronous:
        return AsynchronousCoordinator(job, architecture, state, frozen)
    return (MaskedCoordinator if job.secure_aggregation else SynchronousCoordinator)(job, architecture, state, frozen)
