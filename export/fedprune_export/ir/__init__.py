"""The graph that the compiler works on: nodes, operators, shapes, traces, opsets, liveness.

Not here: channels, models and boards. Every other room reads and writes this one's graphs.
"""
