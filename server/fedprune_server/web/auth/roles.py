"""Roles of operators: every order needs a role, and higher roles include it."""

from __future__ import annotations

# From the lowest to the highest: each includes the ones before it.
ROLES = ("viewer", "operator", "admin")

# The role that an order needs. An admin's orders change boards in a way that nobody can undo from here: a revoked board
# must join again, and one with a bad release may need somebody to go there.
ROLE_OF_ORDER = {
    "look": "viewer",  # publish a device's details
    "coverage": "viewer",  # publish which channels devices hold
    "pause": "operator",
    "resume": "operator",
    "approve": "operator",
    "deny": "operator",
    "release_quarantine": "operator",
    "rollout_pause": "operator",
    "rollout_resume": "operator",
    "rollout_stop": "operator",
    "revoke": "admin",
    "rollout_start": "admin",
    "rollout_back": "admin",
}

# Orders that change nothing: `console_orders = "look"` allows these alone.
READING_ORDERS = frozenset({"look", "coverage"})


def has_role(role: str, needed: str) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)
