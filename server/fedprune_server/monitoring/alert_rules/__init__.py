"""The alert rules, one module for each subject: a module that is put here is a rule from then on.

A rule is a function: it takes a situation, and yields the alerts that the situation justifies. `alert_rule` declares
their kinds and severities. The server's log, its console, its metrics, its notifications and `fedprune-server doctor`
all show what `evaluate_alerts` returns.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from fedprune_server.monitoring.alerts import ALERT_KINDS, ALERT_LEVELS, RULES, Alert
from fedprune_server.monitoring.situation import Situation

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

# Under another name: `alerts.ALERT_KINDS` is empty until this package has imported every rule.
ALERT_SEVERITIES: Mapping[str, tuple[str, ...]] = ALERT_KINDS


def evaluate_alerts(situation: Situation, now: float) -> list[Alert]:
    """All alerts that a situation justifies at a time in seconds since 1970, the most severe first."""
    alerts = [alert for rule in RULES for alert in rule(situation, now)]
    return sorted(alerts, key=lambda alert: -ALERT_LEVELS.index(alert.severity))
