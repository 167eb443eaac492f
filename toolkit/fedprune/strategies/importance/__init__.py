"""Scores of channels and elements, and the statistics that they are computed from.

Not here: which score a job uses (`strategies.channel_ranking`).
"""
