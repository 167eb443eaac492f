"""Observation of a running server: one snapshot of a job per turn, and the protocol of observers.

Not here: anything that observes (`monitoring`, `web`), and how snapshots are made (`engine`).
"""
