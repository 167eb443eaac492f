"""Proofs that a cut computes what it should: parity, gradients, trial steps."""
