"""One round: clients' updates checked, limited, summed and closed into the next global model.

Not here: who takes part and when a round closes (`coordination`), and where updates are kept (the server's `executor`).
"""
