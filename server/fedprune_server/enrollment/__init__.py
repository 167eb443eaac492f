"""Membership of the fleet: authority, claims, approvals, revocations.

Not here: certificates and signatures as such (`fedprune.security`).
"""
