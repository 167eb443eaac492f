"""Logs the plan of each device that connects: how wide its model is, and why."""

from __future__ import annotations

import logging

from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice
from fedprune.model.architecture import Architecture
from fedprune.planning.correction import Correction
from fedprune.planning.costs import costs_at
from fedprune.planning.width_plan import WidthPlan
from fedprune_server.devices.contacts import Contact

log = logging.getLogger("fedprune.server")

# Plans whose texts are cached: devices of one plan share them.
_MAX_CACHED_PLANS = 4096


class PlanLog:
    """Logs devices of a job once for each plan."""

    def __init__(self, job: Job, architecture: Architecture, model_parameters: int, prefix: str) -> None:
        self._job, self._architecture, self._model_parameters = job, architecture, model_parameters
        self._prefix = prefix
        self._doubted = set[str]()
        self._descriptions: dict[int, tuple[str, str]] = {}  # first line and warning of a logged plan, by its hash

    def introduce(self, name: str, contact: Contact, device: JobDevice) -> None:
        """Log a connected device once per plan, with the plan; only its first line if that plan was logged before."""
        introduction = hash((device.widths, device.excluded, device.profile.get("name")))
        if introduction == contact.introduced:
            return
        contact.introduced = introduction
        title = device.profile.get("title") or device.profile.get("name")
        if device.excluded:
            log.warning("%sdevice %s (%s) is excluded: %s", self._prefix, name, title, device.excluded)
            return
        description = (name, title, device.samples, contact.software or "?")
        log.info("%sdevice %s is connected: %s, %d samples, %s", self._prefix, *description)
        plan_hash = hash(device.plan if device.plan is not None else (device.widths, device.density))
        if plan_hash not in self._descriptions:
            if len(self._descriptions) >= _MAX_CACHED_PLANS:
                self._descriptions.clear()
            self._descriptions[plan_hash] = self._log_plan(device)
        elif device.plan is not None or device.density != self._job.density:
            log.info("  %s", self._descriptions[plan_hash][0])
        if warning := self._descriptions[plan_hash][1]:
            log.warning("%sdevice %s: %s", self._prefix, name, warning)

    def warn_of_doubt(self, name: str, device: JobDevice) -> None:
        """Log once that a device's rounds are far from what it measured of itself."""
        doubt = Correction(**device.correction).doubt
        if doubt and name not in self._doubted:
            log.warning("%sdevice %s: %s; it is planned by its rounds", self._prefix, name, doubt)
            self._doubted.add(name)

    def _log_plan(self, device: JobDevice) -> tuple[str, str]:
        """Log a plan for the first time. Returns its first line and warning, for other devices with this plan."""
        if device.plan is None:
            kept_share = costs_at(self._architecture, device.widths).parameters / self._model_parameters
            decider = "job" if device.density == self._job.density else "strategy"
            lines = [
                f"density {device.density:.3g}, as the {decider} says: keeps {100 * kept_share:.0f}% of the weights"
            ]
            warning = ""
        else:
            plan = WidthPlan.from_dict(device.plan)
            lines = plan.describe(self._model_parameters).splitlines()
            warning = "; ".join(filter(None, (plan.doubt, plan.warning)))
            lines[0] = f"{lines[0]}, {plan.unbound_line() or f'bound by {plan.bound}'}"
        log.info("  %s", lines[0])
        for line in lines[1:]:  # for everyday use `status` and the console's page of the board have them
            log.debug("  %s", line)
        return lines[0], warning
