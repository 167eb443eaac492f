"""The registry of devices: presence, traffic, quarantine, clones, logs.

Not here: membership (`enrollment`) and a job's view of its devices (`fedprune.jobs.state`).
"""
