"""Secure aggregation: boards mask their updates so that the server learns only the sum of a cohort's.

Not here: what is done with the sum (`aggregation`), and messages, rounds and connections: all is bytes in, bytes out.
"""
