"""Observation of a running server: its terminal, metrics, traces, trackers, alerts, notifications, health.

Not here: anything that changes a job. Observers decide nothing.
"""
