"""From clients' updates to the next global model: exact sums, means, server optimisers.

Not here: which rule a job uses (`strategies`) and where updates are stored (the server's `executor`).
"""
