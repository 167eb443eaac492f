"""Roles of operators: every order needs a role, and higher roles include it."""

from __future__ import annotations

from typing import NamedTuple

# From the lowest to the highest: each includes the ones before it.
ROLES = ("viewer", "operator", "admin")


class OrderKind(NamedTuple):
    """The role that an order needs, and the arguments that it must have."""

    role: str
    arguments: tuple[str, ...] = ()


# An admin's orders change boards in a way that nobody can undo from here: a revoked board must join again, and one with
# a bad release may need somebody to go there.
ORDER_KINDS = {
    "look": OrderKind("viewer", ("device",)),  # publish a device's details
    "coverage": OrderKind("viewer", ("job",)),  # publish which channels devices hold
    "pause": OrderKind("operator", ("job",)),
    "resume": OrderKind("operator", ("job",)),
    "approve": OrderKind("operator", ("device", "key")),
    "deny": OrderKind("operator", ("device",)),
    "release_quarantine": OrderKind("operator", ("device",)),
    "rollout_pause": OrderKind("operator"),
    "rollout_resume": OrderKind("operator"),
    "rollout_stop": OrderKind("operator"),
    "revoke": OrderKind("admin", ("device",)),
    "rollout_start": OrderKind("admin", ("release",)),
    "rollout_back": OrderKind("admin", ("release",)),
}

# Orders that change nothing: `console_orders = "look"` allows these alone.
READING_ORDERS = frozenset({"look", "coverage"})


def is_accepted(kind: str, console_orders: str) -> bool:
    """Whether a server with this setting takes an order."""
    return console_orders == "all" or (console_orders == "look" and kind in READING_ORDERS)


def has_role(role: str, needed: str) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)
