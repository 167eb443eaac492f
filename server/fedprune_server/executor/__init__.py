"""The heavy commands of a job: score, extract, fold, close, evaluate, here or in worker processes.

Not here: decisions (`fedprune.coordination`) and messages. Commands name blobs; results are events.
"""
