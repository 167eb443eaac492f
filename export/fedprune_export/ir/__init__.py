"""The graph that the compiler works on: nodes, operators, shapes, traces, opsets.

Not here: channels, models and boards. Every other room reads and writes this one's graphs.
"""
