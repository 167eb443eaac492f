"""What a running server shows of itself: one snapshot of a job per turn, and the protocol of those who observe it.

Not here: anything that observes (`monitoring`, `web`), and how snapshots are made (`engine`).
"""
