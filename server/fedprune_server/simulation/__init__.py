"""Fleets on a virtual clock: experiments, their data, their devices, sweeps and results.

Not here: a second implementation of rounds. Coordinator, worker and training are the real ones.
"""
