"""Rollouts of releases: started, sent in stages, reported, taken back.

Not here: the state machine (`fedprune.releases.rollout`).
"""
