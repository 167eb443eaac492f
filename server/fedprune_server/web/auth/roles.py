"""Roles of operators: every order needs a role, and higher roles include it."""

from __future__ import annotations

ROLES = ("viewer", "operator", "admin")
"""From the lowest to the highest."""

NEEDED = {
    "look": "viewer",
    "coverage": "viewer",
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
"""The role that an order needs: what a board doesn't come back from by itself needs an admin."""

LOOKS = frozenset({"look", "coverage"})
"""Orders that change nothing."""


def may(role: str, needed: str) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)
