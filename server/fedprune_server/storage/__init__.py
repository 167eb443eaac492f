"""State that survives a crash: database, event log, lease, state folder, blobs in S3.

Not here: looking it over, backing it up and repairing it (`maintenance`).
"""
