"""Plans the boards of runs before the first one trains: what can't begin is refused at once."""

from __future__ import annotations

from fedprune.coordination import State, make_coordinator
from fedprune.coordination.width_planner import WHOLE_HINT
from fedprune.core.errors import PlanError
from fedprune.core.text import first_few
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import profiles_by_kind
from fedprune_server.simulation.results.coverage import PAPERS_SETTING, needs_whole


def plan_boards(experiment: Experiment) -> dict[str, str]:
    """Admit all boards as the first round does. Returns the reason for each that the job leaves out.

    Raises `PlanError` if the others are too few for a round, and `ConfigError` if strategy or options are wrong.
    """
    job, model = experiment.job, experiment.model
    coordinator = make_coordinator(job, model.architecture, State(model=""), model.frozen)
    profiles = profiles_by_kind(experiment.devices)
    for device in sorted(experiment.devices, key=lambda d: d.name):
        coordinator.handle(device.birth(1, profiles[id(device.profile)], is_last_of_batch=False), 0.0)
    reasons = {name: device.excluded for name, device in coordinator.state.devices.items() if device.excluded}
    fitting = len(experiment.devices) - len(reasons)
    if fitting >= job.devices or not reasons:
        return reasons
    ways = [f"devices = {fitting}, to train without the others"] if fitting else []
    if any(map(needs_whole, reasons.values())):
        # A board that trains what it is too slow for would miss every deadline.
        deadline = " with a longer deadline_s" if any("deadline_s" in reason for reason in reasons.values()) else ""
        ways.insert(0, f"{PAPERS_SETTING}{deadline}, as papers do")
    names = sorted(reasons)
    raise PlanError(
        f"{experiment.title}: boards for a round of {job.strategy}",
        expected=f"{job.devices} (devices in [job])",
        got=f"{fitting}, without {first_few(names, max_names=1)}: {reasons[names[0]].removesuffix(WHOLE_HINT)}",
        hint=f"In [job] set {', or '.join(ways)}." if ways else "",
    )
